"""How far a run of ``--method auto`` may walk, measured on the model before its first step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zokernel.errors import LossError
from zokernel.estimators.base import Offsets
from zokernel.finetune.trainer.trial_losses import log_refusal
from zokernel.kernels.plan_walk import FIRST_WALK
from zokernel.kernels.walk_rise import Rise, rise_of
from zokernel.perturb import InForward
from zokernel.perturb.base import Closure
from zokernel.readable import plural

logger = logging.getLogger(__name__)

MOST_BATCHES, FEWEST_BATCHES = 8, 4  # each of them takes three forwards
SHARE = 4  # the run takes so many times the forwards of the measurement, at least


def batches_to_try(forwards: int) -> int:
    """Return on how many batches the rise is measured before a run of so many forwards; 0 if it is too short.

    Example:
        >>> batches_to_try(1000), batches_to_try(60), batches_to_try(40)
        (8, 5, 0)
    """
    count = min(MOST_BATCHES, forwards // (3 * SHARE))
    return count if count >= FEWEST_BATCHES else 0


def describe_shortage(forwards: int, batches: int) -> str:
    """Return in a clause why a run is too short to have its rise measured.

    Args:
        forwards: Forward passes of the run.
        batches: Batches of its training data.

    Example:
        >>> describe_shortage(16, 100)
        'the run has 16 forwards, and the test needs a run of 48'
        >>> describe_shortage(48, 3)
        'the training data has 3 batches, and the test needs 4'
    """
    least = 3 * SHARE * FEWEST_BATCHES
    if forwards < least:
        return f"the run has {plural(forwards, 'forward')}, and the test needs a run of {least}"
    return f"the training data has {plural(batches, 'batch')}, and the test needs {FEWEST_BATCHES}"


@torch.no_grad()
def measure_rise(
    optimizer: Any,
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    distance: float,
    *,
    perturb: InForward | None = None,
) -> Rise | None:
    """Return what random walks of a distance do to the loss, at the weights as they are, which stay there.

    Args:
        optimizer: A zeroth-order optimizer, whose weights and directions are taken.
        batches: Batches of the run, one for each walk.
        loss: Returns the loss of a batch.
        distance: How far every weight is moved.
        perturb: What takes the losses, if the weights are streamed: many in one pass over them.

    Returns:
        The rise; None if these losses cannot be taken without moving the weights.
    """
    requests: list[tuple[Closure, Offsets]] = []
    for index, batch in enumerate(batches, FIRST_WALK):
        requests += [(partial(loss, batch), offsets) for offsets in ({}, {index: distance}, {index: -distance})]
    perturb = perturb or InForward()
    losses: list[float] = []
    with log_refusal(logger, "The loss around the weights was not taken"):
        try:
            perturb.attach(optimizer.active, optimizer.directions, seed=optimizer.seed)
            losses = perturb.losses_of(requests, step=0)
        except LossError:
            return Rise(distance, math.nan, math.inf, math.inf, math.nan, len(requests))
    return rise_of(distance, list(zip(losses[::3], losses[1::3], losses[2::3]))) if losses else None


def describe_walk(
    rise: Rise | None, walk: float, share: float, before: float, after: float, *, swings: bool = False
) -> str:
    """Return in a sentence which rate a run takes, and why.

    Args:
        rise: The rise of the loss; None if it could not be measured.
        walk: How far the run walks by default.
        share: The share of it that the run walks.
        before: Its rate by default.
        after: Its rate.
        swings: Whether it is lower since the loss of a batch changes by too much of itself.

    Example:
        >>> print(describe_walk(Rise(0.065, 1.86, 0.21, 0.03, 0.4, 24), 0.065, 0.2, 0.0076, 0.0015))
        learning_rate 0.0015 instead of 0.0076: a random walk of 0.065 raises the loss of training batches by
        0.21 ± 0.03 (from 1.86; 24 forwards), more than following slopes of 0.4 can lower it, so the run walks 0.013.
        >>> print(describe_walk(Rise(0.065, 0.78, 0.2, 0.1, 4.2, 24), 0.065, 0.43, 0.0098, 0.0042, swings=True))
        learning_rate 0.0042 instead of 0.0098: a random walk of 0.065 changes the loss of a training batch by 35 % of
        itself (0.273 of 0.78; 24 forwards), which is too much for an adapter, so the run walks 0.028.
    """
    if rise is None:
        return f"learning_rate {before:.3g}: for a random walk of {walk:.3g}, not measured: its losses cannot be taken."
    changes = f"a random walk of {walk:.3g} "
    if swings:
        swing = rise.slope * rise.distance
        changes += (
            f"changes the loss of a training batch by {100 * swing / rise.loss:.0f} % of itself ({swing:.3g} of "
            f"{rise.loss:.3g}; {rise.forwards} forwards), which is too much for an adapter"
        )
    elif math.isinf(rise.rise):
        changes += f"leads to losses that are not finite ({rise.forwards} forwards)"
    else:
        changes += (
            f"raises the loss of training batches by {rise.rise:.2g} ± {rise.error:.1g} (from {rise.loss:.3g}; "
            f"{rise.forwards} forwards)"
        )
    if share == 1:
        return (
            f"learning_rate {before:.3g}: {changes}; following slopes of {rise.slope:.2g} can lower it by more, "
            "so the rate stays."
        )
    lowered = f", more than following slopes of {rise.slope:.2g} can lower it"
    slopes = "" if swings or math.isinf(rise.rise) else lowered
    return f"learning_rate {after:.3g} instead of {before:.3g}: {changes}{slopes}, so the run walks {walk * share:.2g}."
