"""The three splits of a run: read, checked and drawn before any model is loaded."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

from zokernel.data import load_rows, load_table
from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.arguments import DataArguments
from zokernel.finetune.tasks import PromptTask, get_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose the best step by, and to report."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    test_is_validation: bool = False


def load_task(arguments: DataArguments) -> PromptTask:
    """Return the task that the flags describe."""
    return get_task(
        arguments.task,
        template=arguments.template,
        label_words=arguments.label_words,
        labels=arguments.labels,
        label_column=arguments.label_column,
    )


def load_splits(arguments: DataArguments, task: PromptTask, *, seed: int) -> Splits:
    """Read the splits, check their columns and labels, and draw as many examples as asked for.

    A split that is not given is taken from another: validation is held out from the training rows, and test falls back
    to validation (which then also chose the checkpoint; the log says so).

    Args:
        arguments: Where the data are, and how much of them to use.
        task: The columns and labels to check.
        seed: Seed of the draw.

    Returns:
        The splits.

    Raises:
        UsageError: If no data are named, or a file, column or label is wrong.
    """
    if bool(arguments.dataset_name) == bool(arguments.train_file):
        raise UsageError("Name the data with either --dataset_name or --train_file (one of them, not both).")
    if arguments.dataset_name:
        parts = {
            split: load_rows(arguments.dataset_name, split, config=arguments.dataset_config)
            for split in ("train", "validation")
        }
        try:
            parts["test"] = load_rows(arguments.dataset_name, "test", config=arguments.dataset_config)
            # Public benchmarks hide their test labels as -1.
            if str(parts["test"][0].get(task.label_column)) == "-1":
                del parts["test"]
        except UsageError:
            logger.info("%s has no labelled test split.", arguments.dataset_name)
    else:
        files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
        parts = {split: load_table(path, column_names=arguments.column_names) for split, path in files.items() if path}
    for split, rows in parts.items():
        task.check_columns(rows, where=f"The {split} split")
        for row in rows:
            task.label(row)
    generator = random.Random(seed)
    parts = {split: generator.sample(rows, len(rows)) for split, rows in parts.items()}
    limits = {
        "train": arguments.max_train_samples,
        "validation": arguments.max_eval_samples,
        "test": arguments.max_test_samples,
    }
    if "validation" not in parts:
        fifth, wanted = len(parts["train"]) // 5, limits["validation"]
        held_out = min(wanted, fifth) if wanted is not None and wanted >= 0 else fifth
        if held_out == 0:
            raise UsageError("There are too few training examples to hold some out: give --validation_file.")
        parts["validation"], parts["train"] = parts["train"][:held_out], parts["train"][held_out:]
        logger.info("Validation: %d examples held out from the training examples.", held_out)
    drawn = {split: rows[: limits[split]] if _limited(limits[split]) else rows for split, rows in parts.items()}
    if "test" not in drawn:
        drawn["test"] = parts["validation"][: limits["test"]] if _limited(limits["test"]) else parts["validation"]
        logger.info("Test: the validation examples (no test split was given; they also choose the best checkpoint).")
    return Splits(drawn["train"], drawn["validation"], drawn["test"], test_is_validation="test" not in parts)


def _limited(limit: int | None) -> bool:
    return limit is not None and limit >= 0
