"""Streamed weights: all losses of a step in one pass over them."""

from __future__ import annotations

import logging

from torch import nn

from zokernel.errors import UsageError
from zokernel.finetune.trainer.choose_perturb import perturbs_in_place
from zokernel.offload.blocks import streamed_blocks
from zokernel.offload.streamed_forward import StreamedForward
from zokernel.optim import ZerothOrder
from zokernel.optim.averaging.averages import IterateAverage
from zokernel.perturb.in_forward import BY_POSITION
from zokernel.without_adapter import without_adapter

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
    copy = without_adapter(model).working_copy
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


def many_in_a_pass(model: nn.Module, count: int) -> StreamedForward | None:
    """Return what takes losses of streamed weights, so many in one pass over them; None if they are in memory.

    Args:
        model: The model, with its adapter.
        count: Losses that are taken together; more take further passes.
    """
    blocks = streamed_blocks(model)
    return None if blocks is None else StreamedForward(blocks, model, max_together=count)
