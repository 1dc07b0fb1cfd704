"""Runs killed with SIGKILL, at random instants and in the middle of writing: all end as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time

import killing
import pytest

from zokernel.journal import Journal

KILLS = 6
RUNS = {
    "mezo, journal only, cosine schedule": [
        *("--method", "mezo", "--save_strategy", "journal", "--lr_scheduler_type", "cosine"),
        *("--perturb", "in_place:grid"),
        *("--weight_decay", "0.1", "--momentum", "0.0"),
    ],
    "kerzoo with averaging, best checkpoints": [
        *("--method", "kerzoo", "--num_perturbations", "2", "--save_strategy", "best"),
        *("--method_args", "averaging=journal", "kernel_order=3"),
    ],
    "hizoo, checkpoints every 7 steps": ["--method", "hizoo", "--save_strategy", "steps", "--save_steps", "7"],
    "adam on an adapter, journal only": [
        *("--method", "zo_adam", "--save_strategy", "journal", "--lora", "true", "--gradient_accumulation_steps", "2"),
    ],
    "adamw, checkpoints every 7 steps": ["--method", "adamw", "--save_strategy", "steps", "--save_steps", "7"],
}


def without_times(row):
    return {k: v for k, v in row.items() if "time" not in k and "second" not in k}


def outcome(folder):
    """Everything that a run leaves behind and that does not depend on how long it took."""
    tensors = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    metrics = json.loads((folder / "metrics.json").read_text())
    states = {
        path.parent.name: [without_times(row) for row in json.loads(path.read_text())["log_history"]]
        for path in folder.glob("checkpoint-*/trainer_state.json")
    }
    journal = folder / "journal.zkj"
    steps = Journal.read(journal).steps if journal.exists() else []
    return {
        **tensors,
        "journal": steps,
        "rows": [without_times(row) for row in rows],
        "logs": states,
        "metrics": [metrics[key] for key in ("after", "steps", "best_step", "forwards", "evaluations")],
    }


@pytest.mark.parametrize("name", RUNS)
def test_thirty_kills_leave_no_trace(name, tiny_lm_path, tiny_reviews_path, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    # 64 examples in batches of 8: 26 steps reach into the fourth epoch.
    argv = [
        *("finetune", "--model_name_or_path", str(tiny_lm_path)),
        *("--train_file", str(tiny_reviews_path / "train.jsonl")),
        *("--validation_file", str(tiny_reviews_path / "validation.jsonl")),
        *("--label_words", "bad", "good", "--precision", "fp32", "--per_device_train_batch_size", "8"),
        *("--max_steps", "26", "--learning_rate", "2e-3", "--eval_steps", "7", "--logging_steps", "5"),
        *RUNS[name],
    ]
    log = tmp_path / "log"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.perf_counter()
    process = killing.start([*argv, "--output_dir", str(whole)], log)
    process.join()
    duration = time.perf_counter() - started
    assert process.exitcode == 0, log.read_text()
    expected = outcome(whole)
    instants = random.Random(name)
    kills = 0
    while True:
        last = kills == KILLS
        at_write = instants.randrange(1, 60) if kills % 2 and not last else None
        process = killing.start([*argv, "--output_dir", str(killed)], log, die_at_write=at_write)
        if not last and at_write is None:
            process.join(instants.uniform(0, duration))
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            continue
        assert process.exitcode == 0, log.read_text()
        actual = outcome(killed)
        assert [key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key)] == []
        assert not list(killed.glob(".partial-*")) + list(killed.glob("*.bin")) + list(killed.rglob("*.pt"))
        if last:
            break
        shutil.rmtree(killed)  # it finished before its kill
