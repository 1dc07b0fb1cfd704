"""What people expect around training: a batch that fits, early stopping, evaluation alone, demonstrations, reports."""

from __future__ import annotations

import json

import pytest
import torch
import trainers
from transformers import TrainerCallback

from zokernel.cli import main
from zokernel.errors import RunError


@pytest.fixture
def make_trainer(tiny_lm_path, tiny_reviews_path, tmp_path):
    """A function that builds a trainer on a fresh model."""

    def make(name, **settings):
        parts = trainers.load_parts(tiny_lm_path, tiny_reviews_path)
        return trainers.make_trainer(
            parts, tmp_path / name, **{"max_steps": 3, "per_device_train_batch_size": 16, "seed": 42, **settings}
        )

    return make


def out_of_memory_above(model, rows):
    """Raise what CUDA raises when a forward has more than ``rows`` rows."""

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > rows:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model.register_forward_pre_hook(refuse, with_kwargs=True)


def test_a_batch_that_does_not_fit_is_split_and_the_steps_stay_the_same(make_trainer, caplog):
    automatic = make_trainer("found", auto_find_batch_size=True)
    out_of_memory_above(automatic.model, 5)
    with caplog.at_level("INFO"):
        automatic.train()
    assert "split into 4 of 4" in caplog.text
    assert (automatic.args.per_device_train_batch_size, automatic.args.gradient_accumulation_steps) == (4, 4)
    explicit = make_trainer("told", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    explicit.train()
    for (name, w), other in zip(automatic.model.named_parameters(), explicit.model.parameters(), strict=True):
        assert torch.equal(w, other), name


def test_a_batch_that_fits_is_left_alone_and_a_model_that_does_not_is_named(make_trainer):
    fits = make_trainer("fits", auto_find_batch_size=True)
    fits.train()
    assert (fits.args.per_device_train_batch_size, fits.args.gradient_accumulation_steps) == (16, 1)
    hopeless = make_trainer("hopeless", auto_find_batch_size=True)
    out_of_memory_above(hopeless.model, 0)
    with pytest.raises(RunError, match="Not even one example fits"):
        hopeless.train()


def test_training_stops_early_when_evaluations_stop_improving(make_trainer):
    # A step so large that the loss never falls below that of the first evaluation.
    trainer = make_trainer(
        "early",
        max_steps=40,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        load_best_model_at_end=True,
        early_stopping_patience=3,
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = losses.index(min(losses))
    assert trainer.state.global_step < 40
    assert len(losses) == best + 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_what_reporting_integrations_are_given(make_trainer):
    """TensorBoard, W&B and trackio are callbacks of the Trainer: they see what any callback sees."""
    events = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            events.append((state.global_step, dict(logs)))

    trainer = make_trainer("watched", max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4)
    trainer.add_callback(Watch())
    trainer.train()
    training = [(step, logs) for step, logs in events if "loss" in logs]
    assert [step for step, _ in training] == [2, 4]
    assert {"loss", "learning_rate", "projected_gradient", "forwards"} <= set(training[0][1])
    assert any({"eval_loss", "eval_accuracy"} <= set(logs) for _, logs in events)


@pytest.fixture
def flags(tiny_lm_path, tiny_reviews_path, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    files = [
        word
        for split in ("train", "validation", "test")
        for word in (f"--{split}_file", str(tiny_reviews_path / f"{split}.jsonl"))
    ]
    model = ["--model_name_or_path", str(tiny_lm_path), "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    return ["finetune", *model, *files, "--label_words", "bad", "good", "--max_steps", "2", "--precision", "fp32"]


def test_evaluation_alone_trains_and_saves_nothing(flags, tmp_path, capsys):
    assert main([*flags, "--do_train", "false", "--num_demonstrations", "4"]) == 0
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == metrics["forwards"] == 0
    assert metrics["before"] == metrics["after"]
    assert (metrics["num_demonstrations"], metrics["num_train"]) == (4, 60)
    assert "4-shot in-context accuracy" in capsys.readouterr().out
    assert "Nothing was trained" in (folder / "report.md").read_text()
    assert not list(folder.glob("*.safetensors"))


def test_the_model_card_has_the_runs_facts(flags, tmp_path, tiny_lm_path, monkeypatch):
    import yaml

    assert main([*flags, "--eps", "2e-3", "--calibrate", "true"]) == 0
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert "base_model" not in facts  # a folder of this machine
    assert f"# {tiny_lm_path.name} fine-tuned with mezo" in body
    assert facts["library_name"] == "transformers"
    assert "mezo" in facts["tags"]
    assert f"{100 * metrics['after']['accuracy']:.1f} %" in body
    assert "eps=0.002" in body
    assert "zokernel finetune" in body
    monkeypatch.chdir(folder)
    for part in body.split("```python\n")[1:]:
        exec(part.split("```")[0], {})  # the lines that answer a row, and those that load the model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--objective", "bleu"], "objective must be one of cross_entropy, accuracy, f1"),
        (["--objective", "accuracy", "--method", "adamw"], "has no gradient for adamw"),
        (["--early_stopping_patience", "2", "--eval_strategy", "no"], "counts evaluations"),
        (["--report_to", "trackio"], "needs trackio, which is not installed: pip install trackio"),
        (["--report_to", "comet_ml"], "needs comet-ml, which is not installed: pip install comet-ml"),
        (["--report_to", "flyte"], "needs flytekit, which is not installed: pip install flytekit"),
        (["--hub_strategy", "checkpoint"], "--hub_strategy checkpoint uploads checkpoints, which stay here"),
        (["--hub_always_push", "true"], "--hub_always_push has no effect"),
        (["--include_for_metrics", "loss"], "include_for_metrics=['loss'] cannot be honoured here"),
        (["--protocol", "mezo"], "protocol must be one of mezo-opt, mezo-roberta"),
        (["--num_demonstrations", "64"], "64 demonstrations would leave none of 64 training examples to train on"),
        (["--lm_type", "masked"], "no masked language model of type 'llama'"),
        (["--max_length", "1"], "raise --max_length"),
        (["--template", "{sentence} is {mask}"], "needs a masked language model"),
        (["--task_file", "missing.yaml"], "no task file missing.yaml"),
        (["--prefix_tuning", "true", "--lora", "true"], "One adapter is trained at a time"),
    ],
)
def test_mistakes_are_one_sentence(flags, changes, words, capsys, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    assert main([*flags, *changes]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
