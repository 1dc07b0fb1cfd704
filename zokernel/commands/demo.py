"""``zokernel demo``: the main job with settings that suit a laptop; any flag of ``finetune`` overrides them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zokernel.commands import finetune as command

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "smollm2",
    "dataset_name": "movie-reviews",
    "task": "movie-reviews",
    "output_dir": "runs/demo",
    "method": "mezo",
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 4,
    "max_train_samples": 1200,
    "max_eval_samples": 200,
    "max_test_samples": 1000,
    "max_steps": 300,
    "eval_steps": 100,
}


def run(argv: Sequence[str]) -> int:
    """Run the demo and return the exit code."""
    return command.run(argv, defaults=DEFAULTS, name="demo")
