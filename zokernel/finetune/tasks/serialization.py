"""Tasks as plain values, so that a finished run's folder says how to phrase new examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from zokernel.errors import UsageError
from zokernel.finetune.tasks import raw
from zokernel.finetune.tasks.base import Task

_NOT_SAVED = ("source", "prepare")  # where the data were, and a function


def task_values(task: Task) -> dict[str, Any]:
    """Return all that makes a task, as JSON values.

    Args:
        task: A task of this package.

    Returns:
        Its ``kind``, its fields by name, and the name of the function that prepares published rows, if any.

    Example:
        >>> from zokernel.finetune import PromptTask
        >>> values = task_values(PromptTask("{text} It was", ("bad", "good")))
        >>> values["kind"], values["template"], values["label_words"]
        ('classification', '{text} It was', ['bad', 'good'])
        >>> task_of_values(values) == PromptTask("{text} It was", ("bad", "good"))
        True
    """
    values = {f.name: _plain(getattr(task, f.name)) for f in fields(task) if f.init and f.name not in _NOT_SAVED}
    prepare = getattr(task, "prepare", None)
    return {"kind": task.kind, **values, "prepare": None if prepare is None else prepare.__name__}


def task_of_values(values: Mapping[str, Any]) -> Task:
    """Return the task that :func:`task_values` described.

    Raises:
        UsageError: If this version has no such kind of task.
    """
    kinds = {kind.kind: kind for kind in Task.__subclasses__()}
    if values.get("kind") not in kinds:
        raise UsageError(f"This version of zokernel has no task of kind {values.get('kind')!r}: install a newer one.")
    kind: Any = kinds[values["kind"]]
    names = [f.name for f in fields(kind) if f.init and f.name not in _NOT_SAVED]
    arguments = {name: _frozen(values[name]) for name in names if name in values}
    prepare = values.get("prepare")
    if prepare:
        arguments["prepare"] = getattr(raw, prepare)
    return kind(**arguments)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
