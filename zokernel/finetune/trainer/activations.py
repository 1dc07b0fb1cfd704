"""What the activations of a step take, logged when the rows are encoded and the way of perturbing is settled."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from zokernel.errors import UsageError
from zokernel.finetune.models.kind import kind_of_model
from zokernel.finetune.models.memory_setups import Sizes, measure
from zokernel.finetune.trainer.choose_perturb import innermost
from zokernel.offload.streamed_forward import StreamedForward
from zokernel.optim import ZerothOrder
from zokernel.perturb import Stacked
from zokernel.readable import plural, readable_bytes
from zokernel.without_adapter import without_adapter

logger = logging.getLogger(__name__)


def log_activations(optimizer: ZerothOrder, model: Any, longest: Mapping[str, Any]) -> None:
    """Log what the activations of a step take.

    Args:
        optimizer: The optimizer of the run.
        model: A language model, with its adapter.
        longest: The batch of the longest examples.
    """
    dtype = next(model.parameters()).dtype
    try:
        sizes = measure(without_adapter(model).config, dtype, kind=kind_of_model(model))
    except (UsageError, AttributeError) as error:  # a model of somebody's own
        logger.debug("The activations are not counted: %s", error)
        return
    losses, tokens, scored = _losses_in_memory(optimizer), tokens_of(longest), scored_of(longest)
    is_streamed = isinstance(innermost(optimizer.perturb), StreamedForward)
    total = activation_bytes(sizes, optimizer, tokens, scored)
    border = sizes.border(tokens, losses=losses) if is_streamed else 0
    logger.info(
        "Activations: about %s%s (%s of at most %s, of which %d %s scored).",
        readable_bytes(total),
        f", of which {readable_bytes(border)} are kept between blocks" if is_streamed else "",
        plural(losses, "loss") if losses > 1 else "1 loss at a time",
        plural(tokens, "token"),
        scored,
        "is" if scored == 1 else "are",
    )


def activation_bytes(sizes: Sizes, optimizer: ZerothOrder, tokens: int, scored: int) -> int:
    """Return the bytes of activations of a step.

    Args:
        sizes: Of the model.
        optimizer: The optimizer of the run.
        tokens: Tokens of a batch, padding included.
        scored: Positions of the batch whose logits are taken.
    """
    losses = _losses_in_memory(optimizer)
    if isinstance(innermost(optimizer.perturb), StreamedForward):
        return sizes.streamed(tokens, losses=losses, scored=scored)
    return sizes.activations(tokens, losses=losses, scored=scored)


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Return the tokens of a batch, padding included: of the longer side, if there are two."""
    sides = [batch[name] for name in ("input_ids", "decoder_input_ids") if name in batch]
    return max((side.numel() for side in sides), default=0)


def scored_of(batch: Mapping[str, Any]) -> int:
    """Return how many positions of a batch are scored."""
    positions = batch.get("positions")
    return int(positions.numel()) if isinstance(positions, torch.Tensor) else tokens_of(batch)


def _losses_in_memory(optimizer: ZerothOrder) -> int:
    """Return how many losses are in memory together."""
    perturb, losses = innermost(optimizer.perturb), optimizer.forwards_per_step
    if isinstance(perturb, StreamedForward):
        return min(losses, perturb.max_together)
    return min(losses, perturb.max_copies) if isinstance(perturb, Stacked) else 1
