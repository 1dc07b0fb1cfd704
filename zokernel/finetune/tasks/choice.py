"""Multiple choice: every example brings its own options, two (COPA) or many (ReCoRD)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Task
from zokernel.finetune.tasks.template import fill, parse

_POSITION = re.compile(r"\d+(\.0*)?")  # tables with empty cells write 1 as 1.0


@dataclass(frozen=True)
class ChoiceTask(Task):
    """A task whose options stand in the row itself.

    The label column holds the position of the right option (0, 1, ...), its text, or a list of texts that all count.
    Where options are numbers, :meth:`read` tells positions from texts by the whole column.

    Args:
        template: Text with columns in braces.
        choices: One template an option, such as ``("{choice1:decap}", "{choice2:decap}")``.
        choices_column: Instead of ``choices``, a column that holds a list of options, or such a list as JSON.

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
        """Return the options as they stand in the row.

        Raises:
            UsageError: If the column of options holds no list.
        """
        if self.choices_column:
            return tuple(str(text).strip() for text in self._parse_options(row[self.choices_column]))
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
        right = _position(value, texts) or _options_with_text(value, texts)
        if not right:
            raise UsageError(
                f"Label {value!r} in column {self.label_column!r} is neither the position nor the text of one of the "
                f"{len(texts)} options: {', '.join(map(repr, texts[:5]))}."
            )
        return right

    def read_labels(self, numbered: Sequence[tuple[int, Row]], place: Callable[[int], str]) -> list[Row]:
        """Return the rows, with labels in lists where the column holds the texts of options that are numbers.

        Raises:
            UsageError: If nothing tells whether such labels are positions or texts.
        """
        cases = [(n, row[self.label_column], self.fillers(row)) for n, row in numbered]
        positions = [_position(value, texts) for _, value, texts in cases]
        matches = [_options_with_text(value, texts) for _, value, texts in cases]
        differ = [
            case for case, position, text in zip(cases, positions, matches) if position and text and position != text
        ]
        if not differ or (all(positions) and not all(matches)):
            return [row for _, row in numbered]
        if all(positions) or not all(matches):
            n, value, texts = differ[0]
            raise UsageError(
                f"{place(n)}: label {value!r} in column {self.label_column!r} is the text of one option and the "
                f"position of another ({', '.join(map(repr, texts[:5]))}): write labels as lists, such as "
                f"[{json.dumps(str(value))}], for texts, or options that are no numbers."
            )
        lists = [value if isinstance(value, (list, tuple)) else [value] for _, value, _ in cases]
        return [{**row, self.label_column: value} for (_, row), value in zip(numbered, lists)]

    def _parse_options(self, value: Any) -> Iterable[Any]:
        """Return a cell's options; a table without lists writes them as JSON."""
        listed = value
        if isinstance(value, str):
            try:
                listed = json.loads(value)
            except ValueError:
                listed = None
        if isinstance(listed, (str, bytes, Mapping)) or not isinstance(listed, Iterable):
            raise UsageError(
                f"Column {self.choices_column!r} holds {value!r:.60}, where the options are a list: write it as JSON, "
                'such as ["yes", "no"].'
            )
        return listed


def _position(value: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Return the position that a label says, if it says one."""
    if isinstance(value, (list, tuple)) or not _POSITION.fullmatch(str(value).strip()):
        return ()
    return (int(float(value)),) if int(float(value)) < len(texts) else ()


def _options_with_text(value: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Return the positions of the options whose text a label says."""
    labels = {str(text).strip() for text in (value if isinstance(value, (list, tuple)) else [value])}
    return tuple(number for number, text in enumerate(texts) if text in labels)
