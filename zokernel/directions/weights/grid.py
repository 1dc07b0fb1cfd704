"""Restore exactly and without memory: float32 weights that live on a power-of-two grid."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zokernel.directions.base import Directions
from zokernel.directions.placement import place_all
from zokernel.directions.terms import Rule
from zokernel.directions.weights.restore import Draw, Restore, Update, step_and_index, union_of_draws
from zokernel.errors import RunError, UsageError

logger = logging.getLogger(__name__)

GRID_BITS = 24
GRID_HEADROOM = 4.0
TAIL = 8.0
"""No coordinate of dense directions exceeds this in magnitude (sphere: in all but tiny dimensions)."""


class Grid(Restore):
    r"""Restore exactly and without memory: each float32 tensor lives on its own power-of-two grid.

    With grid step :math:`q` and every magnitude below :math:`2^{24} q`, adding a multiple of q is exact.  Offsets are
    rounded to the grid, :math:`q\,rint(\sum_i o_i z_i / q)`, so taking them off again returns the same bits; the update
    is rounded stochastically, so that steps much smaller than q still count on average.  A tensor that comes within a
    factor two of its bound moves to a grid twice as coarse.

    Args:
        directions: Random directions.
        tensors: Weights by name: float32 and not sharded.  They are rounded to their grid at once.
        seed: Seed of the run; also of the rounding.
        reach: Largest total offset to make room for (the perturbation scale eps).

    Raises:
        UsageError: If weights are not float32, or are DTensors.
        RunError: If a perturbation takes a weight past the bound of its grid.
    """

    def __init__(self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, reach: float = 0.01):
        super().__init__(directions, tensors, seed=seed)
        self.grid: dict[str, float] = {}
        for place in place_all(self.tensors):
            if place.local.dtype != torch.float32:
                raise UsageError(
                    f"Tensor {place.name!r} is {place.local.dtype}, not float32: use perturb='in_place:copy'."
                )
            if hasattr(place.tensor, "device_mesh"):
                raise UsageError(f"Tensor {place.name!r} is a DTensor, which has no grid: use perturb='in_place:copy'.")
            low, high = torch.aminmax(place.local) if place.local.numel() else (0.0, 0.0)
            bound = GRID_HEADROOM * max(-float(low), float(high), TAIL * reach)
            if not math.isfinite(bound):
                raise UsageError(f"Tensor {place.name!r} holds NaN or infinity, which no grid can hold.")
            self.grid[place.name] = 2.0 ** (math.ceil(math.log2(bound)) - GRID_BITS)
            self._snap(place.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the grid step of each tensor."""
        return {"grid": dict(self.grid)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the grid steps of a checkpoint whose weights have been loaded.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        self.grid = dict(state["grid"])

    def copies_at(self, step: int, offsets: Update) -> dict[str, Tensor]:
        """Return copies of the weights at a point, rounded to the grid; see :meth:`Restore.copies_at`."""
        copies = super().copies_at(step, {})
        moved = copy.copy(self)
        moved.tensors = copies
        moved.move_to(step, offsets)
        return copies

    def _move(self, target: dict[Draw, float]) -> None:
        draws = sorted(target | self._offsets)
        same = dict.fromkeys(self.tensors, target)
        peaks = self._sweep(draws, self._scales(same, draws), Rule.GRID_MOVE)
        for name, peak in peaks.items():
            bound = self.grid[name] * 2.0**GRID_BITS
            if peak > bound:
                raise RunError(
                    f"A perturbation took tensor {name!r} to {peak:.3g}, past the {bound:.3g} that its grid holds: "
                    "pass a larger reach, lower eps, or use perturb='in_place:copy'."
                )

    def _commit(self, step: int, update: dict[str, dict[Draw, float]], decay: float | Mapping[str, float]) -> None:
        draws = union_of_draws(update, self._offsets)
        peaks = self._sweep(draws, self._scales(update, draws), Rule.GRID_COMMIT, decay, (step, 0))
        for name, peak in peaks.items():
            while peak > self.grid[name] * 2.0 ** (GRID_BITS - 1):
                self.grid[name] *= 2.0
                self._snap(name)
                logger.info("%s reached %.3g and moved to a grid of step %.3g", name, peak, self.grid[name])

    def _sweep(
        self,
        draws: list[Draw],
        scale: dict[str, list[float]],
        rule: Rule,
        decay: float | Mapping[str, float] = 1.0,
        rounding: Draw | None = None,
    ) -> dict[str, float]:
        old = [self._offsets.get(draw, 0.0) for draw in draws]
        return self.directions.sweep_(
            self.tensors,
            scale,
            rule=rule,
            seed=self.seed,
            decay=decay,
            old_scale=old,
            grid=self.grid,
            rounding=rounding,
            **step_and_index(draws),
        )

    def _snap(self, name: str) -> None:
        # Powers of two: only the rounding changes anything.
        with torch.no_grad():
            self.tensors[name].div_(self.grid[name]).round_().mul_(self.grid[name])
