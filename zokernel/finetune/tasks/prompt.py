"""Prompt-based classification: a template with columns of a table, and one label word (or phrase) for each class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import HIDDEN, Task
from zokernel.finetune.tasks.template import refuse_broken
from zokernel.readable import plural
from zokernel.values import plain_number

Label = str | bool | int | float


@dataclass(frozen=True)
class PromptTask(Task):
    r"""A classification task phrased as a cloze question.

    The score of class c is the model's mean log-probability of the tokens of ``label_words[c]`` after the prompt (or,
    for a masked language model, in place of the mask).

    Args:
        template: Text with columns in braces, such as ``{sentence} It was``.
        label_words: One word or phrase per class, in class order, without the space before it.
        labels: What the label column holds for each class; ``0, 1, ...`` when empty (or the label words, if those are
            numbers).  ``a|b`` stands for either, and ``a\|b`` for itself.  The label words, 1.0 for 1, true for 1 and
            another case are understood, too.
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
    _classes: dict[str, int] = field(init=False, repr=False, compare=False)
    _classes_in_any_case: dict[str, int | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        for word in self.label_words:
            refuse_broken(word, "The label word")
        words = {word.strip() for word in self.label_words} - {""}
        if len(words) < 2 or len(words) != len(self.label_words):
            raise UsageError(f"label_words must be two or more distinct words, not {list(self.label_words)}.")
        if self.labels and len(self.labels) != len(self.label_words):
            raise UsageError(
                f"{plural(len(self.label_words), 'label word')} and {plural(len(self.labels), 'label')} were given: "
                "give one label for each word."
            )
        object.__setattr__(self, "_classes", self._lookup())
        folded: dict[str, int | None] = {}
        for name, choice in self._classes.items():
            # Names that differ in case alone are told apart by it.
            folded[name.casefold()] = choice if folded.get(name.casefold(), choice) == choice else None
        object.__setattr__(self, "_classes_in_any_case", folded)
        if self.masked_label_words and len(self.masked_label_words) != len(self.label_words):
            raise UsageError(
                f"There are {len(self.masked_label_words)} masked label words for {len(self.label_words)} label words: "
                "give one for each."
            )

    def _lookup(self) -> dict[str, int]:
        """Return the class of every text that the label column may hold."""
        classes: dict[str, int] = {}
        for choice, name in enumerate(self.names()):
            for alternative in dict.fromkeys(map(label_as_text, (name, *alternatives(name)))):
                if alternative in classes:
                    raise UsageError(f"The label {alternative!r} stands for two classes: give each class its own.")
                classes[alternative] = choice
        for choice, word in enumerate(self.label_words):
            classes.setdefault(label_as_text(word), choice)
        for text, number in (("True", "1"), ("False", "0")):
            if self.num_classes == 2 and number in classes and not {text, text.lower()} & classes.keys():
                classes[text] = classes[number]
        return classes

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.label_words)

    def options(self, row: Row | None = None) -> tuple[str, ...]:
        """Return the text that follows the prompt for each class, with a space before it where one is needed."""
        return tuple(self._lead() + word for word in self.label_words)

    def fillers(self, row: Row | None = None) -> tuple[str, ...]:
        """Return the words that may take the place of the mask."""
        return self.masked_label_words or self.label_words

    def correct(self, row: Row) -> tuple[int, ...]:
        """Return the class of ``row``.

        Raises:
            UsageError: If the label is none of the classes.
        """
        value = row[self.label_column]
        if isinstance(value, (list, tuple, Mapping)):
            raise UsageError(
                f"Column {self.label_column!r} holds a {type(value).__name__} ({value!r:.80}), where a label is one "
                "value: choose another --label_column."
            )
        choice = self._class_of(value)
        if choice is not None:
            return (choice,)
        if is_on_scale(value) and not any(map(is_on_scale, self.labels)):
            raise UsageError(
                f"Label {value!r} in column {self.label_column!r} is a number on a scale, not a class: divide the "
                "scale into classes first, such as 0 and 1."
            )
        raise UsageError(
            f"Label {str(value).strip()!r} in column {self.label_column!r} is none of {', '.join(self.names())}, for "
            f"the label words {', '.join(self.label_words)}: add the missing word, or map values with --labels."
        )

    def _class_of(self, value: object) -> int | None:
        """Return the class of a label, or None if it is none of the classes."""
        text = label_as_text(value)
        choice = self._classes.get(text)
        return self._classes_in_any_case.get(text.casefold()) if choice is None else choice

    def check_hidden(self, labelled: Sequence[Row], *, where: str) -> None:
        """Refuse -1 as no label where one class would be left, or where 0, 1, ... lack a class.

        Raises:
            UsageError: If -1 seems to be a class.
        """
        labels = list(dict.fromkeys(label_as_text(row[self.label_column]) for row in labelled))
        classes = {self._class_of(label) for label in labels}
        lacks_last = not self.labels and classes == set(range(self.num_classes - 1))
        if None in classes or (len(classes) > 1 and not lacks_last):
            return  # a label that is none of the classes is named by its row
        ordered = [HIDDEN, *sorted(labels, key=lambda label: (_NUMBER.fullmatch(label) is None, label))]
        values = " ".join(ordered) if len(ordered) == self.num_classes else "with one value for each label word"
        raise UsageError(
            f"{where}: column {self.label_column!r} holds -1 beside {', '.join(ordered[1:])}, and -1 stands for no "
            f"label unless --labels names it: if it is a class, give --labels {values}; if not, take those rows out."
        )

    def spellings(self, rows: Sequence[Row]) -> tuple[Label, ...]:
        """Return the label of each class as a table writes it most often: a text, a number, or true or false.

        A class that no row has goes by its word if all labels of the table are words, or else by its name; among
        labels of another type than text, by its name in that type.

        Args:
            rows: Labelled rows.

        Example:
            >>> task = PromptTask("{text}", ("bad", "good"))
            >>> task.spellings([{"label": label} for label in ("Good", "good", "Good")])
            ('bad', 'Good')
            >>> task.spellings([{"label": 1}]), task.spellings([{"label": True}])
            ((0, 1), (False, True))
            >>> task.spellings([{"label": 1}, {"label": "0"}])
            ('0', '1')
        """
        values = [_as_written(row[self.label_column]) for row in rows]
        kind = _common_type(values)
        counts = [Counter[Label]() for _ in self.label_words]
        for row, value in zip(rows, values, strict=True):
            counts[self.label(row)][value if kind is not str else str(value)] += 1
        words = {word.strip().casefold() for word in self.label_words}
        written = {str(value).casefold() for value in values}
        named = [word.strip() for word in self.label_words] if written and written <= words and not self.labels else []
        absent = named or [alternatives(name)[0] for name in self.names()]
        return tuple(
            count.most_common(1)[0][0] if count else _in_type(name, kind)
            for count, name in zip(counts, absent, strict=True)
        )

    def names(self) -> tuple[str, ...]:
        """Return what the label column holds: ``labels``; else the positions, or the words if those are numbers."""
        if self.labels:
            return self.labels
        if any(_NUMBER.fullmatch(word) for word in self.label_words):
            return self.label_words
        return tuple(str(number) for number in range(self.num_classes))


def alternatives(label: str) -> list[str]:
    r"""Return the texts that a label stands for.

    Example:
        >>> alternatives("0|DESC"), alternatives(as_label("either|or"))
        (['0', 'DESC'], ['either|or'])
    """
    return [part.replace(r"\|", "|") for part in re.split(r"(?<!\\)\|", label)]


def as_label(text: str) -> str:
    """Return the label that stands for one text, whatever its characters; see :func:`alternatives`."""
    return text.replace("|", r"\|")


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
_INTEGER = re.compile(r"[+-]?\d+")
_WHOLE = re.compile(r"([+-]?\d+)\.0*")
_BOOLEANS = {"0": False, "1": True, "false": False, "true": True}


def label_as_text(value: object) -> str:
    """Return a label as text; 1.0 is 1, since tables with empty cells write whole numbers so."""
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def _as_written(value: object) -> Label:
    """Return a label as JSON holds it; what JSON cannot hold becomes text."""
    value = plain_number("label", value)
    return value if isinstance(value, (bool, int, float)) else str(value).strip()


def _common_type(values: Iterable[Label]) -> type:
    """Return the type of all labels; text if they have several, unless all are numbers.

    Example:
        >>> _common_type([1, 0]), _common_type([1, 0.5]), _common_type([1, "0"]), _common_type([])
        (<class 'int'>, <class 'float'>, <class 'str'>, <class 'str'>)
    """
    kinds = {type(value) for value in values}
    if kinds == {int, float}:
        return float
    return kinds.pop() if len(kinds) == 1 else str


def _in_type(name: str, kind: type) -> Label:
    """Return the name of a class as a value of a type, or as the text it is where that has no such value.

    Example:
        >>> _in_type("1", bool), _in_type("1.5", float), _in_type("1", str), _in_type("good", int)
        (True, 1.5, '1', 'good')
    """
    if kind is bool:
        return _BOOLEANS.get(name.casefold(), name)
    number = {int: _INTEGER, float: _NUMBER}.get(kind)
    return kind(name) if number is not None and number.fullmatch(name) else name


def is_on_scale(value: object) -> bool:
    """Whether a label is a number between the whole ones."""
    try:
        return not float(str(value)).is_integer()
    except (ValueError, OverflowError):
        return False
