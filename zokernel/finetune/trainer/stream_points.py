"""Streamed weights: all losses of a step in one pass over them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from zokernel.errors import UsageError
from zokernel.finetune.trainer.choose_perturb import perturbs_in_place
from zokernel.offload.blocks import streamed_blocks
from zokernel.offload.streamed_forward import StreamedForward
from zokernel.optim import ZerothOrder
from zokernel.optim.averaging.averages import IterateAverage
from zokernel.perturb.in_forward import BY_POSITION

logger = logging.getLogger(__name__)


def stream_points(optimizer: ZerothOrder, model: nn.Module) -> str | None:
    """Let an optimizer take the losses of a step together, if the weights of its model are streamed.

    Args:
        optimizer: The optimizer of the run.
        model: The model, with its adapter.

    Returns:
        How the run perturbs; None if that is not for this function to say.

    Raises:
        UsageError: If the method needs more of streamed weights than scalars times directions.
    """
    blocks = streamed_blocks(model)
    if blocks is None or optimizer.perturb.name == "stacked":
        return None
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    copy = base.working_copy
    if optimizer.perturb.name != "in_forward" and not perturbs_in_place(optimizer):
        raise UsageError(
            f"This method takes its losses by {optimizer.perturb.name}, which does not stream weights: choose another "
            "method, or leave out --offload."
        )
    averages = any(isinstance(part, IterateAverage) for part in optimizer.updates)
    plain = optimizer.moves_along_directions and isinstance(optimizer.directions, BY_POSITION)
    if copy is not None and (averages or not plain):
        raise UsageError(
            "Streamed weights are updated by scalars times directions only, and this method keeps or adds more "
            "(momentum, Adam, averages): choose a plain one such as mezo, train an adapter, or leave out --offload."
        )
    optimizer.perturb = StreamedForward(blocks, model, copy)
    logger.info(
        "perturb: in_forward, %d losses of a step together in one pass over the weights.", optimizer.forwards_per_step
    )
    return "in_forward"


def say_activations(optimizer: ZerothOrder, model: Any, longest: Callable[[], Mapping[str, Any]]) -> None:
    """Log what the losses of a step hold together at the border of a block, if weights are streamed.

    Args:
        optimizer: The optimizer of the run.
        model: The model, with its adapter.
        longest: Returns the batch of the longest examples.
    """
    if not isinstance(optimizer.perturb, StreamedForward):
        return
    sizes = [value.numel() for value in longest().values() if isinstance(value, torch.Tensor) and value.ndim == 2]
    width, kind = model.config.get_text_config().hidden_size, next(model.parameters()).dtype
    losses, tokens = optimizer.forwards_per_step, max(sizes, default=0)
    logger.info(
        "Activations: %.1f MiB at the border of a block (%d losses of at most %d tokens), and inside a block those of "
        "one loss.",
        losses * tokens * width * kind.itemsize / 2**20,
        losses,
        tokens,
    )
