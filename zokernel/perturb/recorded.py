"""Repeating a step from the losses it measured, without the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zokernel.errors import RunError
from zokernel.estimators.base import Offsets

if TYPE_CHECKING:
    from zokernel.optim.zeroth_order import Closure, ZerothOrderOptimizer


class Recalled:
    """An evaluator that returns recorded losses instead of evaluating the closure.

    Args:
        record: What ``optimizer.record()`` returned after the step.
        visits_points: Whether the run's evaluator moved the weights through the step's points, so that roundings which
            depend on those moves are repeated.
    """

    def __init__(self, record: Sequence[float], *, visits_points: bool = True):
        self.record = [float(value) for value in record]
        self.visits_points = visits_points

    def __call__(self, optimizer: ZerothOrderOptimizer, closure: Closure, points: Sequence[Offsets]) -> list[float]:
        """Return the recorded losses.

        Raises:
            RunError: If their number is not that of the points.
        """
        if len(points) != len(self.record):
            raise RunError(
                f"Step {optimizer.step_count + 1} needs {len(points)} losses and the journal holds {len(self.record)}: "
                "it was written with other settings."
            )
        if optimizer.repeats_moves and self.visits_points:
            for offsets in points:
                optimizer.move_to(offsets)
        return self.record


def replay_step(optimizer: ZerothOrderOptimizer, record: Sequence[float], *, visits_points: bool = True) -> float:
    """Take the step that recorded numbers led to: the same moves, update, state and bits, without a forward pass.

    Args:
        optimizer: The optimizer, where the step began, with the learning rates of that step.
        record: What its ``record()`` returned after the step.
        visits_points: See :class:`Recalled`.

    Returns:
        The step's loss.

    Raises:
        RunError: If the record does not fit the method's settings.

    Example:
        >>> import torch, zokernel
        >>> def start():
        ...     weight = torch.nn.Parameter(torch.ones(3))
        ...     return weight, zokernel.optim.MeZO([weight], lr=0.05, momentum=0.9)
        >>> weight, optimizer = start()
        >>> records = []
        >>> for _ in range(5):
        ...     loss = optimizer.step(lambda: weight.square().sum())
        ...     records.append(optimizer.record())
        >>> again, optimizer = start()
        >>> losses = [replay_step(optimizer, record) for record in records]
        >>> torch.equal(weight, again)
        True
    """
    evaluator = optimizer.evaluator
    optimizer.evaluator = Recalled(record, visits_points=visits_points)
    try:
        return optimizer.step(lambda: math.nan)
    finally:
        optimizer.evaluator = evaluator
