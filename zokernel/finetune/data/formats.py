"""Which published format the columns of a table are: chats, instructions, prompts with completions, plain text."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import Task
from zokernel.finetune.tasks.base import is_missing
from zokernel.finetune.tasks.text import FORM_COLUMNS, TextTask

logger = logging.getLogger(__name__)

_DESCRIPTIONS = {
    "messages": "chats: the loss is that of the assistant's tokens (see --assistant_only_loss)",
    "prompt-completion": "prompts with completions: the loss is that of the completion (see --completion_only_loss)",
    "instruction": "instructions in Alpaca's columns: the loss is that of the output (see --completion_only_loss)",
    "text": "plain text: the loss is that of every token",
}


def recognise(rows: Sequence[Row], arguments: DataArguments) -> Task | None:
    """Return the task of rows in a published format, or ``None`` if they are in none.

    Args:
        rows: Rows to train on, as they were read.
        arguments: What the user said about them; a label column makes ``text`` a column to classify by.

    Returns:
        A :class:`TextTask`, or ``None``.

    Raises:
        UsageError: If the rows are preferences, which the command line does not train on.
    """
    form = form_of(rows, arguments.label_column)
    if form is None:
        columns = set(_columns(rows))
        for column in (
            {"messages", "conversations"} & columns if not {"label", arguments.label_column} & columns else ()
        ):
            raise UsageError(
                f"Column {column!r} holds no messages: write each row's as a list of mappings with 'role' and "
                "'content', or name --template and --label_column to classify."
            )
        return None
    form_columns, present = FORM_COLUMNS[form], _columns(rows)
    used = [name for name in present if name in form_columns]
    ignored = [name for name in present if name not in form_columns]
    ignored_text = f"; {', '.join(ignored)} left out" if ignored else ""
    logger.info("The rows are %s. Columns: %s%s.", _DESCRIPTIONS[form], ", ".join(used), ignored_text)
    return TextTask(form=form)


def form_of(rows: Sequence[Row], label_column: str | None = None) -> str | None:
    """Return the form of a :class:`TextTask` that the columns of a table have, if they have one.

    Args:
        rows: The table.
        label_column: The column of labels, if the user named one.

    Returns:
        ``messages``, ``prompt-completion``, ``instruction``, ``text`` or ``None``.

    Raises:
        UsageError: If the rows are preferences.

    Example:
        >>> form_of([{"instruction": "Add 1 and 1.", "input": "", "output": "2"}])
        'instruction'
        >>> form_of([{"text": "A joy.", "label": 1}]) is None
        True
    """
    columns = _columns(rows)
    if {"chosen", "rejected"} <= set(columns):
        raise UsageError(
            "The columns 'chosen' and 'rejected' are preferences, which the command line does not train on: use "
            "zokernel.finetune.zeroth_order(DPOTrainer) with trl's trainer."
        )
    if label_column:
        return None
    for column in ("messages", "conversations"):
        if _hold_chats([row.get(column) for row in rows]):
            return "messages"
    if {"prompt", "completion"} <= set(columns):
        if _hold_verdicts([row.get("label") for row in rows]):
            raise UsageError(
                "The columns 'prompt', 'completion' and 'label' (true or false) are judgements, which the command line "
                "does not train on: use zokernel.finetune.zeroth_order(KTOTrainer) with trl's trainer, or drop the "
                "column 'label' to train on all completions."
            )
        return "prompt-completion"
    if {"instruction", "output"} <= set(columns):
        return "instruction"
    if "text" in columns and "label" not in columns:
        return "text"
    return None


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def _hold_chats(values: Sequence[object]) -> bool:
    present = [value for value in values if not is_missing(value) and value != ""]
    # In a table of text, a list is written out as JSON.
    return any(
        isinstance(value, (list, tuple)) or (isinstance(value, str) and value.lstrip().startswith("["))
        for value in present
    )


def _hold_verdicts(values: Sequence[object]) -> bool:
    present = [value for value in values if not is_missing(value)]
    return bool(present) and all(isinstance(value, bool) for value in present)
