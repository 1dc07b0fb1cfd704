r"""The bookkeeping that every restore mode shares: current offsets, and sweeps that Ctrl-C cannot cut in half."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

from torch import Tensor

from zokernel.directions.base import Directions, once_each
from zokernel.errors import UsageError

Draw = tuple[int, int]
"""(step, index) of a direction."""
Update = Mapping[int, float] | Mapping[Draw, float]


class Restore(ABC):
    """Weights that can be moved along directions and brought back; holds the current offsets.

    Args:
        directions: Random directions.
        tensors: Weights by name, changed in place.
        seed: Seed of the run.

    Attributes:
        walks_points: Whether replaying a journal must repeat the moves between commits to repeat the roundings.
    """

    walks_points: ClassVar[bool] = False

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
        r"""Make the weights :math:`\theta + \sum_i offsets_i z_i`, in one sweep from wherever they are.

        Args:
            step: Step whose directions the indices name.
            offsets: Coefficient by index; ``{}`` goes back to theta.
        """
        target = as_draws(step, offsets)
        if target != self._offsets:
            with uninterrupted():
                self._move(target)
                self._offsets = target

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

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the weights (taken at theta)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint, after its weights have been loaded.

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
            given = {name: update[name] for name in self.tensors}  # type: ignore[index]
            return once_each(given, lambda coefficients: as_draws(step, coefficients))  # type: ignore[arg-type]
        draws = as_draws(step, update)  # type: ignore[arg-type]
        return dict.fromkeys(self.tensors, draws)

    def _scales(self, by_name: Mapping[str, Mapping[Draw, float]], draws: list[Draw]) -> dict[str, list[float]]:
        return once_each(by_name, lambda coefficients: [coefficients.get(draw, 0.0) for draw in draws])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, so that weights and the record of their offsets change together."""
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


def as_family(directions: Directions) -> Directions:
    """Return directions as a Directions, or explain that only ``fold`` works with anything else."""
    if not isinstance(directions, Directions):
        raise UsageError(
            f"{type(directions).__name__} is no family of directions: use restore='fold', which needs only add_."
        )
    return directions


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
