"""Tokenizer and embeddings together: a token for padding, and tokens without a row of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from zokernel.errors import UsageError

logger = logging.getLogger(__name__)


def embedding_rows(model: nn.Module) -> int | None:
    """Return how many tokens a model has embeddings for; None if it does not say."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight: Any = getattr(embeddings, "weight", None)
    return int(weight.shape[0]) if getattr(weight, "ndim", 0) == 2 else getattr(embeddings, "num_embeddings", None)


def choose_pad_token(model: nn.Module, tokenizer: Any) -> None:
    """Give the tokenizer a padding token that the model has an embedding for.

    Padding is masked everywhere, so any token will do.  A padding token with an embedding is kept.

    Args:
        model: The model.
        tokenizer: Its tokenizer, which is changed in place.
    """
    rows = embedding_rows(model) or len(tokenizer)
    pad_token, pad_token_id = tokenizer.pad_token, tokenizer.pad_token_id
    if pad_token_id is not None and pad_token_id < rows:
        return
    ids = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(next(i for i in ids if i is not None and i < rows))
    if pad_token is not None:
        logger.info(
            "Padding: %r in place of %r, whose id %d is beyond the model's %d embeddings; padding is masked.",
            tokenizer.pad_token,
            pad_token,
            pad_token_id,
            rows,
        )


def check_token_ids(model: nn.Module, tokenizer: Any, sequences: Iterable[Iterable[int]]) -> None:
    """Check that the model has an embedding for every token that is used.

    Args:
        model: The model.
        tokenizer: Its tokenizer, for the message.
        sequences: The sequences of token ids that occur.

    Raises:
        UsageError: If a token has none, naming it and both sizes.
    """
    rows = embedding_rows(model)
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    if rows is None or largest < rows:
        return
    raise UsageError(
        f"The token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, and the model has {rows} embeddings "
        f"where its tokenizer has {len(tokenizer)} tokens: call model.resize_token_embeddings({len(tokenizer)}) and "
        "save it with save_pretrained, or use no tokens that were added."
    )
