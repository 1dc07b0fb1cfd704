"""Multiple choice: every example brings its own options, two (COPA) or many (ReCoRD)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Task
from zokernel.finetune.tasks.template import fill, parse

_POSITION = re.compile(r"\d+(\.0*)?")  # tables with empty cells write 1 as 1.0


@dataclass(frozen=True)
class ChoiceTask(Task):
    """A task whose options stand in the row itself.

    The label column holds the position of the right option (0, 1, ...), its text, or a list of texts that all count.

    Args:
        template: Text with columns in braces.
        choices: One template an option, such as ``("{choice1:decap}", "{choice2:decap}")``.
        choices_column: Instead of ``choices``, a column that holds a list of options.

    Raises:
        UsageError: If the options are not given in exactly one of the two ways.

    Example:
        >>> task = ChoiceTask("{premise:open} because", ("{choice1:decap}", "{choice2:decap}"))
        >>> row = {"premise": "It is wet.", "choice1": "It rained.", "choice2": "I slept.", "label": 0}
        >>> task.prompt(row), task.options(row), task.correct(row)
        ('It is wet because', (' it rained.', ' I slept.'), (0,))
    """

    kind: ClassVar[str] = "choice"

    choices: tuple[str, ...] = ()
    choices_column: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if bool(self.choices) == bool(self.choices_column):
            raise UsageError("Give the options either as choices (one template each) or as choices_column.")
        if len(self.choices) == 1:
            raise UsageError("choices must be two or more templates.")
        for choice in self.choices:
            parse(choice)

    def required_columns(self) -> tuple[str, ...]:
        """Return the columns that every row must have."""
        more = (self.choices_column,) if self.choices_column else ()
        return tuple(dict.fromkeys((*super().required_columns(), *more)))

    def text_columns(self) -> tuple[str, ...]:
        """Return the columns whose text stands in the prompt or an option."""
        options = (column for choice in self.choices for column in parse(choice))
        return tuple(dict.fromkeys((*super().text_columns(), *options)))

    def fillers(self, row: Row) -> tuple[str, ...]:
        """Return the options as they stand in the row."""
        if self.choices_column:
            return tuple(str(text).strip() for text in row[self.choices_column])
        return tuple(fill(choice, row) for choice in self.choices)

    def options(self, row: Row) -> tuple[str, ...]:
        """Return the row's options, each as it follows the prompt."""
        return tuple(self._lead() + text for text in self.fillers(row))

    def correct(self, row: Row) -> tuple[int, ...]:
        """Return which of the row's options are right.

        Raises:
            UsageError: If none is.
        """
        value, texts = row[self.label_column], self.fillers(row)
        if isinstance(value, (list, tuple)):
            wanted = {str(text).strip() for text in value}
            found = tuple(number for number, text in enumerate(texts) if text in wanted)
        elif _POSITION.fullmatch(str(value).strip()) and int(float(value)) < len(texts):
            found = (int(float(value)),)
        else:
            found = tuple(number for number, text in enumerate(texts) if text == str(value).strip())
        if not found:
            raise UsageError(
                f"Label {value!r} in column {self.label_column!r} is neither the position nor the text of one of the "
                f"{len(texts)} options: {', '.join(map(repr, texts[:5]))}."
            )
        return found
