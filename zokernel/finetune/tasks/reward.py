"""Prompts whose answers get a reward: rows need a prompt and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Task, is_missing, log_left_out, place_of
from zokernel.finetune.tasks.text import messages_of


@dataclass(frozen=True)
class RewardTask(Task):
    """Prompts, each a text or a list of messages, and columns for the reward functions.

    Args:
        template: Empty; the prompt of a row needs none.

    Example:
        >>> rows = [{"prompt": [{"role": "user", "content": "Hi"}], "answer": "Hello"}, {"prompt": "1 + 1 ="}]
        >>> [row["prompt"] for row in RewardTask().read(rows, where="train")]
        [[{'role': 'user', 'content': 'Hi'}], '1 + 1 =']
    """

    kind: ClassVar[str] = "reward"

    template: str = ""
    label_column: str = ""
    metric: str = "reward"

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", ())

    def read(self, rows: Sequence[Row], *, where: str) -> list[Row]:
        """Return the rows that have a prompt, with all their columns; the others are left out and counted.

        Raises:
            UsageError: If a prompt is neither a text nor messages (its line is named), or nothing is left.
        """
        kept: list[Row] = []
        empty: list[str] = []
        for number, row in enumerate(rows):
            place = place_of(rows, number)
            try:
                prompt = prompt_of(row.get("prompt"))
            except UsageError as error:
                raise UsageError(f"{where}, {place}: {error}") from error
            if prompt:
                kept.append({**row, "prompt": prompt})
            else:
                empty.append(place)
        if not kept:
            columns = ", ".join(dict.fromkeys(str(name) for row in rows for name in row))
            raise UsageError(
                f"{where} has no row with a prompt (its columns are {columns}): --objective reward needs a column "
                "'prompt' of texts or messages."
            )
        log_left_out(where, "a prompt", empty)
        return kept

    def required_columns(self) -> tuple[str, ...]:
        """Return the column of prompts."""
        return ("prompt",)


def prompt_of(value: object) -> str | list[dict[str, Any]]:
    """Return a prompt as a text or as messages; empty if there is none.

    Raises:
        UsageError: If it is something else.
    """
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return messages_of(value, "prompt") if _holds_messages(value) else value if value.strip() else ""
    return messages_of(value, "prompt")


def _holds_messages(text: str) -> bool:
    """Whether a text is JSON of messages, which is how a table of text holds them."""
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in value)
    )
