"""Question answering by generation: trained on the answer's tokens, scored by what greedy decoding writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.base import Task, is_missing


@dataclass(frozen=True)
class GenerationTask(Task):
    r"""A task whose answer is written out.

    The label column holds the answer, or a list of answers that all count (the first is trained on).  Decoding stops at
    the ending after an answer, or at a token that ends a text.

    Args:
        template: Text with columns in braces.
        ending: What marks the end of an answer, as the tokenizer writes it: a line break or some other text.  Only
            sequence-to-sequence models, which learn to end their answers, need none (``ending=""``).

    Example:
        >>> task = GenerationTask("Question: {question}\nAnswer:", label_column="answers")
        >>> row = {"question": "Who?", "answers": ["Ada Lovelace", "Ada"]}
        >>> task.options(row), task.references(row)
        ((' Ada Lovelace\n',), ('Ada Lovelace', 'Ada'))
    """

    kind: ClassVar[str] = "generation"

    ending: str = "\n"

    def references(self, row: Row) -> tuple[str, ...]:
        """Return every answer that counts.

        Raises:
            UsageError: If there is none.
        """
        answers = self._answers(row)
        if not answers:
            raise UsageError(f"Column {self.label_column!r} holds no answer in the row {dict(row)!r:.200}.")
        return tuple(dict.fromkeys(answers))

    def options(self, row: Row) -> tuple[str, ...]:
        """Return the one text to be trained on: the first answer and the ending."""
        return (f"{self._lead()}{self.references(row)[0]}{self.ending}",)

    def fillers(self, row: Row) -> tuple[str, ...]:
        """Refuse: a masked language model does not write answers.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "This task's answers are generated, which a masked language model does not do: use a causal language model."
        )

    def correct(self, row: Row) -> tuple[int, ...]:
        """Return the one text there is, after checking that the row has an answer."""
        self.references(row)
        return (0,)

    def unlabelled(self, row: Row) -> bool:
        """Whether the row has no answer."""
        return not self._answers(row)

    def _answers(self, row: Row) -> list[str]:
        """Return every answer in the label column that holds text."""
        value = row.get(self.label_column)
        if isinstance(value, Mapping):  # a list of answers as published: {"text": [...], ...} or {"spans": [...], ...}
            value = value.get("text", value.get("spans"))
        values = value if isinstance(value, (list, tuple)) else [value]
        return [text for answer in values if not is_missing(answer) and (text := str(answer).strip())]
