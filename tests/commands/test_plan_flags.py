"""``zokernel plan`` reads examples as a run does, and refuses what no plan can use."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from zokernel.cli import main
from zokernel.commands.plan import PlanArguments, load_task, plan_for
from zokernel.experiments.kerzoo.jobs import tiny_tokenizer
from zokernel.finetune.data.datasets import load_splits
from zokernel.finetune.data.datasets import load_task as load_prompt_task
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.tasks import demonstrations


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_steps 0", "--max_steps must be at least 1, not 0"),
        ("--num_perturbations 10 0", "--num_perturbations must be at least 1, not 0"),
        ("--num_perturbations -1", "--num_perturbations must be at least 1, not -1"),
        ("--verify true --verify_draws 0", "--verify_draws must be at least 1, not 0"),
        ("--memory true --tokens 0", "--tokens must be at least 1, not 0"),
        ("--num_probes 0", "--num_probes must be at least 8, not 0"),
        ("--num_probes 4", "--num_probes must be at least 8, not 4"),
        ("--output_file plan.txt", "--output_file plan.txt is read again as .json: give it that ending."),
        ("--eps -1", "--eps must be above 0, not -1"),
        ("--tolerances 0.1 0", "--tolerances must be above 0, not 0"),
        ("--max_length 0", "max_length must be at least 1, not 0"),
        ("--k_shot 8", "--k_shot is for --protocol mezo-roberta"),
        ("--calibrate true", "--calibrate changes nothing in training"),
        ("--lora true --merge_adapter true", "--merge_adapter changes nothing in training"),
        ("--num_demonstrations 60", "fewer examples than the plan needs"),
        ("--output_file plan.JSON --num_demonstrations 60", "fewer examples than the plan needs"),
    ],
)
def test_flags_no_plan_can_use_are_refused_before_the_model_is_loaded(
    flags, message, tiny_lm_path, tiny_reviews_path, monkeypatch, capsys
):
    monkeypatch.setattr("zokernel.finetune.models.load.load_model", lambda *_: pytest.fail("a model was loaded"))
    data = ["--train_file", str(tiny_reviews_path / "train.jsonl"), "--label_words", "bad", "good"]
    assert main(["plan", "--model_name_or_path", str(tiny_lm_path), *data, *flags.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "flags", "message"),
    [
        (
            "text,label",
            [],
            "column 'label' holds -1 beside 1, and -1 stands for no label unless --labels names it: if it",
        ),
        (
            "Review,label",
            ["--template", "{review} It was"],
            "no column 'review' (it has Review, label): did you mean 'Rev",
        ),
        ("text,Label", [], "no column 'label' (it has text, Label): did you mean 'Label' (in --label_column)?"),
        ("text,label", ["--reward_function", "json"], "--reward_function is for --objective reward: add it"),
    ],
)
def test_a_plan_refuses_rows_as_a_run_does(columns, flags, message, tiny_lm_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zokernel.finetune.models.load.load_model", lambda *_: pytest.fail("a model was loaded"))
    rows = "".join(f"film {n},{2 * (n % 2) - 1}\n" for n in range(40))
    (tmp_path / "rows.csv").write_text(f"{columns}\n{rows}")
    data = ["--train_file", str(tmp_path / "rows.csv"), "--label_words", "bad", "good"]
    assert main(["plan", "--model_name_or_path", str(tiny_lm_path), *data, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A GPT-2 of 32 positions."""
    folder = tmp_path_factory.mktemp("narrow")
    tokenizer = tiny_tokenizer(["great", "bad"], {"eos_token": "<eos>", "pad_token": "<eos>"})
    tokenizer.save_pretrained(folder)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 32, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("adapter", "room"), [({}, 32), ({"prompt_tuning": True, "num_virtual_tokens": 5}, 27)])
def test_prompts_are_cut_to_the_positions_of_the_model(adapter, room, narrow, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * 40 + str(n), "label": n % 2}) + "\n" for n in range(60)))
    data = DataArguments(train_file=str(rows), template="{text} It was", label_words=["bad", "great"])
    model = ModelArguments(model_name_or_path=narrow, **adapter)
    task, _ = load_task(model, data, PlanArguments(update_examples=4, observe_examples=2, precision="fp32"))
    assert task.batch["input_ids"].shape == (6, room - 1)  # the last one is for the label word
    assert task.num_tokens == 6 * (room - 1)
    assert torch.isfinite(task.score(task.batch)).all()


def test_eps_is_that_of_training_also_for_the_folder_of_an_adapter(tiny_lm_path, tiny_reviews_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path)
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    data = DataArguments(train_file=str(tiny_reviews_path / "train.jsonl"), label_words=["bad", "good"])
    arguments = PlanArguments(update_examples=4, observe_examples=2, num_probes=8, precision="fp32")
    for folder, eps in ((tmp_path / "adapter", 1e-2), (tiny_lm_path, 1e-3)):
        assert plan_for(ModelArguments(str(folder)), data, arguments).plan.eps_probed == eps


def test_demonstrations_stand_before_the_prompts_as_in_training(tiny_lm_path, tiny_reviews_path):
    data = DataArguments(
        train_file=str(tiny_reviews_path / "train.jsonl"), template="{sentence} It was", label_words=["bad", "good"]
    )
    prompt, seed = load_prompt_task(data), 3
    splits, tokenizer = load_splits(data, prompt, seed=seed), AutoTokenizer.from_pretrained(tiny_lm_path)
    context = demonstrations(prompt, splits.train[:2])
    assert context.count("It was") == 2
    expected = [context + prompt.prompt(row) for row in splits.train[2:6] + splits.validation[:2]]
    arguments = PlanArguments(update_examples=4, observe_examples=2, precision="fp32", seed=seed)
    task, _ = load_task(ModelArguments(str(tiny_lm_path)), replace(data, num_demonstrations=2), arguments)
    real = task.batch["attention_mask"].bool()
    assert [ids[mask].tolist() for ids, mask in zip(task.batch["input_ids"], real, strict=True)] == tokenizer(
        expected
    ).input_ids
    assert task.num_tokens == sum(map(len, tokenizer(expected).input_ids))
