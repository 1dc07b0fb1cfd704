"""Prompt-based classification: a template with columns of a table, and one label word (or phrase) for each class."""

from __future__ import annotations

import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zokernel.data.tables import Row
from zokernel.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptTask:
    r"""A classification task phrased as a cloze question.

    The score of class c is the model's mean log-probability of the tokens of ``label_words[c]`` after the prompt.

    Args:
        template: Text with columns in braces, such as ``{sentence} It was``.
        label_words: One word or phrase a class, in class order, without the space before it.
        labels: What the label column holds for each class; ``0, 1, ...`` when empty.
        label_column: Name of the label column.

    Raises:
        UsageError: If the template names no column, or there are fewer than two distinct label words.

    Example:
        >>> task = PromptTask("{sentence} It was", ("terrible", "great"))
        >>> task.prompt({"sentence": "A joy .", "label": 1}), task.options(), task.label({"label": "1"})
        ('A joy . It was', (' terrible', ' great'), 1)
    """

    template: str
    label_words: tuple[str, ...]
    labels: tuple[str, ...] = ()
    label_column: str = "label"
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise UsageError(
                f"The template {self.template!r} is malformed ({error}): write columns as {{name}}."
            ) from error
        if not fields or not all(name.isidentifier() for name in fields):
            raise UsageError(
                f"The template {self.template!r} must name columns in braces, such as '{{sentence}} It was'."
            )
        if len(set(self.label_words)) < 2 or len(set(self.label_words)) != len(self.label_words):
            raise UsageError(f"label_words must be two or more distinct words, not {list(self.label_words)}.")
        if self.labels and len(self.labels) != len(self.label_words):
            raise UsageError(f"There are {len(self.labels)} labels for {len(self.label_words)} label words.")
        object.__setattr__(self, "columns", tuple(dict.fromkeys(fields)))

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.label_words)

    def prompt(self, row: Row) -> str:
        """Fill the template with the columns of ``row``."""
        return self.template.format_map({name: str(row[name]).strip() for name in self.columns})

    def options(self) -> tuple[str, ...]:
        """Return the text that follows the prompt for each class, with a space before it where one is needed."""
        ends_open = self.template[-1:].isspace()
        return tuple(word if ends_open else f" {word}" for word in self.label_words)

    def label(self, row: Row) -> int:
        """Return the class of ``row``.

        Raises:
            UsageError: If the label is none of the classes.
        """
        value = str(row[self.label_column]).strip()
        names = self.labels or tuple(str(number) for number in range(self.num_classes))
        if value in names:
            return names.index(value)
        if value in self.label_words:
            return self.label_words.index(value)
        raise UsageError(
            f"Label {value!r} in column {self.label_column!r} is none of {', '.join(names)}, for the label words "
            f"{', '.join(self.label_words)}: add the missing word, or map values with --labels."
        )

    def check_columns(self, rows: Sequence[Row], *, where: str) -> None:
        """Check that a table has every column the task uses.

        Raises:
            UsageError: If one is missing; the message lists those there are.
        """
        for column in (*self.columns, self.label_column):
            if column not in rows[0]:
                raise UsageError(
                    f"{where} has no column {column!r} (it has {', '.join(map(str, rows[0]))}): "
                    "change --template or --label_column, or name the columns with --column_names."
                )


@dataclass(frozen=True)
class Encoded:
    """One example, tokenized.

    Attributes:
        prompt_ids: Tokens of the prompt.
        option_ids: Tokens of each class's option.
        label: The class.
    """

    prompt_ids: list[int]
    option_ids: list[list[int]]
    label: int


def encode(task: PromptTask, rows: Sequence[Row], tokenizer: Any, *, max_length: int = 2048) -> list[Encoded]:
    """Tokenize every example with every option, splitting prompt from option by character position.

    Splitting by position is right for every tokenizer; the difference of token counts, as public code takes it, assumes
    that the prompt's tokens are a prefix of the whole text's.

    Args:
        task: Template and label words.
        rows: The table.
        tokenizer: A fast tokenizer of transformers.
        max_length: Longest sequence; longer prompts lose tokens at the front (a leading special token is kept).

    Returns:
        One :class:`Encoded` a row.

    Raises:
        UsageError: If the tokenizer gives no character offsets, or a label is none of the classes.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError("The tokenizer gives no character offsets: use a fast tokenizer (AutoTokenizer's default).")
    options = task.options()
    prompts = [task.prompt(row) for row in rows]
    texts = [prompt + option for prompt in prompts for option in options]
    batch = tokenizer(texts, return_offsets_mapping=True)
    examples = []
    for number, (row, prompt) in enumerate(zip(rows, prompts)):
        splits = []
        for choice in range(len(options)):
            position = number * len(options) + choice
            ids, offsets = batch["input_ids"][position], batch["offset_mapping"][position]
            splits.append(_split(ids, offsets, len(prompt)))
        prompt_ids = splits[0][0]
        # An option may pull the prompt's last characters into its first token, each in its own way; the shared prompt
        # is then what all of them have in common.
        common = min(_common_prefix(prompt_ids, other) for other, _ in splits)
        option_ids = [head[common:] + tail for head, tail in splits]
        prompt_ids = prompt_ids[:common]
        room = max_length - max(map(len, option_ids))
        if len(prompt_ids) > room:
            keep_first = int(prompt_ids[0] in tokenizer.all_special_ids)
            prompt_ids = prompt_ids[:keep_first] + prompt_ids[len(prompt_ids) - room + keep_first :]
        examples.append(Encoded(prompt_ids, option_ids, task.label(row)))
    return examples


def _split(ids: list[int], offsets: list[tuple[int, int]], boundary: int) -> tuple[list[int], list[int]]:
    """Split tokens at a character: the option starts with the first token that reaches beyond the prompt."""
    cut = next((i for i, (_, end) in enumerate(offsets) if end > boundary), len(ids))
    last = max((i for i, (start, end) in enumerate(offsets) if end > start), default=-1) + 1  # drop a trailing EOS
    return ids[:cut], ids[cut:last]


def _common_prefix(left: list[int], right: list[int]) -> int:
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)


def report_label_words(examples: Sequence[Encoded], task: PromptTask) -> bool:
    """Log which label words are more than one token, and return whether all are single tokens in every example."""
    single = True
    for choice, word in enumerate(task.label_words):
        longest = max(len(example.option_ids[choice]) for example in examples)
        if longest > 1:
            single = False
            logger.info("Label word %r is up to %d tokens: scored by the mean over its tokens.", word, longest)
    return single
