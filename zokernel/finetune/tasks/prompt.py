"""Prompt-based classification: a template with columns of a table, and one label word (or phrase) for each class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Task


@dataclass(frozen=True)
class PromptTask(Task):
    r"""A classification task phrased as a cloze question.

    The score of class c is the model's mean log-probability of the tokens of ``label_words[c]`` after the prompt (or,
    for a masked language model, in place of the mask).

    Args:
        template: Text with columns in braces, such as ``{sentence} It was``.
        label_words: One word or phrase per class, in class order, without the space before it.
        labels: What the label column holds for each class; ``0, 1, ...`` when empty.  ``a|b`` stands for either.
        masked_label_words: Label words for masked language models, where they differ.

    Raises:
        UsageError: If the template names no column, or there are fewer than two distinct label words.

    Example:
        >>> task = PromptTask("{sentence} It was", ("terrible", "great"))
        >>> task.prompt({"sentence": "A joy .", "label": 1}), task.options(), task.label({"label": "1"})
        ('A joy . It was', (' terrible', ' great'), 1)
    """

    kind: ClassVar[str] = "classification"
    fixed_options: ClassVar[bool] = True

    label_words: tuple[str, ...]
    labels: tuple[str, ...] = ()
    masked_label_words: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.label_words)) < 2 or len(set(self.label_words)) != len(self.label_words):
            raise UsageError(f"label_words must be two or more distinct words, not {list(self.label_words)}.")
        if self.labels and len(self.labels) != len(self.label_words):
            raise UsageError(f"There are {len(self.labels)} labels for {len(self.label_words)} label words.")
        if self.masked_label_words and len(self.masked_label_words) != len(self.label_words):
            raise UsageError(
                f"There are {len(self.masked_label_words)} masked label words for {len(self.label_words)} label words."
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.label_words)

    def options(self, row: Row | None = None) -> tuple[str, ...]:
        """Return the text that follows the prompt for each class, with a space before it where one is needed."""
        return tuple(self._lead() + word for word in self.label_words)

    def fillers(self, row: Row | None = None) -> tuple[str, ...]:
        """Return the words that may stand in place of the mask."""
        return self.masked_label_words or self.label_words

    def correct(self, row: Row) -> tuple[int, ...]:
        """Return the class of ``row``.

        Raises:
            UsageError: If the label is none of the classes.
        """
        value = str(row[self.label_column]).strip()
        names = self.labels or tuple(str(number) for number in range(self.num_classes))
        for choice, name in enumerate(names):
            if value == name or value in name.split("|"):
                return (choice,)
        if value in self.label_words:
            return (self.label_words.index(value),)
        raise UsageError(
            f"Label {value!r} in column {self.label_column!r} is none of {', '.join(names)}, for the label words "
            f"{', '.join(self.label_words)}: add the missing word, or map values with --labels."
        )
