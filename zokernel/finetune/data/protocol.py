"""The published splits: 1000/500/1000 of the large-model experiments, and k examples per class of the masked ones.

The sizes and the way of drawing are the published ones; the examples are those of our own seeded permutation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Task
from zokernel.readable import plural

logger = logging.getLogger(__name__)

PROTOCOLS = ("mezo-opt", "mezo-roberta")
SEEDS = (13, 21, 42, 87, 100)  # of the five few-shot draws


def check_protocol(protocol: str) -> None:
    """Refuse a protocol that is not known.

    Raises:
        UsageError: If there is none of this name.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}.")


def published_splits(
    parts: Mapping[str, Sequence[Row]],
    task: Task,
    *,
    protocol: str,
    k_shot: int,
    seed: int,
    limits: Mapping[str, int | None],
) -> dict[str, list[Row]]:
    """Draw training, validation and test examples as the published experiments do.

    Training and validation examples both come from the training rows; test examples from the test rows, or from the
    validation rows of benchmarks whose test labels are hidden.

    ``mezo-opt``: one permutation; its first 1000 + 500 rows are drawn, of which the last 500 (100 for CB and COPA)
    validate.  A small data set leaves fewer to train on: 54 for WSC, unless ``limits`` ask for a smaller validation.
    ``mezo-roberta``: of every class, ``k_shot`` rows to train and as many to validate.

    Args:
        parts: Labelled rows of each split.
        task: Tells the classes apart.
        protocol: ``mezo-opt`` or ``mezo-roberta``.
        k_shot: Examples per class.
        seed: Seed of the draw.
        limits: How many rows each split takes at most (``None``: all).

    Returns:
        The rows of ``train``, ``validation`` and ``test``.

    Raises:
        UsageError: If there is no such protocol, or there are too few rows for it.
    """
    check_protocol(protocol)
    held_out = parts.get("test") or parts.get("validation")
    if not held_out:
        raise UsageError("A published protocol needs test examples: give --test_file or --validation_file.")
    pool = _permuted(parts["train"], seed)
    if protocol == "mezo-opt":
        train, validation = _first_and_last(pool, limits)
    else:
        if seed not in SEEDS:
            logger.info("The published draws have seeds %s; this one has %d.", ", ".join(map(str, SEEDS)), seed)
        train, validation = _by_class(pool, task, k_shot)
    test = _permuted(held_out, seed)[: limits["test"]]
    return {"train": train, "validation": validation, "test": test}


def _permuted(rows: Sequence[Row], seed: int) -> list[Row]:
    return [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]


def _first_and_last(pool: list[Row], limits: Mapping[str, int | None]) -> tuple[list[Row], list[Row]]:
    num_dev = limits["validation"]
    num_train = limits["train"] if limits["train"] is not None else len(pool)
    if num_dev is None or num_dev >= len(pool):
        raise UsageError(
            f"There are {len(pool)} training examples, of which {num_dev or 'all'} are needed for validation: lower "
            "--max_eval_samples."
        )
    drawn = pool[: num_train + num_dev]
    train, validation = drawn[: len(drawn) - num_dev], drawn[len(drawn) - num_dev :]
    if len(train) < num_train:
        logger.info(
            "Only %d of %s remain for training after %d for validation; --max_eval_samples changes that.",
            len(train),
            plural(num_train, "example"),
            num_dev,
        )
    return train, validation


def _by_class(pool: list[Row], task: Task, k_shot: int) -> tuple[list[Row], list[Row]]:
    if not task.fixed_options:
        raise UsageError("mezo-roberta draws examples by class, which this task does not have: use mezo-opt.")
    classes: dict[int, list[Row]] = {}
    for row in pool:
        classes.setdefault(task.label(row), []).append(row)
    train: list[Row] = []
    validation: list[Row] = []
    for label, rows in sorted(classes.items()):
        share = min(k_shot, len(rows) // 2)
        if share < k_shot:
            logger.info(
                "Class %d has %s: %d to train and as many to validate.", label, plural(len(rows), "example"), share
            )
        train += rows[:share]
        validation += rows[share : 2 * share]
    if not train:
        raise UsageError("No class has two examples, one to train and one to validate.")
    return train, validation
