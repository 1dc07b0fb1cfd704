"""What every task has: a template over the columns of a table, options or answers, and which of them is right."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.columns import close_column
from zokernel.finetune.tasks.template import MASK, fill, parse
from zokernel.readable import plural

logger = logging.getLogger(__name__)

MANY = 20  # values that are still listed one by one
HIDDEN = "-1"  # what public benchmarks write where they hide a label
NO_LABEL = ("", HIDDEN, f"{HIDDEN}.0", "-", "None", "nan", "NaN", "null")  # except those that are the task's labels


@dataclass(frozen=True)
class Source:
    """Where a task's published data live on the hub.

    Attributes:
        dataset: Namespaced id.
        config: Configuration of the data set.
        splits: Name of the data set's split for each of ours that has public labels.
        labels: What the label column holds there, where it differs from the task's own.
        revision: Branch, tag or commit.
    """

    dataset: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "validation": "validation"})
    labels: tuple[str, ...] = ()
    revision: str | None = None


@dataclass(frozen=True)
class Task:
    """Base of the task families.

    Args:
        template: Text with columns in braces; what follows it is scored or generated.
        label_column: Column that says what is right.
        masked_template: Wording for masked language models, with ``{mask}`` where the option goes; the template
            followed by the mask when not given.
        aliases: Other names under which published files carry a column; a name that the template uses is never
            renamed.
        prepare: Turns a row as published into one or more rows with the template's columns.
        source: Where the published data are.
        metric: The number that is reported: ``accuracy``, ``f1`` or ``em``.
        loss: ``options``: cross entropy over the options' scores; ``answer``: cross entropy of the right answer's
            tokens (averaged over the tokens of the batch).
        dev_size: Validation examples in the published protocol, where it differs from 500.
    """

    kind: ClassVar[str]
    fixed_options: ClassVar[bool] = False

    template: str
    label_column: str = field(default="label", kw_only=True)
    masked_template: str | None = field(default=None, kw_only=True)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict, kw_only=True)
    prepare: Callable[[Row], list[Row]] | None = field(default=None, kw_only=True)
    source: Source | None = field(default=None, kw_only=True)
    metric: str = field(default="accuracy", kw_only=True)
    loss: str = field(default="options", kw_only=True)
    dev_size: int | None = field(default=None, kw_only=True)
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        if self.loss not in ("options", "answer"):
            raise UsageError(f"loss must be options or answer, not {self.loss!r}.")
        object.__setattr__(self, "columns", parse(self.template))
        if self.masked_template is not None:
            parse(self.masked_template)
            if f"{{{MASK}}}" not in self.masked_template:
                raise UsageError(f"The masked template {self.masked_template!r} needs a {{mask}} where the word goes.")

    def prompt(self, row: Row) -> str:
        """Fill the template with the columns of ``row``."""
        if f"{{{MASK}}}" in self.template:
            raise UsageError(f"The template {self.template!r} has a {{mask}}: it needs a masked language model.")
        return fill(self.template, row)

    def cloze(self, row: Row) -> tuple[str, str]:
        """Return the text before and after the mask, for masked language models.

        The space before the mask is left out: label words carry their own.
        """
        template = self.masked_template or self.template
        if f"{{{MASK}}}" not in template:
            template += f" {{{MASK}}}"
        before, after = template.split(f"{{{MASK}}}")
        before = before[:-1] if before.endswith(" ") else before
        return fill(before, row), fill(after, row)

    def options(self, row: Row) -> tuple[str, ...]:
        """Return the texts among which the model chooses, each as it follows the prompt."""
        raise NotImplementedError

    def fillers(self, row: Row) -> tuple[str, ...]:
        """Return the texts among which the model chooses, each as it stands in place of the mask."""
        raise NotImplementedError

    def correct(self, row: Row) -> tuple[int, ...]:
        """Return which options are right."""
        raise NotImplementedError

    def label(self, row: Row) -> int:
        """Return the (first) right option."""
        return self.correct(row)[0]

    def references(self, row: Row) -> tuple[str, ...]:
        """Return the right answers as text, for tasks that are scored by what is generated."""
        return ()

    def _lead(self) -> str:
        """The space between prompt and option, where one is needed."""
        return "" if self.template[-1:].isspace() else " "

    def required_columns(self) -> tuple[str, ...]:
        """Return the columns that every row must have."""
        return tuple(dict.fromkeys((*self.text_columns(), self.label_column)))

    def read(self, rows: Sequence[Row], *, where: str) -> list[Row]:
        """Turn rows as published into rows with the task's columns; those without a label or text are left out.

        Args:
            rows: The table as it was read.
            where: What it is called in messages.

        Returns:
            Rows that :meth:`prompt` and :meth:`correct` take.

        Raises:
            UsageError: If a column is missing, nothing is left, or a label is none of the options (its line is named).
        """
        numbered = self._prepare_rows(rows, where)
        renamed = self.renamed_columns(numbered)
        if renamed:
            numbered = [(n, {renamed.get(name, name): value for name, value in row.items()}) for n, row in numbered]
        self.check_columns([row for _, row in numbered], where=where)
        labelled, unlabelled = _partition(numbered, lambda n, row: not self.unlabelled(row))
        hidden = any(is_hidden(row.get(self.label_column)) for _, row in unlabelled)
        if not labelled:
            reason = " (-1 stands for no label)" if hidden else ""
            raise UsageError(
                f"{where} has no labelled row{reason}: fill its column {self.label_column!r}, or name another with "
                "--label_column."
            )
        if hidden:
            self.check_hidden([row for _, row in labelled], where=where)
        note = "-1 stands for no label unless --labels names it." if hidden else ""
        log_left_out(where, "a label", [place_of(rows, n) for n, _ in unlabelled], note)
        texts = ", ".join(self.text_columns())
        kept, empty = _partition(labelled, lambda n, row: self.has_text(row, f"{where}, {place_of(rows, n)}"))
        log_left_out(where, f"text ({texts})", [place_of(rows, n) for n, _ in empty])
        if not kept:
            raise UsageError(f"{where} has no row with text in {texts}: name other columns in --template.")
        for n, row in kept:
            try:
                self.correct(row)
            except UsageError as error:
                values = (
                    list(dict.fromkeys(str(row[self.label_column]) for _, row in kept)) if self.fixed_options else []
                )
                listed = f"; the column holds {', '.join(values)}." if 1 < len(values) <= MANY else "."
                raise UsageError(f"{where}, {place_of(rows, n)}: {str(error).removesuffix('.')}{listed}") from error
        return self.read_labels(kept, lambda n: f"{where}, {place_of(rows, n)}")

    def read_labels(self, numbered: Sequence[tuple[int, Row]], place: Callable[[int], str]) -> list[Row]:
        """Return the rows with labels that mean one thing, for tasks in which only the whole column tells what.

        Args:
            numbered: Labelled rows, and the number of each in its table.
            place: Says how a row of that number is found.
        """
        return [row for _, row in numbered]

    def _prepare_rows(self, rows: Sequence[Row], where: str) -> list[tuple[int, Row]]:
        """Return the rows with the template's columns, each with the number of the row that it comes from."""
        if self.prepare is None:
            return list(enumerate(rows))
        required = set(self.required_columns())
        try:
            return [
                (n, prepared)
                for n, row in enumerate(rows)
                for prepared in ([row] if required <= row.keys() else self.prepare(row))
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{where} is not in a published format of this task ({type(error).__name__}: {error}): its columns "
                f"are {', '.join(map(str, rows[0]))}."
            ) from error

    def renamed_columns(self, numbered: Sequence[tuple[int, Row]]) -> dict[str, str]:
        """Return the task's name of each column that the table carries under another; a name in use stays as it is."""
        present = dict.fromkeys(name for _, row in numbered for name in row)
        required = self.required_columns()
        return {
            other: column
            for column, others in self.aliases.items()
            if column in required and column not in present
            for other in others
            if other in present and other not in required
        }

    def unlabelled(self, row: Row) -> bool:
        """Whether the row has no label, or one that is hidden, as public benchmarks hide those of their test sets: -1.

        A value such as ``-1`` or ``None`` that is one of the task's labels is a label.
        """
        value = row.get(self.label_column)
        if is_missing(value):
            return True
        if str(value).strip() not in NO_LABEL:
            return False
        try:
            self.correct(row)
        except UsageError:
            return True
        return False

    def text_columns(self) -> tuple[str, ...]:
        """Return the columns whose text stands in the prompt."""
        masked = parse(self.masked_template) if self.masked_template else ()
        return tuple(name for name in dict.fromkeys((*self.columns, *masked)) if name != self.label_column)

    def check_hidden(self, labelled: Sequence[Row], *, where: str) -> None:
        """Refuse -1 as no label where it seems to be one, for tasks in which it might be.

        Args:
            labelled: The rows with other labels.
            where: What their table is called in messages.
        """

    def has_text(self, row: Row, place: str) -> bool:
        """Whether every column of the prompt has a value, and some of them text.

        Args:
            row: A row with the task's columns.
            place: What it is called in messages.

        Raises:
            UsageError: If a column holds something else than text, such as a list.
        """
        values = [row.get(name) for name in self.text_columns()]
        for name, value in zip(self.text_columns(), values):
            if isinstance(value, (list, tuple, Mapping, bytes)):
                raise UsageError(
                    f"{place}: column {name!r} holds a {type(value).__name__}, not a text: join its parts "
                    "into one text first, or name another column in the template."
                )
        return not any(map(is_missing, values)) and (not values or any(str(value).strip() for value in values))

    def check_columns(self, rows: Sequence[Row], *, where: str) -> None:
        """Check that a table has every column the task uses.

        Raises:
            UsageError: If one is missing; the message lists those there are.
        """
        present = dict.fromkeys(name for row in rows for name in row)
        for column in self.required_columns():
            if rows and column not in present:
                close = close_column(column, present)
                flag = "--label_column" if column == self.label_column else "the template"
                advice = "change --template or --label_column, or name the columns with --column_names."
                raise UsageError(
                    f"{where} has no column {column!r} (it has {', '.join(map(str, present))}): "
                    + (f"did you mean {close!r} (in {flag})?" if close else advice)
                )


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: ``None``, or the NaN that tables write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_hidden(value: object) -> bool:
    """Whether a label is -1, which public benchmarks write where they hide one.

    Example:
        >>> is_hidden("-1.0"), is_hidden(-1), is_hidden("-")
        (True, True, False)
    """
    return str(value).strip() in (HIDDEN, f"{HIDDEN}.0")


def place_of(rows: Sequence[Row], number: int) -> str:
    """Return how a row is found in its file: by its line if the table knows it, or else by its number from 1.

    Example:
        >>> place_of([{"text": "a"}, {"text": "b"}], 1)
        'row 2'
    """
    lines = getattr(rows, "lines", ())
    return f"line {lines[number]}" if number < len(lines) and lines[number] else f"row {number + 1}"


def log_left_out(where: str, what: str, places: Sequence[str], note: str = "") -> None:
    """Log how many rows are left out, if any are.

    Args:
        where: What their table is called in messages.
        what: What they lack.
        places: How each of them is found.
        note: A sentence to add.
    """
    if places:
        count, verb = plural(len(places), "row"), "is" if len(places) == 1 else "are"
        message = "%s: %s without %s %s left out (the first: %s)."
        logger.info(f"{message} {note}".rstrip(), where, count, what, verb, places[0])


def _partition(
    numbered: Sequence[tuple[int, Row]], keeps: Callable[[int, Row], bool]
) -> tuple[list[tuple[int, Row]], list[tuple[int, Row]]]:
    """Return the numbered rows that are kept, and the others."""
    kept: list[tuple[int, Row]] = []
    others: list[tuple[int, Row]] = []
    for number, row in numbered:
        (kept if keeps(number, row) else others).append((number, row))
    return kept, others
