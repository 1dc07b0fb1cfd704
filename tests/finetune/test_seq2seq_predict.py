"""A finished run of a sequence-to-sequence model answers rows as it scored its own, after a move, as an adapter too."""

from __future__ import annotations

import json

import pytest
import torch
from models import SEQ2SEQ, save_model

from zokernel.cli import main
from zokernel.data import load_table
from zokernel.files import read_json
from zokernel.finetune import load_predictor

LAST = ["--load_best_model_at_end", "false", "--eval_strategy", "no", "--save_strategy", "journal", "--max_steps", "2"]


@pytest.fixture(scope="module", params=SEQ2SEQ)
def model_path(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


def finetune(model_path, files, folder, *flags):
    command = ["finetune", "--model_name_or_path", str(model_path), "--precision", "fp32", "--learning_rate", "1e-3"]
    assert main([*command, *LAST, *files, "--output_dir", str(folder), *flags]) == 0
    return read_json(folder / "metrics.json")


@pytest.mark.parametrize("extra", [(), ("--lora", "true"), ("--num_demonstrations", "2", "--calibrate", "true")])
def test_predictions_have_the_accuracy_and_loss_of_the_run(extra, model_path, tiny_reviews_path, tmp_path):
    rows = load_table(tiny_reviews_path / "test.jsonl")
    files = [f for split in ("train", "test") for f in (f"--{split}_file", str(tiny_reviews_path / f"{split}.jsonl"))]
    words = ("--template", "{sentence} It was", "--label_words", "bad", "good")
    metrics = finetune(model_path, files, tmp_path / "run", *words, *extra)
    (tmp_path / "run").rename(tmp_path / "moved")
    answers = load_predictor(tmp_path / "moved")(rows, batch_size=5)
    right = [answer["prediction"] == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) / len(rows) == pytest.approx(metrics["after"]["accuracy"], abs=1e-6)
    if "--calibrate" not in extra:  # which changes what is predicted, and not the loss
        shares = torch.tensor([answer["scores"][str(row["label"])] for answer, row in zip(answers, rows, strict=True)])
        assert -shares.log().mean().item() == pytest.approx(metrics["after"]["loss"], abs=1e-5)


def test_written_answers_are_those_that_the_run_scored(model_path, tmp_path):
    rows = [{"q": f"{n} and {n}", "a": ["Rome", "Oslo"][n % 2]} for n in range(12)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text("template: '{q} Where?'\nlabel_column: a\n")
    files = [f for split in ("train", "test") for f in (f"--{split}_file", str(tmp_path / f"{split}.jsonl"))]
    task = ("--task_file", str(tmp_path / "task.yaml"), "--max_new_tokens", "6")
    metrics = finetune(model_path, files, tmp_path / "run", *task)
    answers = load_predictor(tmp_path / "run")([{"q": row["q"]} for row in rows])
    from zokernel.finetune.tasks.metrics import exact_match, token_f1

    pairs = [(answer["prediction"], [row["a"]]) for answer, row in zip(answers, rows, strict=True)]
    assert sum(token_f1(*pair) for pair in pairs) / len(rows) == pytest.approx(metrics["after"]["f1"], abs=1e-6)
    assert sum(exact_match(*pair) for pair in pairs) / len(rows) == pytest.approx(metrics["after"]["em"], abs=1e-6)
