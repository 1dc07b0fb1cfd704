r"""What an estimator does: turn a few forward passes into projected gradients.

An estimator sees the model only through ``evaluate(offsets)``: the loss at :math:`\theta + \sum_i offsets_i z_i`.  It
returns coefficients :math:`c_i`, and the gradient estimate is :math:`\hat g = \sum_i c_i z_i`.  Directions are never
materialised, and nothing here knows how they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

Evaluate = Callable[[Mapping[int, float]], float]


@dataclass(frozen=True)
class Estimate:
    r"""What one step's forward passes say.

    Attributes:
        coefficients: :math:`c_i` by direction index, such that :math:`\hat g = \sum_i c_i z_i`.
        losses: Every loss evaluated, in order.
        loss: The loss to report: the mean of ``losses`` (for symmetric estimators, :math:`L(\theta)` to second order).
    """

    coefficients: dict[int, float]
    losses: list[float] = field(repr=False)

    @property
    def loss(self) -> float:
        """Mean of the losses evaluated in this step."""
        return sum(self.losses) / len(self.losses)


class Estimator(Protocol):
    r"""A gradient estimator :math:`\hat g = \sum_i c_i z_i` from forward passes.

    Attributes:
        num_perturbations: How many directions one estimate uses.
        num_forwards: How many times one estimate calls ``evaluate``.
        gain: :math:`E[\hat g] = gain \cdot \nabla L` to leading order in the smoothing radius.
    """

    num_perturbations: int

    @property
    def num_forwards(self) -> int: ...

    @property
    def gain(self) -> float: ...

    def __call__(self, evaluate: Evaluate, *, seed: int, step: int) -> Estimate: ...
