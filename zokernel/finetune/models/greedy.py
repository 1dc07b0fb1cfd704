"""Greedy decoding with ``generate`` of transformers: its settings, and the tokens at which it stops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig


def greedy_settings(max_new_tokens: int, ends: Iterable[int], pad_token_id: int | None) -> GenerationConfig:
    """Return settings that take the most likely token, whatever the model was published with.

    Args:
        max_new_tokens: Length of the longest answer.
        ends: Tokens that end an answer.
        pad_token_id: Any token.

    Example:
        >>> settings = greedy_settings(8, [7, 2, 7], 0)
        >>> settings.eos_token_id, settings.num_beams, settings.repetition_penalty
        ([2, 7], 1, 1.0)
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(set(ends)) or None,
        pad_token_id=pad_token_id,
        use_cache=True,
        # Published beams, minimum lengths and penalties on repetition would not be greedy.
        num_beams=1,
        min_length=0,
        no_repeat_ngram_size=0,
        repetition_penalty=1.0,
    )


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: the tokenizer's, and those that the model was published with.

    Args:
        model: A model of transformers, or a wrapper of one.
        tokenizer: Its tokenizer.

    Example:
        >>> from types import SimpleNamespace as Named
        >>> model = Named(generation_config=Named(eos_token_id=[7, 2]))
        >>> sorted(end_tokens(model, Named(eos_token_id=3))), end_tokens(model, Named(eos_token_id=None))
        ([2, 3, 7], {2, 7})
    """
    own = getattr(model, "module", model).generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])} - {None}
