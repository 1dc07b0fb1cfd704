r"""The two-point estimator with one more forward pass, which also measures curvature along the direction.

.. math:: \frac{L(\theta + \epsilon z) + L(\theta - \epsilon z) - 2 L(\theta)}{\epsilon^2} = z^T H z + O(\epsilon^2)

HiZOO learns its diagonal Hessian from these differences: Zhao et al. (2024), arXiv:2402.15173.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zokernel.estimators.base import Estimate, Estimator, Offsets, check_radius
from zokernel.estimators.two_point import symmetric_differences
from zokernel.values import plain_fields


@dataclass(frozen=True)
class TwoPointCurvature(Estimator):
    """Average of symmetric first and second differences.

    Args:
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per estimate; each costs two forward passes, and one more is shared by all.

    Raises:
        UsageError: If a setting is out of range.

    Example:
        >>> estimate = TwoPointCurvature(eps=0.5)(lambda offsets: 3.0 * offsets.get(0, 0.0) ** 2, seed=0, step=0)
        >>> estimate.curvature
        (6.0,)
    """

    eps: float = 1e-3
    num_perturbations: int = 1

    def __post_init__(self):
        plain_fields(self)
        check_radius(self.eps, self.num_perturbations)

    def points(self, *, seed: int, step: int) -> list[Offsets]:
        """Return the centre and both ends of every direction."""
        return [{}, *({index: end} for index in range(self.num_perturbations) for end in (self.eps, -self.eps))]

    def combine(self, losses: Sequence[float], *, seed: int, step: int) -> Estimate:
        """Return first and second differences."""
        centre, *ends = losses
        slopes = symmetric_differences(ends, self.eps)
        curvature = [
            (above + below - 2 * centre) / self.eps**2 for above, below in zip(ends[::2], ends[1::2], strict=True)
        ]
        coefficients = {index: slope / self.num_perturbations for index, slope in enumerate(slopes)}
        return Estimate(coefficients, list(losses), curvature=tuple(curvature), centre=centre)
