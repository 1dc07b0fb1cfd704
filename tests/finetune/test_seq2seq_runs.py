"""The command line with sequence-to-sequence models: every kind of task, every way to perturb, kill and resume."""

from __future__ import annotations

import json

import pytest
import torch
from models import SEQ2SEQ, save_model
from safetensors.torch import load_file

from zokernel.cli import main
from zokernel.files import read_json


@pytest.fixture(scope="module", params=SEQ2SEQ)
def model_path(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def command(model_path, flags, tmp_path):
    """A function that returns the command of a run with flags of one's own."""

    def words_of(*words, name="run"):
        shared = [*flags, "--model_name_or_path", str(model_path), "--output_dir", str(tmp_path / name)]
        if "--task_file" in words:
            index = shared.index("--label_words")
            del shared[index : index + 3]
        return ["finetune", *shared, "--report_to", "none", "--max_steps", "2", *words]

    return words_of


@pytest.fixture
def run(command, tmp_path):
    """Run with flags of one's own and return what ``metrics.json`` holds."""

    def finetune(*words, name="run"):
        assert main(command(*words, name=name)) == 0
        return read_json(tmp_path / name / "metrics.json")

    return finetune


def test_classification_with_demonstrations_and_calibration(run, model_path, tmp_path):
    metrics = run("--num_demonstrations", "2", "--calibrate", "true", "--template", "{sentence} It was")
    assert metrics["language_model"] == "seq2seq"
    assert 0 <= metrics["after"]["accuracy"] <= 1
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSeq2SeqLM" in card
    assert "text2text-generation" in card
    from transformers import AutoModelForSeq2SeqLM

    trained = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").state_dict()
    start = AutoModelForSeq2SeqLM.from_pretrained(model_path).state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in start)


@pytest.mark.parametrize("objective", ["accuracy", "f1"])
def test_metrics_are_descended(run, objective):
    metrics = run("--objective", objective)
    assert metrics["after"]["loss"] == pytest.approx(1 - metrics["after"][objective])


def test_lora_is_stacked_and_in_forward_as_in_place(run):
    losses = {}
    for perturb in ("in_place:copy", "stacked", "in_forward"):
        metrics = run("--lora", "true", "--perturb", perturb, "--learning_rate", "1e-2", name=perturb[:8])
        assert metrics["saved"] == "adapter"
        losses[perturb] = metrics["after"]["loss"]
    assert losses["in_place:copy"] != metrics["before"]["loss"]
    assert losses["stacked"] == pytest.approx(losses["in_place:copy"], rel=1e-5)
    assert losses["in_forward"] == pytest.approx(losses["in_place:copy"], rel=1e-5)


def test_answers_are_written_and_scored(run, tmp_path):
    rows = [{"q": f"{n} and {n}", "a": ["Rome", "Oslo"][n % 2]} for n in range(12)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "task.yaml").write_text("template: '{q} Where?'\nlabel_column: a\n", encoding="utf-8")
    files = ("--train_file", str(tmp_path / "train.jsonl"), "--test_file", str(tmp_path / "test.jsonl"))
    metrics = run(*files, "--validation_file", str(tmp_path / "test.jsonl"), "--task_file", str(tmp_path / "task.yaml"))
    assert set(metrics["after"]) == {"loss", "f1", "em"}


def test_a_stopped_run_continues_to_the_same_bits(run, tmp_path):
    steps = ("--max_steps", "4", "--save_steps", "2", "--eval_steps", "2")
    run(*steps, name="whole")
    run("--max_steps", "2", "--save_steps", "2", "--eval_steps", "2", name="parts")
    run(*steps, "--resume_from_checkpoint", "last", name="parts")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_full_parameters_are_not_stacked(command, capfd):
    assert main(command("--perturb", "stacked")) == 2
    assert "cannot be stacked while its embeddings are trained" in capfd.readouterr().err


@torch.no_grad()
def test_a_plan_takes_the_losses_of_the_run(model_path, tiny_reviews_path):
    """The scores that a plan probes are those of the decoder, which begins as in training."""
    from zokernel.commands.plan import PlanArguments, load_task
    from zokernel.finetune.settings.arguments import DataArguments, ModelArguments

    data = DataArguments(
        train_file=str(tiny_reviews_path / "train.jsonl"),
        validation_file=str(tiny_reviews_path / "test.jsonl"),
        template="{sentence} It was",
        label_words=["bad", "good"],
    )
    arguments = PlanArguments(update_examples=4, observe_examples=2, precision="fp32")
    task, exact = load_task(ModelArguments(model_name_or_path=str(model_path)), data, arguments)
    assert "decoder_input_ids" in exact.batch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(model_path, dtype=torch.float32).eval()
    batch = exact.batch  # a row of the decoder per option
    sources = {name: batch[name].repeat_interleave(2, 0) for name in ("input_ids", "attention_mask")}
    logits = model(**sources, decoder_input_ids=batch["decoder_input_ids"]).logits
    expected = []
    for row, positions, targets in zip(logits, batch["positions"], batch["targets"], strict=True):
        real = targets >= 0
        expected.append(row[positions[real]].log_softmax(-1).gather(1, targets[real][:, None]).mean())
    words = torch.stack(expected).view(6, 2)
    for scored in (task, exact):
        torch.testing.assert_close(scored.score(scored.batch), words, rtol=1e-5, atol=1e-5)
