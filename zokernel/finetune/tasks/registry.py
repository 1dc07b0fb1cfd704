"""Named tasks: published templates and label words, and where their columns come from."""

from __future__ import annotations

from dataclasses import replace

from zokernel.errors import UsageError
from zokernel.finetune.tasks.prompt import PromptTask

TASKS: dict[str, PromptTask] = {
    "sst2": PromptTask("{sentence} It was", ("terrible", "great")),
    "movie-reviews": PromptTask("Movie review: {sentence}\nOverall, the movie was", ("terrible", "great")),
    "rte": PromptTask(
        '{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n',
        ("Yes", "No"),
        labels=("entailment", "not_entailment"),
    ),
    "trec": PromptTask(
        "Question: {question}\nThe answer is a",
        ("description", "entity", "person", "number", "location", "abbreviation"),
    ),
}


def get_task(
    name: str,
    *,
    template: str | None = None,
    label_words: list[str] | None = None,
    labels: list[str] | None = None,
    label_column: str | None = None,
) -> PromptTask:
    """Return a named task with any part of it replaced by the user's own.

    Args:
        name: A key of ``TASKS``.
        template: Replaces the template.
        label_words: Replaces the label words (and drops the named task's label values).
        labels: What the label column holds for each class, in the order of the label words.
        label_column: Name of the label column.

    Returns:
        The task.

    Raises:
        UsageError: If there is no such task.

    Example:
        >>> get_task("sst2", label_words=["bad", "good"]).options()
        (' bad', ' good')
    """
    if name not in TASKS:
        raise UsageError(
            f"There is no task {name!r}: choose one of {', '.join(TASKS)}, or set --template and --label_words."
        )
    task = TASKS[name]
    if label_words:
        task = replace(task, label_words=tuple(label_words), labels=())
    if labels:
        task = replace(task, labels=tuple(labels))
    if template:
        task = replace(task, template=template.replace("\\n", "\n"))
    if label_column:
        task = replace(task, label_column=label_column)
    return task
