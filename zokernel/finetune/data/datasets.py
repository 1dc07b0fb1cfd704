"""The three splits of a run: read, checked and drawn before any model is loaded."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, replace
from typing import Any

from zokernel.data import load_rows, load_table
from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.data.protocol import published_splits
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import PromptTask, Task, get_task, read_task
from zokernel.finetune.tasks.base import Source
from zokernel.finetune.tasks.registry import customize

logger = logging.getLogger(__name__)

DEV_SIZE = 500


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose the best step by, and to report."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    test_is_validation: bool = False


def load_task(arguments: DataArguments) -> Task:
    """Return the task that the flags describe.

    Raises:
        UsageError: If there is no such task, or a part of it is wrong.
    """
    own: dict[str, Any] = {
        "template": arguments.template,
        "label_words": arguments.label_words,
        "labels": arguments.labels,
        "label_column": arguments.label_column,
    }
    if arguments.task_file:
        return customize(read_task(arguments.task_file), **own)
    task = get_task(arguments.task, **own)
    if isinstance(task, PromptTask) and task.source and _uses_source(arguments, task) and not arguments.labels:
        task = replace(task, labels=task.source.labels or task.labels)
    return task


def _uses_source(arguments: DataArguments, task: Task) -> bool:
    if task.source is None or arguments.train_file:
        return False
    return arguments.dataset_name in (None, task.source.dataset) and not arguments.dataset_config


def load_splits(arguments: DataArguments, task: Task, *, seed: int) -> Splits:
    """Read the splits, check their columns and labels, and draw as many examples as asked for.

    A split that is not given is taken from another: validation is held out from the training rows, and test falls back
    to validation (which then also chose the checkpoint; the log says so).  With ``--protocol`` the draw is a published
    one instead: see :func:`published_splits`.

    Args:
        arguments: Where the data are, and how much of them to use.
        task: The columns and labels to check.
        seed: Seed of the draw.

    Returns:
        The splits.

    Raises:
        UsageError: If no data are named, or a file, column or label is wrong.
    """
    parts = read_parts(arguments, task)
    limits = {
        "train": _limit(arguments.max_train_samples),
        "validation": _limit(arguments.max_eval_samples, DEV_SIZE),
        "test": _limit(arguments.max_test_samples),
    }
    if arguments.protocol:
        if arguments.max_eval_samples is None and task.dev_size is not None:
            limits["validation"] = task.dev_size
        drawn = published_splits(
            parts, task, protocol=arguments.protocol, k_shot=arguments.k_shot, seed=seed, limits=limits
        )
        return Splits(drawn["train"], drawn["validation"], drawn["test"])
    generator = random.Random(seed)
    parts = {split: generator.sample(rows, len(rows)) for split, rows in parts.items()}
    if "validation" not in parts:
        fifth, wanted = len(parts["train"]) // 5, limits["validation"]
        held_out = fifth if wanted is None else min(wanted, fifth)
        if held_out == 0:
            raise UsageError("There are too few training examples to hold some out: give --validation_file.")
        parts["validation"], parts["train"] = parts["train"][:held_out], parts["train"][held_out:]
        logger.info("Validation: %d examples held out from the training examples.", held_out)
    drawn = {split: rows[: limits[split]] for split, rows in parts.items()}
    if "test" not in drawn:
        drawn["test"] = parts["validation"][: limits["test"]]
        logger.info("Test: the validation examples (no test split was given; they also choose the best checkpoint).")
    return Splits(drawn["train"], drawn["validation"], drawn["test"], test_is_validation="test" not in parts)


def read_parts(arguments: DataArguments, task: Task) -> dict[str, list[Row]]:
    """Read the splits that there are, as rows with the task's columns and labels.

    Raises:
        UsageError: If no data are named, or a file, column or label is wrong.
    """
    if arguments.dataset_name and arguments.train_file:
        raise UsageError("Name the data with either --dataset_name or --train_file (one of them, not both).")
    if arguments.train_file:
        files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
        return {
            split: task.read(load_table(path, column_names=arguments.column_names), where=f"The {split} split")
            for split, path in files.items()
            if path
        }
    source = task.source
    if source is None or not _uses_source(arguments, task):
        if not arguments.dataset_name:
            raise UsageError("Name the data with either --dataset_name or --train_file: this task has none of its own.")
        every = {split: split for split in ("train", "validation", "test")}
        source = Source(arguments.dataset_name, arguments.dataset_config, splits=every)
    parts: dict[str, list[Row]] = {}
    for split, name in source.splits.items():
        try:
            rows = load_rows(source.dataset, name, config=source.config, revision=source.revision)
        except UsageError:
            if split == "train":
                raise
            logger.info("%s has no split %r.", source.dataset, name)
            continue
        if split == "test" and task.prepare is None and all(map(_hidden(task), rows)):
            logger.info("%s has no labelled test split.", source.dataset)
            continue
        parts[split] = task.read(rows, where=f"The {split} split")
    return parts


def _hidden(task: Task):
    return lambda row: task.label_column in row and task.unlabelled(row)


def _limit(given: int | None, default: int | None = None) -> int | None:
    """Return how many rows to draw; ``None`` means all."""
    if given is None:
        return default
    return None if given < 0 else given
