"""Whole runs of sequence-to-sequence models on chats, instructions and completions, with all that comes after them."""

from __future__ import annotations

import json

import pytest
import torch
from chats import turns
from interrupted import ctrl_c_in
from models import SEQ2SEQ, save_model
from safetensors.torch import load_file

from zokernel.cli import main
from zokernel.finetune import load_predictor

ANSWER = "good good"
ROWS = {
    "completion.jsonl": [{"prompt": f"film {n}", "completion": ANSWER} for n in range(30)],
    "chat.jsonl": [{"messages": turns(f"film {n}", ANSWER, system="Judge.")} for n in range(30)],
    "shared.jsonl": [
        {"conversations": [{"from": "human", "value": f"film {n}"}, {"from": "gpt", "value": ANSWER}]}
        for n in range(30)
    ],
    "alpaca.json": [{"instruction": "Judge.", "input": f"film {n}", "output": ANSWER} for n in range(30)],
    "plain.txt": [f"film {n} was good" for n in range(30)],
}


@pytest.fixture(scope="module", params=SEQ2SEQ)
def model_path(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def run(model_path, tmp_path, monkeypatch):
    """A function that trains on rows and returns the exit code."""
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))

    def train(name, *extra, out="run"):
        rows, path = ROWS[name], tmp_path / name
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        path.write_text("\n".join(rows) if name.endswith(".txt") else text)
        flags = ["--model_name_or_path", str(model_path), "--train_file", str(path), "--precision", "fp32"]
        flags += ["--max_steps", "12", "--learning_rate", "3e-3", "--eval_steps", "6", "--max_new_tokens", "4"]
        flags += ["--per_device_train_batch_size", "4", "--num_perturbations", "4", "--report_to", "none"]
        return main(["finetune", *flags, "--output_dir", str(tmp_path / out), *extra])

    return train


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("name", ["completion.jsonl", "shared.jsonl"])
def test_the_loss_on_held_out_rows_falls_and_everything_is_written(run, tmp_path, name):
    assert run(name) == 0
    metrics = metrics_of(tmp_path / "run")
    before, after = metrics["before"], metrics["after"]
    assert after["loss"] < before["loss"] - 0.05
    for scores in (before, after):
        assert scores["perplexity"] == pytest.approx(torch.tensor(scores["loss"]).exp().item(), rel=1e-4)
    assert [sample["answer"] for sample in metrics["samples"]] == [ANSWER] * 3
    assert all("film" in sample["prompt"] for sample in metrics["samples"])
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"from {before['perplexity']:.3f} to {after['perplexity']:.3f}" in report
    assert report.count("Before training:") == 3
    card = (tmp_path / "run" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card
    assert "The encoder reads" in card
    # The run's last samples are what the moved folder answers.
    (tmp_path / "run").rename(tmp_path / "moved")
    held_out = [row for row in ROWS[name] if metrics["samples"][0]["prompt"].endswith(_question_of(row))]
    answers = load_predictor(tmp_path / "moved")(held_out[:1])
    assert answers[0]["prediction"] == metrics["samples"][0]["after"]


def _question_of(row):
    messages = row.get("messages") or row.get("conversations") or [{}]
    texts = [row.get("prompt"), row.get("input"), *(m.get("value") or m.get("content") for m in messages)]
    return next(text for text in texts if text and text.startswith("film"))


def test_predict_takes_rows_and_texts(run, tmp_path, capsys):
    assert run("chat.jsonl", "--max_steps", "1") == 0
    questions = tmp_path / "asked.jsonl"
    questions.write_text(json.dumps({"messages": turns("film 3")}) + "\n")
    out = tmp_path / "answers.jsonl"
    assert main(["predict", "--model", str(tmp_path / "run"), "--file", str(questions), "--output_file", str(out)]) == 0
    (answer,) = map(json.loads, out.read_text().splitlines())
    assert answer["prediction"] == load_predictor(tmp_path / "run")(["film 3"])[0]["prediction"]
    several = tmp_path / "several.jsonl"
    several.write_text(json.dumps({"messages": turns("film 3", "good", "and?")}) + "\n")
    capsys.readouterr()
    assert main(["predict", "--model", str(tmp_path / "run"), "--file", str(several)]) == 2
    assert "Row 1: A chat of several turns" in capsys.readouterr().err


def test_an_adapter_is_stacked_and_in_forward_as_in_place(run, tmp_path):
    losses = {}
    for perturb in ("in_place:copy", "stacked", "in_forward"):
        flags = ("--lora", "true", "--perturb", perturb, "--learning_rate", "3e-2", "--max_steps", "4")
        assert run("alpaca.json", *flags, out=perturb[:8]) == 0
        metrics = metrics_of(tmp_path / perturb[:8])
        assert metrics["saved"] == "adapter"
        assert metrics["after"]["loss"] < metrics["before"]["loss"]
        losses[perturb] = metrics["after"]["loss"]
    assert losses["stacked"] == pytest.approx(losses["in_place:copy"], rel=1e-4)
    assert losses["in_forward"] == pytest.approx(losses["in_place:copy"], rel=1e-4)
    assert load_predictor(tmp_path / "stacked")(["film 3"])[0]["prediction"] is not None


def test_all_weights_train_in_forward_and_are_not_stacked(run, tmp_path, capsys):
    assert run("alpaca.json", "--perturb", "in_forward", "--max_steps", "4", out="forward") == 0
    assert run("alpaca.json", "--perturb", "in_place:copy", "--max_steps", "4", out="place") == 0
    in_forward, in_place = (metrics_of(tmp_path / out)["after"]["loss"] for out in ("forward", "place"))
    assert in_forward == pytest.approx(in_place, rel=1e-4)
    capsys.readouterr()
    assert run("alpaca.json", "--perturb", "stacked", out="stacked") == 2
    assert "cannot be stacked while its embeddings are trained" in capsys.readouterr().err


def test_examples_have_their_own_directions_with_an_adapter_only(run, tmp_path, capsys):
    grzo = ("--method", "grzo", "--method_args", "whiten=false", "--num_perturbations", "1", "--max_steps", "4")
    assert run("alpaca.json", *grzo, "--lora", "true", "--learning_rate", "3e-2") == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    capsys.readouterr()
    assert run("alpaca.json", *grzo, out="all") == 2
    assert "directions of their own: train an adapter" in capsys.readouterr().err


def test_a_killed_run_ends_with_the_same_bits_and_the_journal_rebuilds_them(run, model_path, tmp_path, monkeypatch):
    plan = ("--save_strategy", "journal", "--load_best_model_at_end", "false", "--max_steps", "6")
    assert run("chat.jsonl", *plan, out="whole") == 0
    with ctrl_c_in(monkeypatch, step=4):
        assert run("chat.jsonl", *plan, out="cut") == 130
    assert run("chat.jsonl", *plan, out="cut") == 0
    flags = ["--base", str(model_path), "--journal", str(tmp_path / "whole"), "--output_dir", str(tmp_path / "again")]
    assert main(["replay", *flags]) == 0
    whole, cut, rebuilt = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "cut", "again"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert all(torch.equal(whole[name], rebuilt[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "flags", "match"),
    [
        ("plain.txt", (), "Plain text trains causal language models"),
        ("alpaca.json", ("--packing", "true"), "--packing puts several texts into one row"),
        (
            "completion.jsonl",
            ("--objective", "reward", "--reward_function", "json"),
            "--objective reward needs a causal",
        ),
        ("completion.jsonl", ("--objective", "accuracy"), "--objective accuracy needs answers"),
    ],
)
def test_what_does_not_fit_is_one_sentence(run, capsys, name, flags, match):
    assert run(name, *flags) == 2
    error = capsys.readouterr().err
    assert match in error
    assert "Traceback" not in error
