"""Two processes train on rewards: the run of one, whether they share the members or the prompts of a step."""

from __future__ import annotations

import json
import os

import pytest
import torch
from ranks import environment, free_port, spawn
from test_reward_runs import same, without

from zokernel.cli import main
from zokernel.journal import Journal

MODES = {"perturbation": "4", "data": "2"}  # and the prompts per process


@pytest.fixture
def words(reward_flags, tmp_path):
    flags = without(reward_flags, "--reward_function", "--max_steps", "--per_device_train_batch_size", "--output_dir")
    flags += ["--reward_function", f"{tmp_path}/judge.py:high", "--max_steps", "3"]
    flags += ["--num_generations", "2", "--temperature", "1.0", "--lora", "true", "--train_sampling_strategy", "random"]
    return [*flags, "--save_strategy", "journal", "--load_best_model_at_end", "false"]


def run_rank(rank, port, words, mode, folder):
    torch.set_num_threads(1)
    os.environ.update(environment(rank, 2, port))
    options = ["--zo_parallel", mode, "--per_device_train_batch_size", MODES[mode], "--output_dir", str(folder / mode)]
    os._exit(main(["finetune", *words, *options]))  # which has ended the process group itself


def test_two_processes_are_one(words, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["finetune", *words, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "one")]) == 0
    torch.set_num_threads(threads)
    for mode in MODES:
        spawn(run_rank, free_port(), words, mode, tmp_path, size=2)
    single = [step.losses for step in Journal.read(tmp_path / "one").steps]
    expected = json.loads((tmp_path / "one" / "metrics.json").read_text())
    for mode in MODES:
        for actual, losses in zip((step.losses for step in Journal.read(tmp_path / mode).steps), single, strict=True):
            assert actual == (losses if mode == "perturbation" else pytest.approx(losses, rel=1e-6))
        metrics = json.loads((tmp_path / mode / "metrics.json").read_text())
        assert metrics["before"] == pytest.approx(expected["before"], rel=1e-6)
        assert metrics["after"] == pytest.approx(expected["after"], rel=1e-5)
    assert same(tmp_path / "perturbation", tmp_path / "one", "adapter_model.safetensors")
