"""Chats, instructions and completions for a sequence-to-sequence model: one text to read, and one to write."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.tasks.alpaca import alpaca_messages
from zokernel.finetune.tasks.chat_template import TRAIN_WITH, has_chat_template
from zokernel.finetune.tasks.encode_text import EncodedText, TextEncoder
from zokernel.finetune.tasks.encoded import keep_end
from zokernel.finetune.tasks.seq2seq import Decoder
from zokernel.finetune.tasks.text import Messages
from zokernel.readable import plural

logger = logging.getLogger(__name__)

_BEFORE_USER = ("system", "developer")


@dataclass(frozen=True)
class PairEncoder(TextEncoder):
    """Turns rows in any form but plain text into what the encoder reads and what the decoder writes.

    The decoder writes the last answer of a row that is to be learned; the encoder reads all that comes before it.  A
    chat is rendered by the tokenizer's chat template.  Without one, the encoder reads what the user says, after the
    system's text and a line break.

    Args:
        decoder: How the model frames texts.  Rows can be checked, and prompts be made, without it.
    """

    decoder: Decoder | None = None

    def check(self, rows: Sequence[Row]) -> None:
        """Check before the weights are loaded that rows can be read by the encoder, and say what is learned.

        Raises:
            UsageError: If they need a chat template, and there is none.
        """
        chats = [before for before in (self._pair(row)[0] for row in rows) if not isinstance(before, str)]
        rendered = bool(chats) and has_chat_template(self.tokenizer)
        if not rendered:
            unfit = [row for row in rows if _needs_template(self._pair(row)[0], row)]
            if unfit:
                raise UsageError(
                    f"{len(unfit)} of {plural(len(rows), 'row')} to train on, of several turns or with tools, "
                    f"{'needs' if len(unfit) == 1 else 'need'} a chat template to become one text for the encoder, and "
                    "the tokenizer has none: name one with --chat_template (a file, the template itself, or chatml)."
                )
        self.prompt(rows[0])
        how = " as the chat template renders it" if rendered else ""
        logger.info("The encoder reads what comes before the last answer%s; the decoder learns to write that.", how)
        several = sum(any(message["role"] == "assistant" for message in before) for before in chats)
        if several:
            logger.info(
                "%d of %s %s earlier answers, which the encoder reads but the decoder does not learn.",
                several,
                plural(len(rows), "row"),
                "has" if several == 1 else "have",
            )

    def example(self, row: Row) -> tuple[EncodedText, list[str]]:
        """Return a row as tokens, and which parts of it were cut off; nothing counts if there is no answer.

        Raises:
            UsageError: If ``max_length`` leaves no room for an answer.
        """
        assert self.decoder is not None
        source, lost = self._source(row)
        start, before, after = self.decoder.start, self.decoder.before, self.decoder.after
        room = self.max_length - len(before) - len(after)
        if room < 1:
            raise UsageError(f"--max_length {self.max_length} leaves no room for an answer: raise it.")
        text = self._pair(row)[1]
        ids = list(self.tokenizer(text_target=text, add_special_tokens=False)["input_ids"]) if text.strip() else []
        if after and tuple(ids[-len(after) :]) == after:  # somebody wrote the end out
            ids = ids[: -len(after)]
        if len(ids) > room:
            lost = [*lost, "the end of {} answer"]
        labels = [*before, *ids[:room], *after]
        scored = list(range(1, len(labels) + 1)) if ids and source else []
        return EncodedText([start, *labels], scored, [len(labels) + 1], source), lost

    def is_too_long(self, row: Row) -> bool:
        """Whether nothing counts because a row is too long: never, since source and answer are cut apart."""
        return False

    def prompt(self, row: Row) -> tuple[list[int], str]:
        """Return what the encoder reads, and the answer in the row."""
        return self._source(row)[0], self._pair(row)[1]

    def request(self, row: Mapping[str, Any] | str) -> list[int]:
        """Return what the encoder reads; the row needs no answer.

        Raises:
            UsageError: If the row is in another form.
        """
        completed = self._complete_request(row)
        if "messages" in completed:  # what was not to be learned is answered all the same
            completed["messages"] = [message | {"weight": 1} for message in completed["messages"]]
        ids, lost = self._source(completed)
        for part in lost:
            begin = self.tokenizer.decode(ids[:12], skip_special_tokens=True)
            logger.warning("A row loses %s at %d tokens (%r...).", part.format("its"), self.max_length, begin)
        return ids

    def _pair(self, row: Row) -> tuple[str | Messages, str]:
        """Return what comes before the last answer that is to be learned, and the answer; empty if there is none."""
        if self.form == "instruction":
            before, _ = alpaca_messages(row)
            return before, row["output"]
        if self.form == "prompt-completion" and isinstance(row["prompt"], str):
            return row["prompt"], row["completion"]
        first = len(row["prompt"]) if self.form == "prompt-completion" else 0
        messages = [*row["prompt"], *row["completion"]] if self.form == "prompt-completion" else row["messages"]
        answers = [n for n, m in enumerate(messages) if n >= first and m["role"] == "assistant" and m.get("weight", 1)]
        if not answers:
            return [], ""
        return messages[: answers[-1]], messages[answers[-1]]["content"]

    def _source(self, row: Row) -> tuple[list[int], list[str]]:
        """Return what the encoder reads, and which part of it was cut off.

        A text loses its end and keeps what the tokenizer puts around it; a chat loses its beginning, since the question
        comes last.
        """
        before, length = self._pair(row)[0], self.max_length
        if not isinstance(before, str) and before and has_chat_template(self.tokenizer):
            ids = self._chat(before, add_generation_prompt=True, **self._options(row))
            lost = ["the beginning of {} source"] if len(ids) > length else []
            return keep_end(ids, length, self.tokenizer), lost
        text = before if isinstance(before, str) else _plain_chat(before, row)
        ids = self._plain(text)
        if len(ids) <= length:
            return ids, []
        side = "end" if self.tokenizer.truncation_side == "right" else "beginning"
        ids = self.tokenizer(text, truncation=True, max_length=length)["input_ids"]
        return list(ids), [f"the {side} of {{}} source"]


def _plain_chat(messages: Messages, row: Row) -> str:
    """Return a chat of one turn without a template: the system's text, a line break, and what the user says."""
    if _needs_template(messages, row):
        raise UsageError(
            "A chat of several turns, or with tools, needs a chat template to become one text for the encoder: "
            f"{TRAIN_WITH}."
        )
    return "\n".join(message["content"] for message in messages if message["content"].strip())


def _needs_template(before: str | Messages, row: Row) -> bool:
    """Whether a row is more than what the system and the user say once."""
    if isinstance(before, str):
        return False
    turns = [message["role"] for message in before if message["role"] not in _BEFORE_USER]
    return turns not in ([], ["user"]) or bool(row.get("tools"))
