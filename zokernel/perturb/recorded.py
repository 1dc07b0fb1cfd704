"""Losses from a journal: a step is repeated from the numbers it measured, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from zokernel.directions import Directions
from zokernel.errors import UsageError
from zokernel.estimators.base import Offsets
from zokernel.perturb.base import Closure, Perturb


class Recorded(Perturb):
    """Answers with recorded numbers, and moves the weights as the run did.

    Args:
        inner: How the run perturbed, attached to the optimizer's weights.
        numbers: What ``optimizer.record()`` returned after the step.
    """

    def __init__(self, inner: Perturb, numbers: Sequence[float]):
        self.inner, self.name = inner, inner.name
        self.numbers = [float(number) for number in numbers]
        self.weights = inner.weights

    def attach(
        self, parameters: Mapping[str, Tensor], directions: Directions, *, seed: int, reach: float = 0.01
    ) -> None:
        """Refuse: recorded losses belong to the weights that ``inner`` serves."""
        raise UsageError("Recorded losses cannot be attached to other weights: replay the journal from its base.")

    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Return the recorded numbers; walk the points if the run's roundings depend on them."""
        if self.walks_points:
            for offsets in points:
                self.weights.move_to(step, offsets)
        return self.numbers


class Replayed(Perturb):
    """Restores and updates the weights as a run did whose losses were taken at weights left in place.

    Args:
        name: How that run perturbed.
    """

    def __init__(self, name: str):
        self.name = name

    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Refuse: a replayed optimizer has no way of taking losses until it is given one."""
        raise UsageError("This optimizer replays a journal: set optimizer.perturb before you go on training.")
