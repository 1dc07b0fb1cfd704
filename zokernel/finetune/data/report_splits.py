"""What a reader of the log should know about the rows that were drawn: their classes, and rows in two splits."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from zokernel.data.tables import Row
from zokernel.finetune.tasks import PromptTask, Task
from zokernel.readable import plural

logger = logging.getLogger(__name__)

MANY = 20  # classes that are still listed one by one


def report_splits(task: Task, train: Sequence[Row], others: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    """Log the classes of the training rows, and how many rows of the other splits are training rows, too.

    Args:
        task: Tells the classes and the prompt's columns.
        train: Rows to train on.
        others: Rows of the other splits by name.

    Returns:
        How many rows of each of the other splits have the prompt of a training row.

    Example:
        >>> task = PromptTask("{text} It was", ("bad", "good"))
        >>> train, test = [{"text": "a", "label": 0}], [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
        >>> report_splits(task, train, {"test": test})
        {'test': 1}
    """
    if isinstance(task, PromptTask):
        _report_classes(task, train)
    trained_on = {_key(task, row) for row in train}
    shared = {split: sum(_key(task, row) in trained_on for row in rows) for split, rows in others.items()}
    for split, count in shared.items():
        if count:
            logger.warning(
                "%d of %s %s: their score says less about new ones.",
                count,
                plural(len(others[split]), f"{split} example"),
                "is also a training example" if count == 1 else "are also training examples",
            )
    return shared


def _report_classes(task: PromptTask, train: Sequence[Row]) -> None:
    counts = Counter(task.label(row) for row in train)
    present = [f"{counts[choice]:,} {word}" for choice, word in enumerate(task.label_words) if counts[choice]]
    absent = [repr(word) for choice, word in enumerate(task.label_words) if not counts[choice]]
    if len(present) == 1:
        logger.warning(
            "All %s training examples have one label (%s): there is nothing to learn.",
            f"{len(train):,}",
            task.label_words[next(iter(counts))],
        )
        return
    logger.info("Training labels: %s%s.", ", ".join(present[:MANY]), ", ..." if present[MANY:] else "")
    if absent:
        logger.warning("No training example has the label %s.", ", ".join(absent[:MANY]))


def _key(task: Task, row: Row) -> str:
    columns = [name for name in task.required_columns() if name != task.label_column]
    return json.dumps([row.get(name) for name in columns or sorted(row)], default=str)
