"""What an encoded example is, and how one that is too long is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zokernel.errors import UsageError


@dataclass(frozen=True)
class Encoded:
    """One example, tokenized.

    Attributes:
        prompt_ids: Tokens before the options (or before the mask).
        option_ids: Tokens of each option.
        label: The right option.
        suffix_ids: Tokens after the mask; only for masked language models.
        mask_id: The mask token, for masked language models.
        correct: Every right option, when several are.
        references: Right answers as text, for generation.
        lost: Tokens that were cut off to keep the maximum length.
        decoder_start: What a decoder reads before the options, for sequence-to-sequence models; the prompt is then what
            their encoder reads.
        forced: Tokens that every answer begins with, which decoding therefore does not choose.
    """

    prompt_ids: list[int]
    option_ids: list[list[int]]
    label: int
    suffix_ids: tuple[int, ...] = ()
    mask_id: int | None = None
    correct: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    lost: int = 0
    decoder_start: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()


@dataclass(frozen=True)
class Context:
    """Text put before every prompt, such as demonstrations.

    Attributes:
        text: The text.
        shadow: The same text with the control tokens of its rows hidden, as
            :class:`~zokernel.finetune.tasks.control_tokens.ControlTokens` reads it.
    """

    text: str
    shadow: str


def choices_and_answers(
    options: list[tuple[str, ...]], correct: list[tuple[int, ...]], only_answer: bool
) -> tuple[list[tuple[str, ...]], list[tuple[int, ...]]]:
    """Return every example's options and which of them are right; the right one alone if nothing else is needed."""
    if not only_answer:
        return options, correct
    return [(choices[right[0]],) for choices, right in zip(options, correct)], [(0,)] * len(options)


def refuse_empty_option(option: str, ids: Sequence[int]) -> None:
    """Refuse an option without tokens: the mean of no log-probabilities would beat every other option's.

    Raises:
        UsageError: If it has none.
    """
    if not ids:
        raise UsageError(f"The option {option!r} has no tokens for this model: choose other words.")


def keep_end(ids: list[int], room: int, tokenizer: Any) -> list[int]:
    """Drop tokens at the front, but a leading special token, until ``room`` are left."""
    if len(ids) <= room:
        return ids
    first = int(ids[0] in tokenizer.all_special_ids)
    _check_room(room, first)
    return ids[:first] + ids[len(ids) - room + first :]


def keep_start(ids: list[int], room: int, tokenizer: Any) -> list[int]:
    """Drop tokens at the end, but a trailing special token, until ``room`` are left."""
    if len(ids) <= room:
        return ids
    last = int(ids[-1] in tokenizer.all_special_ids)
    _check_room(room, last)
    return ids[: room - last] + ids[len(ids) - last :]


def _check_room(room: int, special: int) -> None:
    if room <= special:
        raise UsageError("max_length leaves no room for the prompt beside its longest option: raise --max_length.")
