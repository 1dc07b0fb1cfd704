"""Fine-tune a language model with forward passes only, score it before and after, and save the result.

zokernel finetune --train_file train.tsv --label_words terrible great --output_dir runs/mine
zokernel finetune --config mezo-opt-sst2 --output_dir runs/sst2

The flags of transformers' TrainingArguments work here, too.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path

from zokernel.commands.messages import is_replica, quiet_transformers
from zokernel.commands.parser import add_dataclasses, read_dataclasses
from zokernel.errors import UsageError
from zokernel.finetune.job import finetune
from zokernel.finetune.report.run_report import table
from zokernel.finetune.run import Interrupted
from zokernel.finetune.run_files import METRICS_FILE
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.elastic import leave

logger = logging.getLogger(__name__)

GROUPS = (ModelArguments, DataArguments, ZOConfig)
SAVED_FILES = ("report.md", METRICS_FILE, "loss.png", "README.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel finetune``."""
    add_dataclasses(parser, *GROUPS)


def main(args: argparse.Namespace) -> int:
    """Run the job and print its table."""
    quiet_transformers()
    if not args.output_dir:  # transformers would take trainer_output/
        raise UsageError("Say where the results go: --output_dir runs/NAME.")
    model_arguments, data_arguments, config = read_dataclasses(args, *GROUPS)
    command = shlex.split(args.command_line)[1:]
    try:
        metrics = finetune(model_arguments, data_arguments, config, command=command)
    except Interrupted as stop:
        logger.warning("%s", stop)
        return 130
    leave()
    if is_replica():
        return 0
    print(f"\n{table(metrics)}")
    names = [name for name in SAVED_FILES if (Path(str(config.output_dir)) / name).is_file()]
    trained = f" and the {metrics['saved']}" if metrics["steps"] else ""
    print(f"\nSaved in {config.output_dir}: {', '.join(names)}{trained}.")
    return 0
