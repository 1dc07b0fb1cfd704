"""Chats, completions, instructions and texts as tokens, with those that count for the loss, as trl 1.16 has them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.alpaca import alpaca_messages, alpaca_prompt
from zokernel.finetune.tasks.base import is_missing
from zokernel.finetune.tasks.chat_template import assistant_tokens, has_chat_template, render
from zokernel.finetune.tasks.text import columns_of_form, messages_of, read_as
from zokernel.readable import plural

logger = logging.getLogger(__name__)

SHOWN_TOKENS = 32  # tokens of a text that its continuation is shown for


_ANSWER = [{"role": "assistant", "content": "."}]  # in the place of one that is not known
_QUESTIONS = {
    "messages": ("messages", "conversations", "prompt"),
    "prompt-completion": ("prompt",),
    "instruction": ("instruction",),
    "text": ("text",),
}
_REQUESTS = {"messages": "prompt", "prompt-completion": "prompt", "instruction": "instruction", "text": "text"}


@dataclass(frozen=True)
class EncodedText:
    """One row of tokens.

    Attributes:
        input_ids: Its tokens.
        scored: Places of the tokens that count for the loss, in order; never the first of a document.
        lengths: Tokens of each document in the row: several if they are packed.
        source_ids: What the encoder of a sequence-to-sequence model reads; ``input_ids`` are then its decoder's.
    """

    input_ids: list[int]
    scored: list[int]
    lengths: list[int]
    source_ids: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many tokens a model reads."""
        return len(self.source_ids) + len(self.input_ids)


@dataclass(frozen=True)
class TextEncoder:
    """Turns rows of a :class:`~zokernel.finetune.tasks.text.TextTask` into tokens.

    Args:
        tokenizer: A fast tokenizer.
        form: The form of the rows.
        assistant_only_loss: Whether only what the assistant wrote counts.
        completion_only_loss: Whether only the completion counts.
        max_length: Longest row; longer ones lose their end.
    """

    tokenizer: Any
    form: str
    assistant_only_loss: bool
    completion_only_loss: bool
    max_length: int

    def encode(self, rows: Sequence[Row], *, where: str) -> list[EncodedText]:
        """Return the rows that have a token to learn; the others are left out and counted.

        Raises:
            UsageError: If none is left, or a chat cannot be rendered.
        """
        encoded, empty = [], 0
        cut: Counter[str] = Counter()
        for row in rows:
            example, lost = self.example(row)
            cut.update(lost)
            if example.scored:
                encoded.append(example)
            else:
                empty += 1
        for part, count in cut.items():
            verb = f"loses {part.format('its')}" if count == 1 else f"lose {part.format('their')}"
            logger.info("%s: %d of %s %s at %d tokens.", where, count, plural(len(rows), "row"), verb, self.max_length)
        if empty:
            verbs = ("has", "is") if empty == 1 else ("have", "are")
            message = "%s: %d of %s %s no token to learn and %s left out."
            logger.info(message, where, empty, plural(len(rows), "row"), *verbs)
        if not encoded:
            if any(map(self.is_too_long, rows)):
                raise UsageError(
                    f"{where}: no row has a token to learn within {self.max_length} tokens: raise --max_length."
                )
            raise UsageError(f"{where}: no row has a token to learn: {_nothing_counts(rows)}.")
        return encoded

    def is_too_long(self, row: Row) -> bool:
        """Whether tokens of a row count, and all of them lie behind ``max_length``."""
        return any(self.tokens(row)[1][1:])

    def check(self, rows: Sequence[Row]) -> None:
        """Check before the weights are loaded that rows can be tokenized, by the first of them.

        Raises:
            UsageError: If they cannot.
        """
        self.tokens(rows[0])

    def example(self, row: Row) -> tuple[EncodedText, list[str]]:
        """Return a row as tokens, and which parts of it were cut off."""
        ids, marks = self.tokens(row)
        lost = ["{} end"] if len(ids) > self.max_length else []
        ids, marks = ids[: self.max_length], marks[: self.max_length]
        return EncodedText(ids, [place for place, mark in enumerate(marks) if mark and place], [len(ids)]), lost

    def tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """Return the tokens of a row, and which of them count."""
        if self.form == "text":
            ids = self._plain(self._with_end(row["text"]))
            return ids, [True] * len(ids)
        options = self._options(row)
        if self.form == "messages":
            ids = self._chat(row["messages"], **options)
            return ids, self._learned_marks(row["messages"], ids, options)
        prompt, completion = self._parts(row)
        if isinstance(prompt, str):
            before, ids = self._plain(prompt), self._plain(prompt + self._with_end(completion))
            marks = [True] * len(ids)
        else:
            before = self._chat(prompt, add_generation_prompt=True, **options)
            ids = self._chat([*prompt, *completion], **options)
            marks = self._learned_marks([*prompt, *completion], ids, options)
        if self.completion_only_loss:
            # Tokens may merge across the boundary: the completion begins where the two diverge.
            begin = next((n for n, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))
            marks = [False] * begin + marks[begin:]
        return ids, marks

    def _learned_marks(
        self, messages: Sequence[Mapping[str, Any]], ids: Sequence[int], options: Mapping[str, Any]
    ) -> list[bool]:
        if self.assistant_only_loss:
            return assistant_tokens(self.tokenizer, messages, **options)
        if not all(message.get("weight", 1) for message in messages):
            raise UsageError(
                "Messages of weight 0 are left out of the loss of the assistant's tokens alone: set "
                "--assistant_only_loss true, or take the weights out of the chats."
            )
        return [True] * len(ids)

    def prompt(self, row: Row) -> tuple[list[int], str]:
        """Return what a model would be asked with, and the answer in the row.

        Of a chat, everything before the assistant's last message; of a text, its first half, up to 32 tokens.
        """
        if self.form == "text":
            ids = self._plain(row["text"])
            half = max(1, min(SHOWN_TOKENS, len(ids) // 2))
            return ids[:half], self.tokenizer.decode(ids[half : half + 4 * SHOWN_TOKENS])
        options = self._options(row)
        if self.form == "messages":
            messages = row["messages"]
            last = max((n for n, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
            prompt, completion = messages[:last], messages[last : last + 1]
        else:
            prompt, completion = self._parts(row)
        if isinstance(prompt, str):
            return self._plain(prompt), str(completion)
        ids = self._chat(prompt, add_generation_prompt=True, **options) if prompt else self._plain("")
        return ids, "\n".join(str(message.get("content", "")) for message in completion)

    def request(self, row: Mapping[str, Any] | str) -> list[int]:
        """Return the tokens after which the model answers; the row needs no answer.

        Args:
            row: A row in the form of the task, with or without its answer; or what the user says, as a text.

        Raises:
            UsageError: If the row is in another form.
        """
        completed = self._complete_request(row)
        return self._plain(completed["text"]) if self.form == "text" else self.prompt(completed)[0]

    def asks_nothing(self, row: Mapping[str, Any] | str) -> bool:
        """Whether a row in the form of the task has no text to answer.

        Raises:
            UsageError: If the row is in another form.
        """
        return self._read_request(row) is None

    def _complete_request(self, row: Mapping[str, Any] | str) -> Row:
        """Return a row in the form of the task, with an answer that is not known in its place."""
        completed = self._read_request(row)
        if completed is None:
            raise UsageError(f"there is nothing to answer in {_QUESTIONS[self.form][0]!r}.")
        return completed

    def _read_request(self, row: Mapping[str, Any] | str) -> Row | None:
        """Return a row in the form of the task, or None if it has no text to answer."""
        column = _QUESTIONS[self.form][0]
        if not isinstance(row, str) and not any(name in row for name in _QUESTIONS[self.form]):
            columns, expected = ", ".join(map(repr, row)), " and ".join(map(repr, columns_of_form(self.form)))
            raise UsageError(
                f"it has {columns or 'no column'}, and the run learned from rows with {expected}: put what is to be "
                f"answered into a column {column!r}."
            )
        row = {_REQUESTS[self.form]: row} if isinstance(row, str) else dict(row)
        if self.form == "messages":
            column = "conversations" if "conversations" in row else "messages"
            chat = row.get(column) or [{"role": "user", "content": row.get("prompt") or ""}]
            messages = messages_of(chat, column)
            is_answered = bool(messages) and messages[-1]["role"] == "assistant"
            row[column] = messages if is_answered or not messages else [*messages, *_ANSWER]
        elif self.form == "prompt-completion":
            if all(is_missing(part) or not str(part).strip() for part in (row.get("prompt"), row.get("system"))):
                return None
            _fill(row, "completion", "." if isinstance(row.get("prompt"), str) else _ANSWER)
        elif self.form == "instruction":
            _fill(row, "output", ".")
        return read_as(self.form, row)

    def _parts(self, row: Row) -> tuple[Any, Any]:
        if self.form == "prompt-completion":
            return row["prompt"], row["completion"]
        if has_chat_template(self.tokenizer):
            return alpaca_messages(row)
        return alpaca_prompt(row), row["output"]

    def _options(self, row: Row) -> dict[str, Any]:
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        return {**tools, **row.get("chat_template_kwargs", {})}

    def _chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        return list(render(self.tokenizer, messages, tokenize=True, **options))

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _with_end(self, text: str) -> str:
        end = self.tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end


def _fill(row: dict[str, Any], name: str, value: Any) -> None:
    """Put a value into a cell that is missing or empty."""
    if is_missing(row.get(name)) or row[name] in ("", []):
        row[name] = value


def _nothing_counts(rows: Sequence[Row]) -> str:
    """Return why no token of any row counts, though none is too long."""
    parts = [row.get(name) for row in rows for name in ("messages", "completion")]
    turns = [message for part in parts if isinstance(part, list) for message in part]
    answers = [message for message in turns if message["role"] == "assistant"]
    if turns and not answers:
        return "no chat has an assistant's turn"
    if answers and not any(message.get("weight", 1) for message in answers):
        return "all of the assistant's turns have weight 0"
    return "the first token of a text is never predicted, and there is no other"
