"""Streamed weights: all losses of a step in one pass over them."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from zokernel.errors import UsageError
from zokernel.finetune.trainer.choose_perturb import perturbs_in_place
from zokernel.finetune.trainer.make_optimizer import make_optimizer
from zokernel.offload.blocks import streamed_blocks
from zokernel.offload.streamed_forward import StreamedForward
from zokernel.optim import ZerothOrder
from zokernel.optim.updates.averaging.averages import IterateAverage
from zokernel.perturb.in_forward import BY_POSITION
from zokernel.readable import plural
from zokernel.without_adapter import without_adapter

logger = logging.getLogger(__name__)

SMALL = (64, 64)  # a layer for which any method can be made


def check_streamed(args: Any, *, trains_weights: bool) -> None:
    """Refuse a method that cannot train streamed weights, before any are read.

    Args:
        args: The settings of the run.
        trains_weights: Whether the streamed weights themselves are trained, not an adapter.

    Raises:
        UsageError: If the method needs more of streamed weights than scalars times directions.
    """
    if args.perturb != "stacked":
        _check(make_optimizer(nn.Linear(*SMALL), [], args), trains_weights=trains_weights)


def stream_points(optimizer: ZerothOrder, model: nn.Module, perturb: str) -> str | None:
    """Let an optimizer take the losses of a step together, if the weights of its model are streamed.

    Args:
        optimizer: The optimizer of the run.
        model: The model, with its adapter.
        perturb: How losses are to be taken: ``stacked`` stays, for streamed weights, too.

    Returns:
        How the run perturbs; None if that is not for this function to say.

    Raises:
        UsageError: If the method needs more of streamed weights than scalars times directions.
    """
    blocks = streamed_blocks(model)
    if blocks is None or perturb == "stacked":
        return None
    copy = without_adapter(model).working_copy
    _check(optimizer, trains_weights=copy is not None)
    optimizer.perturb = StreamedForward(blocks, model, copy)
    logger.info(
        "perturb: in_forward, %s of a step together in one pass over the weights.",
        plural(optimizer.forwards_per_step, "loss"),
    )
    return "in_forward"


def _check(optimizer: ZerothOrder, *, trains_weights: bool) -> None:
    if optimizer.perturb.name != "in_forward" and not perturbs_in_place(optimizer):
        raise UsageError(
            f"This method takes its losses by {optimizer.perturb.name}, which does not stream weights: choose another "
            "method, or leave out --offload."
        )
    keeps_averages = any(isinstance(part, IterateAverage) for part in optimizer.updates)
    is_plain = optimizer.moves_along_directions and isinstance(optimizer.directions, BY_POSITION)
    if trains_weights and (keeps_averages or not is_plain):
        raise UsageError(
            "Streamed weights are updated by scalars times directions only, and this method keeps or adds more "
            "(momentum, Adam, averages): choose a plain one such as mezo, train an adapter, or leave out --offload."
        )


def make_streamed_forward(model: nn.Module, count: int) -> StreamedForward | None:
    """Return what takes losses of streamed weights, so many in one pass over them; None if they are in memory.

    Args:
        model: The model, with its adapter.
        count: Losses that are taken together; more take further passes.
    """
    blocks = streamed_blocks(model)
    return None if blocks is None else StreamedForward(blocks, model, max_together=count)
