"""The restore modes by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from zokernel.directions.base import Directions
from zokernel.directions.weights.copy import Copy, Unmoved
from zokernel.directions.weights.grid import Grid
from zokernel.directions.weights.restore import Fold, Restore
from zokernel.errors import UsageError

MODES: dict[str, type[Restore]] = {"fold": Fold, "grid": Grid, "copy": Copy, "unmoved": Unmoved}


def make_restore(
    mode: str, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, reach: float = 0.01
) -> Restore:
    """Make the restore mode of that name.

    Args:
        mode: ``fold``, ``grid``, ``copy`` or ``unmoved``.
        directions: Random directions.
        tensors: Weights by name, changed in place by every move and commit.
        seed: Seed of the run.
        reach: Largest total offset to expect (eps); only ``grid`` needs it, to size its grids.

    Returns:
        The restore object, at theta.

    Raises:
        UsageError: If there is no such mode, or it does not fit the weights.
    """
    if mode == "grid":
        return Grid(directions, tensors, seed=seed, reach=reach)
    if mode not in MODES:
        raise UsageError(f"There is no restore mode {mode!r}: choose one of {', '.join(MODES)}.")
    return MODES[mode](directions, tensors, seed=seed)
