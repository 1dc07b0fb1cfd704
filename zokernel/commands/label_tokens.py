"""Label words as a model's tokens, where a command looks at one token's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zokernel.errors import UsageError


def label_tokens(tokenizer: Any, words: Sequence[str], otherwise: str = "") -> list[int]:
    """Return the token of each label word after a space.

    Args:
        tokenizer: The model's tokenizer.
        words: The words, with the space or without it.
        otherwise: What else the user may do, for the message.

    Raises:
        UsageError: If a word is not one token.
    """
    tokens = [tokenizer(f" {word.lstrip()}", add_special_tokens=False)["input_ids"] for word in words]
    for word, ids in zip(words, tokens, strict=True):
        if len(ids) != 1:
            raise UsageError(f"Label word {word!r} is {len(ids)} tokens: choose words of one token{otherwise}.")
    return [ids[0] for ids in tokens]
