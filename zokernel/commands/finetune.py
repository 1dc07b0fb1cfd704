"""``zokernel finetune``: parse the flags, run the job, print the table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import transformers

from zokernel.errors import UsageError
from zokernel.finetune.job import Interrupted, finetune
from zokernel.finetune.report.report import table
from zokernel.finetune.settings.arguments import parse
from zokernel.finetune.trainer.elastic import leave

logger = logging.getLogger(__name__)


def run(argv: Sequence[str], *, defaults: dict[str, Any] | None = None, name: str = "finetune") -> int:
    """Run ``zokernel finetune`` (or ``demo``, with its own defaults) on ``argv`` and return the exit code."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights; the training bar is ours
    model_arguments, data_arguments, config = parse(argv, defaults)
    if config.output_dir is None:
        raise UsageError("Say where the result goes: --output_dir runs/NAME.")
    try:
        metrics = finetune(model_arguments, data_arguments, config, command=[name, *argv])
    except Interrupted as stop:
        logger.warning("%s", stop)
        return 130
    leave()
    print(f"\n{table(metrics)}")
    trained = f", loss.png, README.md and the {metrics['saved']}" if metrics["steps"] else ""
    print(f"\nSaved in {config.output_dir}: report.md, metrics.json{trained}.")
    return 0
