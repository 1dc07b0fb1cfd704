r"""What an estimator does: turn a few forward passes into projected gradients.

An estimator sees the model only through ``evaluate(offsets)``: the loss at :math:`\theta + \sum_i offsets_i z_i`.  It
returns coefficients :math:`c_i`, and the gradient estimate is :math:`\hat g = \sum_i c_i z_i`.  Directions are never
materialised, and nothing here knows how they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from zokernel.errors import UsageError

Evaluate = Callable[[Mapping[int, float]], float]


@dataclass(frozen=True)
class Estimate:
    r"""What one step's forward passes say.

    Attributes:
        coefficients: :math:`c_i` by direction index, such that :math:`\hat g = \sum_i c_i z_i`.
        losses: Every loss evaluated, in order.
        curvature: :math:`z_p^T H z_p` of every direction, from estimators that measure it.
        loss_std: Standard deviation of the perturbed losses, from estimators that divide by it.
    """

    coefficients: dict[int, float]
    losses: list[float] = field(repr=False)
    curvature: tuple[float, ...] | None = None
    loss_std: float | None = None

    @property
    def loss(self) -> float:
        r"""Mean of the losses evaluated in this step (for symmetric estimators, :math:`L(\theta)` to second order)."""
        return sum(self.losses) / len(self.losses)


class Estimator(Protocol):
    r"""A gradient estimator :math:`\hat g = \sum_i c_i z_i` from forward passes."""

    @property
    def num_perturbations(self) -> int:
        """How many directions one estimate uses at most."""
        ...

    def forwards_at(self, step: int) -> int:
        """Return how many times the estimate of ``step`` calls ``evaluate``."""
        ...

    def gain_at(self, step: int) -> float:
        r"""Return :math:`C` of :math:`E[\hat g] = C \nabla L`, to leading order in the smoothing radius."""
        ...

    def __call__(self, evaluate: Evaluate, *, seed: int, step: int) -> Estimate:
        """Evaluate what is needed at ``step`` and return the projected gradients."""
        ...


def check_radius(eps: float, num_perturbations: int) -> None:
    """Refuse a smoothing radius or a number of directions that is not positive.

    Raises:
        UsageError: If one of them is not.
    """
    if not eps > 0:
        raise UsageError(f"eps must be positive, not {eps}: 1e-3 suits most models.")
    if num_perturbations < 1:
        raise UsageError(f"num_perturbations must be at least 1, not {num_perturbations}.")
