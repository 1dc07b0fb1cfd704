r"""Move the weights themselves from point to point, one loss after the other.

===========  ===================  ================  =======================================================
restore      extra memory         sweeps per step   the weights come back
===========  ===================  ================  =======================================================
``fold``     none                 3 for P = 1       up to rounding: a few half-ulps of fp32 per step
``grid``     none                 3 for P = 1       exactly (fp32 weights, kept on a power-of-two grid)
``copy``     one copy             3 and 3 copies    exactly, in any dtype
===========  ===================  ================  =======================================================

All of them restore the weights in the sweep that updates them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.estimators.base import Offsets
from zokernel.perturb.base import Closure, Perturb

RESTORE_MODES = ("fold", "grid", "copy")
IN_PLACE = ("in_place", *(f"in_place:{mode}" for mode in RESTORE_MODES))


class InPlace(Perturb):
    """Perturb the weights in place.

    Args:
        restore: ``fold``, ``grid`` or ``copy`` (see the table above).

    Raises:
        UsageError: If there is no such mode; when attached, if the weights do not suit it.

    Example:
        >>> import torch, zokernel
        >>> layer, inputs = torch.nn.Linear(3, 1), torch.ones(4, 3)
        >>> optimizer = zokernel.optim.MeZO(layer, lr=0.01, perturb=InPlace("copy"))
        >>> loss = optimizer.step(lambda: layer(inputs).square().mean())

    References:
        Malladi et al. (2023), Fine-Tuning Language Models with Just Forward Passes, arXiv:2305.17333, Algorithm 1.
    """

    def __init__(self, restore: str = "fold"):
        if restore not in RESTORE_MODES:
            raise UsageError(f"There is no restore mode {restore!r}: choose one of {', '.join(RESTORE_MODES)}.")
        self.restore_mode = restore
        self.name = "in_place" if restore == "fold" else f"in_place:{restore}"

    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Move the weights to each point and evaluate the closure there."""
        losses = []
        for offsets in points:
            self.weights.move_to(step, offsets)
            losses.append(loss_value(closure()))
        return losses


def loss_value(value: Any) -> float:
    """Return what a closure returned as a number.

    Raises:
        UsageError: If it is no real number and no tensor or array of one.

    Example:
        >>> loss_value(0.5)
        0.5
    """
    if value is None:
        raise UsageError("The closure returned None: end it with 'return loss'.")
    shape = getattr(value, "shape", ())
    if math.prod(shape) != 1:
        raise UsageError(f"The closure returned {tuple(shape)} losses: return their mean, a single number.")
    real = not value.is_complex() if isinstance(value, Tensor) else isinstance(value, (Real, np.ndarray))
    if not real:
        kind = str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UsageError(f"The closure returned {kind}, not a loss: return a tensor of one element, or a number.")
    if isinstance(value, np.ndarray):
        value = value.item()
    return float(value.detach() if isinstance(value, Tensor) else value)
