"""The examples run: every way of use, with tiny models in place of real ones."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_model

from zokernel.journal import Journal

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def reviews(tiny_reviews_path):
    """A data-set folder as ``datasets.load_dataset`` takes it."""
    return str(tiny_reviews_path)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_every_example_is_tested():
    tested = {
        *("accuracy_objective", "any_trainer", "image_classifier", "lora", "masked_lm"),
        *("onnx_engine", "pytorch_loop", "rewards", "trainer_api", "trl_trainers", "worker_pool"),
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_any_trainer(tiny_lm_path, reviews, tmp_path):
    metrics = load("any_trainer")(str(tiny_lm_path), reviews, 4, str(tmp_path / "run"))
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("job", ["sft", "dpo", "kto", "reward"])
def test_trl_trainers(job, tiny_lm_path, tmp_path):
    pytest.importorskip("trl")
    rows = [{"prompt": f"It was {n} ", "chosen": "good", "rejected": "bad"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = load("trl_trainers")(job, str(tmp_path / "rows.jsonl"), str(tiny_lm_path), 2, str(tmp_path / "run"))
    assert losses[0] != losses[1]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_image_classifier(tmp_path, monkeypatch):
    """The head learns from nothing, is all that moves, and is saved so that it needs nothing else."""
    import numpy as np
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    generator = np.random.default_rng(0)
    labels = np.tile(np.arange(10, dtype=np.uint8), 60)
    images = generator.normal(0, 20, (600, 28, 28)).astype(np.float32)
    images[np.arange(600), labels * 2 + 2] += 25  # a line, in a row of its own for each class
    main = load("image_classifier")
    held_out = images[500:], labels[500:]
    monkeypatch.setitem(main.__globals__, "load_mnist", lambda: (images[:500], labels[:500], *held_out))
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}
    start = ResNetForImageClassification(ResNetConfig(**sizes))
    start.save_pretrained(tmp_path / "net")
    metrics = main(str(tmp_path / "net"), 60, str(tmp_path / "run"), size=32)
    assert metrics["before"]["eval_loss"] == pytest.approx(math.log(10), rel=1e-6)
    assert metrics["before"]["eval_accuracy"] == pytest.approx(0.1)
    assert metrics["after"]["eval_loss"] < metrics["before"]["eval_loss"] - 0.03

    saved = ResNetForImageClassification.from_pretrained(tmp_path / "run").eval()
    digits = main.__globals__["Digits"](*held_out, 32)
    with torch.no_grad():
        logits = saved(pixel_values=torch.stack([digits[n]["pixel_values"] for n in range(100)])).logits
    targets = torch.tensor([digits[n]["labels"] for n in range(100)])
    assert torch.nn.functional.cross_entropy(logits, targets).item() == pytest.approx(
        metrics["after"]["eval_loss"], rel=1e-4
    )
    accuracy = (logits.argmax(-1) == targets).float().mean().item()
    assert accuracy == pytest.approx(metrics["after"]["eval_accuracy"], abs=1e-6)
    for name, tensor in start.state_dict().items():  # the statistics of batch norm among them
        assert torch.equal(tensor, saved.state_dict()[name]) == (not name.startswith("classifier")), name


def test_trainer_api(tiny_lm_path, reviews, tmp_path):
    metrics = load("trainer_api")(str(tiny_lm_path), reviews, 4, str(tmp_path / "run"))
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_lora(tiny_lm_path, reviews, tmp_path, capsys):
    metrics = load("lora")(str(tiny_lm_path), reviews, 4, str(tmp_path / "run"))
    assert metrics["saved"] == "adapter"
    assert "the adapter has" in capsys.readouterr().out


def test_masked_lm(reviews, tmp_path):
    model = save_model(tmp_path / "roberta", "roberta")
    metrics = load("masked_lm")(str(model), reviews, 4, str(tmp_path / "run"), k_shot=8)
    assert (metrics["language_model"], metrics["num_train"]) == ("masked", 16)


def test_accuracy_objective(tiny_lm_path, reviews, tmp_path):
    metrics = load("accuracy_objective")(str(tiny_lm_path), reviews, 4, str(tmp_path / "run"))
    assert metrics["after"]["loss"] == pytest.approx(1 - metrics["after"]["accuracy"])


def test_worker_pool(tmp_path):
    """One worker of two is killed over a point; another takes its place, and no bit differs from one process."""
    result = load("worker_pool")(2, 6, str(tmp_path))
    assert result["lost"] == [(3, 1)]
    assert (result["started"], result["equal"]) == (3, True)
    assert result["loss"][1] < result["loss"][0]
    assert Journal.read(tmp_path).num_steps == 6


def test_onnx_engine(tiny_lm_path, reviews, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = load("onnx_engine")(str(tiny_lm_path), reviews, 3, 4, str(tmp_path / "run"))
    assert result["gap"] < 1e-4
    assert len(set(result["losses"])) == 3
    assert result["saved"] == pytest.approx(result["last"], abs=1e-4)  # peft loads what the engine trained
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_pytorch_loop():
    assert load("pytorch_loop")(steps=60) > 0.3  # chance is 0.1


def test_the_fine_tuning_page_names_every_task_and_only_real_flags():
    from dataclasses import fields

    from zokernel.finetune import ZOConfig
    from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
    from zokernel.finetune.tasks import TASKS

    page = (EXAMPLES.parent / "docs" / "finetune.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in TASKS)
    flags = {field.name for group in (ModelArguments, DataArguments, ZOConfig) for field in fields(group)}
    flags |= {"config", "help", "help_all"}
    assert set(re.findall(r"--(\w+)", page)) <= flags


def test_own_data(tiny_lm_path, tmp_path):
    with (tmp_path / "tickets.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["subject", "priority"])
        for number in range(40):
            table.writerow([f"ticket {number}", ("low", "normal", "high")[number % 3]])
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"MODEL": str(tiny_lm_path), "STEPS": "4", "OUT": str(tmp_path / "run"), "PATH": binaries}
    script = [str(EXAMPLES / "own_data.sh"), str(tmp_path / "tickets.csv")]
    finished = subprocess.run(script, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["label_words"] == ["routine", "urgent"]


def test_rewards(tmp_path):
    from chats import MARKED, chat_tokenizer
    from models import build

    tokenizer = chat_tokenizer(MARKED)
    tokenizer.save_pretrained(tmp_path / "model")
    build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    metrics = load("rewards")(str(tmp_path / "model"), 2, str(tmp_path / "run"))
    assert metrics["forwards"] == 2 * 8
    assert metrics["before"]["reward"] == 0.0, "random weights write no JSON"
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    score = load("rewards").__globals__["score"]
    texts = ['{"name": "Ada", "age": 1, "town": "x"} and more', ' {"a": 1}', "[1]", "no"]
    assert score([[{"role": "assistant", "content": text}] for text in texts]) == [1.0, 0.5, 0.0, 0.0]
