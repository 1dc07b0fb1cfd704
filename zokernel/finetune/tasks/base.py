"""What every task is: a template over the columns of a table, options or answers, and which of them is right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.template import MASK, fill, parse

logger = logging.getLogger(__name__)


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
        aliases: Other names under which published files carry a column.
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
        masked = parse(self.masked_template) if self.masked_template else ()
        return tuple(dict.fromkeys((*self.columns, *masked, self.label_column)))

    def read(self, rows: Sequence[Row], *, where: str) -> list[Row]:
        """Turn rows as published into rows with the task's columns, dropping those without a label.

        Args:
            rows: The table as it was read.
            where: What it is called in messages.

        Returns:
            Rows that :meth:`prompt` and :meth:`correct` take.

        Raises:
            UsageError: If a column is missing, nothing is left, or a label is none of the options.
        """
        if self.prepare is not None:
            try:
                rows = [prepared for row in rows for prepared in self.prepare(row)]
            except (KeyError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"{where} is not in a published format of this task ({type(error).__name__}: {error}): its columns "
                    f"are {', '.join(map(str, rows[0]))}."
                ) from error
        present = rows[0] if rows else {}
        renamed = {
            other: column
            for column, others in self.aliases.items()
            if column not in present
            for other in others
            if other in present
        }
        if renamed:
            rows = [{renamed.get(name, name): value for name, value in row.items()} for row in rows]
        self.check_columns(rows, where=where)
        labelled = [row for row in rows if not self.unlabelled(row)]
        if len(labelled) < len(rows):
            logger.info("%s: %d rows without a label are left out.", where, len(rows) - len(labelled))
        if not labelled:
            raise UsageError(f"{where} has no labelled row.")
        for row in labelled:
            self.correct(row)
        return labelled

    def unlabelled(self, row: Row) -> bool:
        """Whether the row's label is hidden, as public benchmarks hide those of their test sets: -1."""
        return str(row[self.label_column]).strip() in ("-1", "-1.0", "-", "None")

    def check_columns(self, rows: Sequence[Row], *, where: str) -> None:
        """Check that a table has every column the task uses.

        Raises:
            UsageError: If one is missing; the message lists those there are.
        """
        for column in self.required_columns():
            if rows and column not in rows[0]:
                raise UsageError(
                    f"{where} has no column {column!r} (it has {', '.join(map(str, rows[0]))}): "
                    "change --template or --label_column, or name the columns with --column_names."
                )
