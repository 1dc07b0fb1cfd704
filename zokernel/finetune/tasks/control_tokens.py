"""Control tokens that somebody typed: in a column of the table they are text, in the template they are meant."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

from zokernel.data.tables import Row
from zokernel.finetune.tasks.base import Task
from zokernel.finetune.tasks.template import literals
from zokernel.readable import plural

logger = logging.getLogger(__name__)

_AROUND = 30  # characters that are shown before and after a control token
_HIDDEN = "\ue000"  # a private character, which is no part of any control token


class ControlTokens:
    """Tokenizes texts whose columns may hold the names of control tokens, such as ``</s>`` or ``<|im_end|>``.

    A column's text never becomes a control token: whoever writes a row cannot end a prompt, or open another's turn.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        contents = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = sorted(contents | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names))) if names else re.compile(r"(?!)")

    def hide(self, value: Any) -> Any:
        """Return a column's value with every control token in it replaced by as many private characters."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: _HIDDEN * len(match[0]), value)
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {name: self.hide(item) for name, item in value.items()}
        return value

    def shadows(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with their control tokens hidden; a row without any stays the same object."""
        hidden = [self.hide(row) for row in rows]
        return [row if same == row else same for row, same in zip(rows, hidden)]

    def shadow_of_context(self, context: str, task: Task) -> str:
        """Return the text before the prompt with its control tokens hidden, unless the template has some of its own."""
        own = " ".join(
            (literals(task.template), literals(task.masked_template or ""), *getattr(task, "label_words", ()))
        )
        return context if self.pattern.search(own) else self.hide(context)

    def __call__(
        self, texts: Sequence[str], shadows: Sequence[str]
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Tokenize texts.

        Args:
            texts: The texts.
            shadows: The same texts, with the control tokens of the columns hidden.

        Returns:
            Tokens, and the characters that each of them stands for.
        """
        batch = self.tokenizer(list(texts), return_offsets_mapping=True)
        ids, offsets = list(batch["input_ids"]), list(batch["offset_mapping"])
        for n, (text, shadow) in enumerate(zip(texts, shadows)):
            if shadow != text:
                ids[n], offsets[n] = self._tokenize_literally(text, shadow)
        return ids, offsets

    def _tokenize_literally(self, text: str, shadow: str) -> tuple[list[int], list[tuple[int, int]]]:
        controls = list(self.pattern.finditer(shadow)) if len(shadow) == len(text) else []
        if not controls:
            whole = self.tokenizer(text, return_offsets_mapping=True, split_special_tokens=True)
            return whole["input_ids"], whole["offset_mapping"]
        ids, offsets = [], []
        start = 0
        for begin, end, name in [*((m.start(), m.end(), m[0]) for m in controls), (len(text), len(text), "")]:
            piece = self.tokenizer(
                text[start:begin], add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
            )
            ids += piece["input_ids"]
            offsets += [(start + first, start + last) for first, last in piece["offset_mapping"]]
            if name:
                ids.append(self.tokenizer.convert_tokens_to_ids(name))
                offsets.append((begin, end))
            start = end
        before, after = self._frame()
        return [*before, *ids, *after], [(0, 0)] * len(before) + offsets + [(0, 0)] * len(after)

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the tokens that the tokenizer puts before and after every text."""
        whole, bare = self.tokenizer("a")["input_ids"], self.tokenizer("a", add_special_tokens=False)["input_ids"]
        start = next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]


def report_typed_tokens(rows: Sequence[Row], tokenizer: Any) -> None:
    """Warn once of chats and instructions in which somebody typed control tokens.

    The tokenizer takes them for its own, as it does under trl.  Prompts and documents that are plain texts are not
    looked at: those are often rendered already.

    Args:
        rows: The rows of all splits, as their task read them.
        tokenizer: The tokenizer of the model.
    """
    pattern = ControlTokens(tokenizer).pattern
    typed = [
        (n, text, match)
        for n, row in enumerate(rows)
        for text in _message_texts(row)
        if (match := pattern.search(text))
    ]
    if not typed:
        return
    _, text, match = typed[0]
    begin, end = max(0, match.start() - _AROUND), match.end() + _AROUND
    count = len({n for n, _, _ in typed})
    logger.warning(
        "%d of %s %s control tokens typed into a message, which end it or open another's turn, as in trl; remove "
        "them if that is not intended (the first: %r).",
        count,
        plural(len(rows), "row"),
        "has" if count == 1 else "have",
        text[begin:end],
    )


def _message_texts(row: Row) -> Iterator[str]:
    """Yield the texts of a row that a template puts between control tokens."""
    for name in ("messages", "prompt", "completion"):
        for message in row[name] if isinstance(row.get(name), list) else ():
            if isinstance(message.get("content"), str):
                yield message["content"]
    if "instruction" in row:
        yield from (row[name] for name in ("instruction", "input", "output", "system"))
        yield from (text for turn in row["history"] for text in turn)
