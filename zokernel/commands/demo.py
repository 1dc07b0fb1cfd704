"""Fine-tune SmolLM2 on movie reviews, on a laptop; flags of ``zokernel finetune`` override its settings.

zokernel demo
zokernel demo --max_steps 50 --output_dir runs/short
"""

from __future__ import annotations

import argparse
from typing import Any

from zokernel.commands import finetune

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
    "max_test_samples": 3000,
    "max_steps": 300,
    "eval_steps": 100,
}

main = finetune.main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel finetune`` with the demo's defaults."""
    finetune.add_arguments(parser)
    parser.set_defaults(**DEFAULTS)
