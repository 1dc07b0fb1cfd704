r"""Weights that move along directions and are restored: the bookkeeping of every restore mode, and the default mode.

A zeroth-order step moves the weights to :math:`\theta + \epsilon z`, to :math:`\theta - \epsilon z`, back, and on to
:math:`\theta' = decay\,\theta + \sum_i u_i z_i`.  Four sweeps of ``add_`` do that, and leave rounding errors behind.
The modes restore and update in one sweep, and differ in memory and in what "restored" means:

===========  ============  ===================  ===========================================================
mode         extra memory  sweeps per step      restored
===========  ============  ===================  ===========================================================
``fold``     none          3                    up to rounding: a few half-ulps of fp32 per step
``grid``     none          3                    exactly (float32 weights, kept on a power-of-two grid)
``copy``     one copy      3 and 3 copies       exactly, any dtype
``unmoved``  none          1                    never moved: something else perturbs, such as the forward
===========  ============  ===================  ===========================================================

For the same weights, seed and calls, every mode repeats the same roundings.
"""

from __future__ import annotations

import math
import signal
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor

from zokernel.directions.base import Directions, once_each
from zokernel.errors import UsageError

LOW_PRECISION = (torch.bfloat16, torch.float16)
Draw = tuple[int, int]
"""(step, index) of a direction."""
Update = Mapping[int, float] | Mapping[Draw, float]


def memory_of(tensor: Tensor) -> tuple[int, torch.dtype, torch.device]:
    """Return where a tensor's local elements are, and how they are stored."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.data_ptr(), local.dtype, local.device


class Restore(ABC):
    """Weights that can be moved along directions and restored, with a record of where they are.

    Args:
        directions: Random directions.
        tensors: Weights by name, changed in place.
        seed: Seed of the run.

    Attributes:
        walks_points: Whether the weights after a commit also depend, by rounding, on the points visited before it, so
            that a replay must walk them.
        stay: Whether the tensors keep their memory, so that other memory means other weights.
    """

    walks_points: ClassVar[bool] = False
    stay: ClassVar[bool] = True

    def __init__(self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int):
        self.directions = directions
        self.tensors = dict(tensors)
        self.seed = seed
        self._offsets: dict[Draw, float] = {}

    @property
    def offsets(self) -> dict[int, float]:
        """Coefficient of each direction that the weights carry now, by index; empty at theta."""
        return {index: offset for (_, index), offset in self._offsets.items()}

    def move_to(self, step: int, offsets: Update) -> None:
        r"""Make the weights :math:`\theta + \sum_i offsets_i z_i`, in one sweep from where they are.

        Args:
            step: Step whose directions the indices name.
            offsets: Coefficient by index; ``{}`` goes back to theta.
        """
        target = as_draws(step, offsets)
        if target != self._offsets:
            with uninterrupted():
                self._move(target)
                self._offsets = target

    def copies_at(self, step: int, offsets: Update) -> dict[str, Tensor]:
        r"""Return copies of the weights at :math:`\theta + \sum_i offsets_i z_i`; the weights themselves stay at theta.

        Args:
            step: Step whose directions the indices name.
            offsets: Coefficient by index.

        Raises:
            UsageError: If the weights are perturbed at the moment.
        """
        if self._offsets:
            raise UsageError("The weights are perturbed at the moment: make copies of them between two steps.")
        copies, draws = clones(self.tensors), as_draws(step, offsets)
        if draws:
            self.directions.add_(copies, list(draws.values()), seed=self.seed, **step_and_index(list(draws)))
        return copies

    def commit(
        self,
        step: int,
        update: Update | Mapping[str, Update],
        decay: float | Mapping[str, float] = 1.0,
    ) -> None:
        r"""Make the weights :math:`\theta \leftarrow decay\,\theta + \sum_i update_i z_i`, restoring in the same sweep.

        Args:
            step: Step whose directions the indices name.
            update: Coefficient by index, or by (step, index) for directions of other steps; or a mapping from name to
                such coefficients, when tensors differ (parameter groups).
            decay: Factor on theta, one for all or by name.
        """
        by_name = self._by_name(step, update)
        with uninterrupted():
            self._commit(step, by_name, decay)
            self._offsets = {}

    def restore(self) -> None:
        """Bring the weights back to theta, from any state (after a NaN loss, an exception or an interrupt)."""
        self.move_to(0, {})

    def resync(self) -> None:
        """Take the weights as they are for theta, after a change that was no move along directions."""
        self.load_state_dict(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the weights (taken at theta)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint whose weights have been loaded.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._offsets = {}

    @abstractmethod
    def _move(self, target: dict[Draw, float]) -> None: ...

    @abstractmethod
    def _commit(self, step: int, update: dict[str, dict[Draw, float]], decay: float | Mapping[str, float]) -> None: ...

    def _by_name(self, step: int, update: Update | Mapping[str, Update]) -> dict[str, dict[Draw, float]]:
        if any(isinstance(key, str) for key in update):
            missing = [name for name in self.tensors if name not in update]
            if missing:
                raise UsageError(
                    f"There is no update for tensor {missing[0]!r}: give one for every name, or one for all."
                )
            ordered = {name: update[name] for name in self.tensors}  # type: ignore[index]
            return once_each(ordered, lambda coefficients: as_draws(step, coefficients))  # type: ignore[arg-type]
        draws = as_draws(step, update)  # type: ignore[arg-type]
        return dict.fromkeys(self.tensors, draws)

    def _scales(self, by_name: Mapping[str, Mapping[Draw, float]], draws: list[Draw]) -> dict[str, list[float]]:
        return once_each(by_name, lambda coefficients: [coefficients.get(draw, 0.0) for draw in draws])


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
                f"Tensor {low[0]!r} is {self.tensors[low[0]].dtype}, which rounds too coarsely to be restored: use "
                "perturb='in_place:copy', or keep the weights in float32 and autocast the forward pass."
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
        for factor, scales_by_name in by_factor.items():
            scale |= once_each(scales_by_name, _subtract([factor * offset for offset in offsets]))
        self.directions.add_(self.tensors, scale, seed=self.seed, decay=decay, **step_and_index(draws))


def _subtract(offsets: list[float]) -> Callable[[list[float]], list[float]]:
    return lambda scales: [scale - offset for scale, offset in zip(scales, offsets)]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, so that the weights and the record of their offsets change together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending and callable(previous):
            previous(*pending[0])


def clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors; two names of the same memory (tied weights) get one copy."""
    keys = {name: (t.data_ptr(), t.shape, t.stride(), t.dtype) for name, t in tensors.items()}
    copies = {keys[name]: tensor.detach().clone() for name, tensor in tensors.items()}
    return {name: copies[keys[name]] for name in tensors}


def as_draws(step: int, coefficients: Update) -> dict[Draw, float]:
    """Return nonzero coefficients by (step, index), whichever way they were keyed."""
    return {
        key if isinstance(key, tuple) else (step, key): float(value)
        for key, value in coefficients.items()
        if value != 0.0
    }


def union_of_draws(update: Mapping[str, Mapping[Draw, float]], offsets: Mapping[Draw, float]) -> list[Draw]:
    """Return every draw that an update or the current offsets name."""
    # Sorted, so that the same offsets are always summed in the same order and round the same.
    return sorted(set(offsets).union(*update.values()))


def step_and_index(draws: list[Draw]) -> dict[str, Any]:
    """Return the keyword arguments that name these draws in a sweep."""
    return {"step": [step for step, _ in draws], "index": [index for _, index in draws]}


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
