"""Named tasks, with any part replaced by the user's own; or a whole task from a few lines of YAML."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from zokernel.data.yaml_mapping import read_mapping
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Source, Task
from zokernel.finetune.tasks.catalogue import TASKS
from zokernel.finetune.tasks.choice import ChoiceTask
from zokernel.finetune.tasks.generation import GenerationTask
from zokernel.finetune.tasks.prompt import PromptTask
from zokernel.finetune.tasks.template import MASK

_KINDS: dict[str, type[Task]] = {kind.kind: kind for kind in (PromptTask, ChoiceTask, GenerationTask)}
_NOT_IN_YAML = ("columns", "prepare")
_LISTS = ("label_words", "labels", "masked_label_words", "choices")


def get_task(
    name: str,
    *,
    template: str | None = None,
    label_words: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    label_column: str | None = None,
) -> Task:
    """Return a named task with any part of it replaced by the user's own.

    Args:
        name: A key of ``TASKS``.
        template: Replaces the template; one with ``{mask}`` replaces the masked template.
        label_words: Replaces the label words (and drops the named task's label values).
        labels: What the label column holds for each class, in the order of the label words.
        label_column: Name of the label column.

    Returns:
        The task.

    Raises:
        UsageError: If there is no such task, or it has no label words to replace.

    Example:
        >>> get_task("sst2", label_words=["bad", "good"]).options()
        (' bad', ' good')
    """
    if name not in TASKS:
        raise UsageError(
            f"There is no task {name!r}: choose one of {', '.join(TASKS)}, or set --template and --label_words, "
            "or describe your own in a --task_file."
        )
    return customize(TASKS[name], template=template, label_words=label_words, labels=labels, label_column=label_column)


def customize(
    task: Task,
    *,
    template: str | None = None,
    label_words: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    label_column: str | None = None,
) -> Task:
    """Replace parts of a task; see :func:`get_task`."""
    if template:
        text = template.replace("\\n", "\n")
        if f"{{{MASK}}}" in text:
            # A masked language model is meant; the causal wording no longer belongs to the task.
            task = replace(task, template=text, masked_template=text)
        else:
            task = replace(task, template=text, masked_template=None)
    if label_words or labels:
        if not isinstance(task, PromptTask):
            flags = [flag for flag, value in (("--label_words", label_words), ("--labels", labels)) if value]
            raise UsageError(f"A {task.kind} task has no label words: leave out {' and '.join(flags)}.")
        if label_words:
            task = replace(task, label_words=tuple(label_words), labels=(), masked_label_words=())
        if labels:
            task = replace(task, labels=tuple(labels))
    if label_column:
        task = replace(task, label_column=label_column)
    return task


def read_task(path: str | Path) -> Task:
    """Read a task from a YAML file.

    The keys are those of the task's class: :class:`PromptTask` when there are ``label_words``, :class:`ChoiceTask` when
    there are ``choices`` or a ``choices_column``, otherwise :class:`GenerationTask`.

    Args:
        path: The file.

    Returns:
        The task.

    Raises:
        UsageError: If the file is missing, malformed, or has a key that tasks do not have.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"There is no task file {path}: check the path.")
    values = read_mapping(path)
    empty = next((name for name, value in values.items() if value in (None, "", [], {})), None)
    if empty is not None:
        raise UsageError(f"{path} leaves {empty!r} empty: give it a value, or take the line out.")
    if "template" not in values:
        raise UsageError(f"{path} must be a mapping with at least a template, such as 'template: \"{{text}} It was\"'.")
    return make_task(values, where=str(path))


def make_task(values: dict[str, Any], *, where: str = "the task") -> Task:
    r"""Build a task from plain values, as a YAML file holds them.

    Raises:
        UsageError: If tasks of its kind have no such key, or a value is of another form than the key's.

    Example:
        >>> make_task({"template": "{text}\nTopic:", "label_words": ["sport", "art"]}).options()
        (' sport', ' art')
    """
    if "label_words" in values:
        kind: type[Task] = PromptTask
    elif "choices" in values or "choices_column" in values:
        kind = ChoiceTask
    else:
        kind = GenerationTask
        values = {"metric": "f1", "loss": "answer", **values}
    keys = [f.name for f in fields(kind) if f.name not in _NOT_IN_YAML]
    for key in values:
        if key not in keys:
            all_keys = dict.fromkeys(f.name for other in _KINDS.values() for f in fields(other))
            close = difflib.get_close_matches(str(key), [name for name in all_keys if name not in _NOT_IN_YAML], n=1)
            hint = f"did you mean {close[0]}?" if close and close[0] != key else f"it has {', '.join(keys)}."
            raise UsageError(f"{where} sets {key!r}, which a {kind.kind} task does not have: {hint}")
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where} sets {key}"
        if key == "source":
            arguments[key] = _source(value, name)
        elif key == "aliases":
            if not isinstance(value, dict):
                raise UsageError(f"{name} to {value!r:.60}: write a column and its other names, as {{text: [review]}}.")
            arguments[key] = {
                str(column): _tuple(others, name) if isinstance(others, (list, tuple)) else (_text(others, name),)
                for column, others in value.items()
            }
        elif key == "dev_size":
            if not str(value).isdigit() or int(value) < 1:
                raise UsageError(f"{name} to {value!r:.60}: it must be a whole number from 1 on.")
            arguments[key] = int(value)
        else:
            arguments[key] = _tuple(value, name) if key in _LISTS else _text(value, name)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UsageError(f"{where} is incomplete: {error}.") from error


def _source(value: Any, name: str) -> Source:
    """Return where published data are: the id of a data set, or the fields of :class:`Source`."""
    if not isinstance(value, dict):
        return Source(_text(value, name))
    keys = [f.name for f in fields(Source)]
    unknown = next((key for key in value if key not in keys), None)
    if unknown is not None:
        raise UsageError(f"{name} with {unknown!r}, which is none of its keys {', '.join(keys)}: correct it.")
    if "dataset" not in value:
        raise UsageError(f"{name} without the 'dataset' that it is: add its id.")
    arguments: dict[str, Any] = {
        key: _text(item, name) for key, item in value.items() if key not in ("splits", "labels")
    }
    if "labels" in value:
        arguments["labels"] = _tuple(value["labels"], name)
    if "splits" in value:
        if not isinstance(value["splits"], dict):
            raise UsageError(f"{name} with splits {value['splits']!r:.60}: write them as {{train: train, test: test}}.")
        arguments["splits"] = {str(split): _text(item, name) for split, item in value["splits"].items()}
    return Source(**arguments)


def _text(value: Any, name: str) -> str:
    if value is None or isinstance(value, (list, tuple, dict)):
        raise UsageError(f"{name} to {value!r:.60}, where a text is meant: write one, in quotes.")
    return str(value)


def _tuple(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{name} to {value!r:.60}, where a list is meant: write it as [one, two].")
    # YAML reads the bare words yes, no, true and false as booleans; as label words they are meant as words.
    words = {True: "Yes", False: "No"}
    return tuple(words[item] if isinstance(item, bool) else _text(item, name) for item in value)
