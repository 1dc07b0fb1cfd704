"""``zokernel merge`` and ``--merge_adapter``: plain transformers loads what scores as the adapter did."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zokernel.cli import main
from zokernel.finetune import load_predictor
from zokernel.finetune.models.same_base import other_base

KINDS = {
    "lora": ["--lora", "true"],
    "dora": ["--lora", "true", "--use_dora", "true", "--use_rslora", "true"],
    "head": ["--lora", "true", "--modules_to_save", "lm_head"],
    "embeddings": ["--lora", "true", "--lora_target_modules", "embed_tokens", "q_proj"],
}
RUN = ("--learning_rate", "3e-2", "--eps", "1e-2", "--method", "mezo", "--max_steps", "3", "--eval_strategy", "no")
RUN += ("--load_best_model_at_end", "false")


def test_a_merged_model_answers_new_rows_as_its_run(flags, tmp_path, tiny_reviews_path):
    assert main(["finetune", *flags, *RUN, "--lora", "true"]) == 0
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["merge", "--model", str(run), "--output_dir", str(merged), "--dtype", "float32"]) == 0
    rows = str(tiny_reviews_path / "test.jsonl")
    answers = []
    for model in (run, merged):
        output = tmp_path / f"{model.name}.jsonl"
        assert main(["predict", "--model", str(model), "--file", rows, "--output_file", str(output)]) == 0
        answers.append([json.loads(line) for line in output.read_text().splitlines()])
    for before, after in zip(*answers, strict=True):
        assert after["scores"] == pytest.approx(before["scores"], abs=1e-5)
    low, checkpoint = tmp_path / "low", run / "checkpoint-3"
    checkpoint.mkdir(exist_ok=True)
    for file in run.glob("adapter_*"):
        shutil.copy(file, checkpoint)
    assert main(["merge", "--model", str(checkpoint), "--output_dir", str(low), "--dtype", "bfloat16"]) == 0
    assert load_predictor(low).model.dtype == torch.bfloat16


def test_checkpoints_and_their_copies_are_merged_like_the_run(flags, tmp_path, other_bases, capsys):
    low = ["--lora", "true", "--dtype", "bfloat16", "--save_strategy", "steps", "--save_steps", "3"]
    assert main(["finetune", *flags, *RUN, *low, "--save_total_limit", "1"]) == 0
    checkpoint = tmp_path / "run" / "checkpoint-3"
    copies = [shutil.copytree(checkpoint, checkpoint.with_name(name)) for name in ("last-good", "of-my-own")]
    for place in (checkpoint, *copies):
        merged = tmp_path / f"checkpoint-{place.name}"  # a folder of its own, not in that of a run
        assert main(["merge", "--model", str(place), "--output_dir", str(merged)]) == 0
        assert {weight.dtype for weight in load_file(merged / "model.safetensors").values()} == {torch.bfloat16}
    for place in (checkpoint, copies[0]):
        other = ["--base", str(other_bases / "mistral"), "--output_dir", str(tmp_path / "other")]
        assert main(["merge", "--model", str(place), *other]) == 2
        assert "that was a LlamaForCausalLM" in capsys.readouterr().err
        rows = [{"sentence": "a good movie"}]
        answers = [load_predictor(model)(rows)[0] for model in (place, tmp_path / f"checkpoint-{place.name}")]
        assert answers[1]["scores"] == pytest.approx(answers[0]["scores"], abs=1e-2)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_scores_as_its_adapter(kind, flags, tmp_path, tiny_lm_path, capsys):
    assert main(["finetune", *flags, *RUN, *KINDS[kind]]) == 0
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["merge", "--model", str(run), "--output_dir", str(merged)]) == 0
    assert f"Saved in {merged}" in capsys.readouterr().out
    ids = AutoTokenizer.from_pretrained(merged)("a good movie It was", return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
        untrained = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, run).eval()(ids).logits
    torch.testing.assert_close(plain, adapted, rtol=0, atol=1e-5)
    assert (plain - untrained).abs().max() > 1e-4
    assert main(["merge", "--model", str(run), "--output_dir", str(merged)]) == 2
    assert "already holds files" in capsys.readouterr().err
    scoring = ["--model_name_or_path", str(merged), "--do_train", "false", "--output_dir", str(tmp_path / "score")]
    assert main(["finetune", *flags, *scoring]) == 0
    output = capsys.readouterr()
    assert "already-trained accuracy" in output.out
    assert "ero-shot" not in output.out + output.err + (tmp_path / "score" / "report.md").read_text()


@pytest.fixture(scope="module")
def other_bases(tmp_path_factory, tiny_lm_path):
    """Models with the shapes of the tiny one: of another class, with other weights, and the same elsewhere."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("mistral", "retrained", "copy"):
        shutil.copytree(tiny_lm_path, folder / name)
    config = json.loads((folder / "mistral" / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (folder / "mistral" / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "retrained" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1e-3
    save_file(weights, folder / "retrained" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("record", ["run.json", "journal.zkj"])
def test_a_base_that_the_adapter_was_not_trained_on_is_refused(record, flags, tmp_path, other_bases, caplog, capsys):
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["finetune", *flags, *RUN, "--lora", "true"]) == 0
    if record == "journal.zkj":  # as an older version left it
        values = json.loads((run / "run.json").read_text())
        assert values.pop("base").keys() == {"class", "dtype", "frozen_sha256"}
        (run / "run.json").write_text(json.dumps(values))
    else:
        (run / "journal.zkj").unlink()
    differences = {
        "mistral": "that was a LlamaForCausalLM, and this is a MistralForCausalLM",
        "retrained": "its weights were",
    }
    for name, difference in differences.items():
        base = str(other_bases / name)
        assert main(["merge", "--model", str(run), "--base", base, "--output_dir", str(merged)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{base} is not the model that the adapter {run} was trained on ({difference}" in error
        assert not merged.exists()
    caplog.clear()
    scoring = ["--model_name_or_path", str(other_bases / "retrained"), "--adapter_name_or_path", str(run)]
    assert main(["finetune", *flags, *scoring, "--do_train", "false", "--output_dir", str(tmp_path / "score")]) == 0
    assert caplog.text.count(f"was trained on: {differences['retrained']} different.") == 1
    copy = ["--base", str(other_bases / "copy")]
    assert main(["merge", "--model", str(run), *copy, "--output_dir", str(merged)]) == 0
    low = ["--dtype", "bfloat16", "--output_dir", str(tmp_path / "low")]
    assert main(["merge", "--model", str(run), *copy, *low]) == 0, "other bits of the same weights"


def test_an_adapter_from_elsewhere_knows_its_base_by_name(tmp_path, tiny_lm_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_lm_path), config)
    adapted.peft_config["default"].base_model_name_or_path = "org/base"
    adapted.save_pretrained(tmp_path)
    assert other_base(adapted, str(tmp_path), "org/base-instruct") == "that was org/base"
    assert other_base(adapted, str(tmp_path), "org/base") == ""
    assert other_base(adapted, str(tmp_path), str(tiny_lm_path)) == "", "a folder may hold anything"


def test_a_finished_run_with_merge_adapter_holds_the_merged_model(flags, tmp_path, capsys):
    assert main(["finetune", *flags, *RUN, "--lora", "true", "--merge_adapter", "true"]) == 0
    run = tmp_path / "run"
    assert metrics_of(run)["saved"] == "model"
    assert not (run / "adapter_config.json").exists()
    assert not (run / "adapter_model.safetensors").exists()
    scoring = ["--model_name_or_path", str(run), "--do_train", "false", "--output_dir", str(tmp_path / "score")]
    assert main(["finetune", *flags, *scoring]) == 0
    scored, trained = metrics_of(tmp_path / "score")["before"], metrics_of(run)["after"]
    assert scored["accuracy"] == trained["accuracy"]
    assert scored["loss"] == pytest.approx(trained["loss"], abs=1e-5)


def test_what_cannot_be_merged_is_refused(flags, tmp_path, tiny_lm_path, capsys):
    for wrong, message in (
        (["--merge_adapter", "true"], "no adapter to merge"),
        (["--merge_adapter", "true", "--prompt_tuning", "true"], "Virtual tokens are inputs, not weights"),
        (["--merge_adapter", "true", "--lora", "true", "--do_train", "false"], "'zokernel merge' merges a saved"),
    ):
        assert main(["finetune", *flags, *wrong]) == 2
        assert message in capsys.readouterr().err
    base = AutoModelForCausalLM.from_pretrained(tiny_lm_path)
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "prompt")
    for model, message in (
        (tmp_path / "prompt", "Virtual tokens are inputs"),
        (tiny_lm_path, "holds no adapter"),
        (tmp_path / "nothing", "no model folder"),
    ):
        assert main(["merge", "--model", str(model), "--output_dir", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
