"""Which published format the columns of a table are: chats, instructions, prompts with completions, plain text."""

from __future__ import annotations

from collections.abc import Sequence

from zokernel.data.tables import Row
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import Task


def recognise(rows: Sequence[Row], arguments: DataArguments) -> Task | None:
    """Return the task of rows in a published format, or ``None`` if they are in none."""
    return None
