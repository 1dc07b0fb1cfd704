r"""Perturb weights and bring them back: ways that differ in memory and in what "back" means.

A zeroth-order step moves the weights to :math:`\theta + \epsilon z`, to :math:`\theta - \epsilon z`, back, and on to
:math:`\theta' = decay\,\theta + \sum_i u_i z_i`.  Four sweeps of ``add_`` do that, and leave rounding errors behind.

========  ===================  ================  =============================================================
mode      extra memory         sweeps a step     back at theta
========  ===================  ================  =============================================================
``fold``  none                 3                 up to rounding: each step drifts by a few half-ulps of fp32
``grid``  none                 3                 exactly (float32 weights, kept on a power-of-two grid)
``copy``  one copy             3 + 3 copies      exactly, any dtype
``unmoved`` none                1                 never left: something else perturbs, such as the forward itself
========  ===================  ================  =============================================================

All of them update in the sweep that restores.  For the same weights, seed and calls, all repeat the same roundings.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zokernel.directions.base import Directions, once_each
from zokernel.directions.terms import Rule
from zokernel.directions.weights.placement import place_all
from zokernel.directions.weights.restore_base import Draw, Restore, as_family, step_and_index, union_of_draws
from zokernel.errors import RunError, UsageError

logger = logging.getLogger(__name__)

LOW_PRECISION = (torch.bfloat16, torch.float16)
GRID_BITS = 24
GRID_HEADROOM = 4.0
TAIL = 8.0
"""No coordinate of the dense laws exceeds this in magnitude (sphere: for all but tiny dimensions)."""


class Fold(Restore):
    r"""Restore up to rounding, at no cost: :math:`\theta' = decay\,(current - \sum_i o_i z_i) + \sum_i u_i z_i`.

    Expanded, that is one sweep with scales :math:`u_i - decay\, o_i`.  Every sweep rounds once, so a step moves each
    float32 weight by at most three half-ulps of its largest value on the way.  With Gaussian directions that is a
    random walk.  With Rademacher directions the same roundings recur at weights near a power of two and add up, unless
    the offset is a power of two itself (:func:`nearest_power_of_two`): then they happen once and not again.

    Args:
        directions: Random directions.
        tensors: Weights by name: float32 or float64.
        seed: Seed of the run.

    Raises:
        UsageError: If weights are bfloat16 or float16, whose roundings would not stay small.

    Example:
        >>> from zokernel.directions import Dense
        >>> weights = {"w": torch.ones(3)}
        >>> state = Fold(Dense("rademacher"), weights, seed=0)
        >>> state.move_to(0, {0: 0.5}); state.move_to(0, {0: -0.5}); state.commit(0, {})
        >>> weights["w"]
        tensor([1., 1., 1.])
    """

    walks_points = True

    def __init__(self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int):
        super().__init__(directions, tensors, seed=seed)
        low = [name for name, tensor in self.tensors.items() if tensor.dtype in LOW_PRECISION]
        if low:
            raise UsageError(
                f"Tensor {low[0]!r} is {self.tensors[low[0]].dtype}: perturbing it does not restore it. Use "
                "restore='copy', or keep the weights in float32 and autocast the forward pass."
            )

    def _move(self, target: dict[Draw, float]) -> None:
        draws = sorted(target | self._offsets)
        change = [target.get(draw, 0.0) - self._offsets.get(draw, 0.0) for draw in draws]
        self.directions.add_(self.tensors, change, seed=self.seed, **step_and_index(draws))

    def _commit(self, step: int, update: dict[str, dict[Draw, float]], decay: float | Mapping[str, float]) -> None:
        draws = union_of_draws(update, self._offsets)
        factors = decay if isinstance(decay, Mapping) else dict.fromkeys(self.tensors, decay)
        offsets = [self._offsets.get(draw, 0.0) for draw in draws]
        by_factor: dict[float, dict[str, list[float]]] = defaultdict(dict)
        for name, scales in self._scales(update, draws).items():
            by_factor[factors[name]][name] = scales
        scale: dict[str, list[float]] = {}
        for factor, alike in by_factor.items():
            scale |= once_each(alike, _less([factor * offset for offset in offsets]))
        self.directions.add_(self.tensors, scale, seed=self.seed, decay=decay, **step_and_index(draws))


def _less(offsets: list[float]) -> Callable[[list[float]], list[float]]:
    return lambda scales: [scale - offset for scale, offset in zip(scales, offsets)]


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
                raise UsageError(f"Tensor {place.name!r} is {place.local.dtype}, not float32: use restore='copy'.")
            if hasattr(place.tensor, "device_mesh"):
                raise UsageError(f"Tensor {place.name!r} is a DTensor, which has no grid: use restore='copy'.")
            low, high = torch.aminmax(place.local) if place.local.numel() else (torch.zeros(()), torch.zeros(()))
            bound = GRID_HEADROOM * max(-float(low), float(high), TAIL * reach)
            if not math.isfinite(bound):
                raise UsageError(f"Tensor {place.name!r} holds NaN or infinity, which no grid can hold.")
            self.grid[place.name] = 2.0 ** (math.ceil(math.log2(bound)) - GRID_BITS)
            self._snap(place.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the grid step of each tensor."""
        return {"grid": dict(self.grid)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the grid steps of a checkpoint whose weights have been loaded.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        self.grid = dict(state["grid"])

    def _move(self, target: dict[Draw, float]) -> None:
        draws = sorted(target | self._offsets)
        same = dict.fromkeys(self.tensors, target)
        peaks = self._sweep(draws, self._scales(same, draws), Rule.GRID_MOVE)
        for name, peak in peaks.items():
            bound = self.grid[name] * 2.0**GRID_BITS
            if peak > bound:
                raise RunError(
                    f"A perturbation took tensor {name!r} to {peak:.3g}, past the {bound:.3g} that its grid holds: "
                    "pass a larger reach, lower eps, or use restore='copy'."
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
        return as_family(self.directions).sweep_(
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


class Unmoved(Restore):
    """Weights that are never moved but by updates, for losses that perturb in the forward: exact, any dtype, no memory.

    Args:
        directions: Random directions.
        tensors: Weights by name.
        seed: Seed of the run; also of the rounding.
        stochastic: Round updates stochastically; by default only those of bfloat16 and float16 weights, whose nearest
            rounding would lose most updates.
    """

    def __init__(
        self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, stochastic: bool | None = None
    ):
        super().__init__(directions, tensors, seed=seed)
        self._rules = {
            name: Rule.STOCHASTIC
            if stochastic or (stochastic is None and tensor.dtype in LOW_PRECISION)
            else Rule.NEAREST
            for name, tensor in self.tensors.items()
        }

    def _move(self, target: dict[Draw, float]) -> None:
        if target:
            raise UsageError(
                "These weights are changed by updates only: set an evaluator that perturbs elsewhere (InForward, "
                "Stacked), or restore='copy'."
            )

    def _commit(self, step: int, update: dict[str, dict[Draw, float]], decay: float | Mapping[str, float]) -> None:
        draws = union_of_draws(update, {})
        as_family(self.directions).sweep_(
            self.tensors,
            self._scales(update, draws),
            rule=self._rules,
            seed=self.seed,
            decay=decay,
            rounding=(step, 0),
            **step_and_index(draws),
        )


class Copy(Unmoved):
    """Restore exactly from a copy of the weights: any dtype, sharded or not, at the price of the copy.

    Args:
        directions: Random directions.
        tensors: Weights by name.
        seed: Seed of the run; also of the rounding.
        stochastic: As for :class:`Unmoved`.
    """

    def __init__(
        self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, stochastic: bool | None = None
    ):
        super().__init__(directions, tensors, seed=seed, stochastic=stochastic)
        self._theta = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the weights as they are now for theta.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        self._copy(self.tensors, self._theta)

    def _move(self, target: dict[Draw, float]) -> None:
        if self._offsets:
            self._copy(self._theta, self.tensors)
        if target:
            self.directions.add_(self.tensors, list(target.values()), seed=self.seed, **step_and_index(list(target)))

    def _commit(self, step: int, update: dict[str, dict[Draw, float]], decay: float | Mapping[str, float]) -> None:
        if self._offsets:
            self._copy(self._theta, self.tensors)
        super()._commit(step, update, decay)
        self._copy(self.tensors, self._theta)

    @staticmethod
    def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in target.items():
                tensor.copy_(source[name])


MODES: dict[str, type[Restore]] = {"fold": Fold, "grid": Grid, "copy": Copy, "unmoved": Unmoved}


def make_restore(
    mode: str, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, reach: float = 0.01
) -> Restore:
    """Make the restore mode of that name.

    Args:
        mode: ``fold``, ``grid`` or ``copy``.
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


def nearest_power_of_two(eps: float) -> float:
    """Return the power of two nearest to a perturbation scale, on a logarithmic axis.

    Adding and removing such an offset along Rademacher directions is exact for weights that stay in one binade, so
    ``fold`` drifts no more than the exact modes do (docs/directions.md has the numbers).

    Args:
        eps: A positive number.

    Returns:
        The power of two.

    Example:
        >>> nearest_power_of_two(1e-3) == 2**-10
        True
    """
    return 2.0 ** round(math.log2(eps))
