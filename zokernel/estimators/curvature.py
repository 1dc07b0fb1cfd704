r"""The two-point estimator with one more forward pass, which also measures curvature along the direction.

.. math:: \frac{L(\theta + \epsilon z) + L(\theta - \epsilon z) - 2 L(\theta)}{\epsilon^2} = z^T H z + O(\epsilon^2)
"""

from __future__ import annotations

from dataclasses import dataclass

from zokernel.estimators.base import Estimate, Evaluate, check_radius


@dataclass(frozen=True)
class TwoPointCurvature:
    """Average of symmetric first and second differences.

    Args:
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions an estimate; each costs two forward passes, and one more is shared by all.

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
        check_radius(self.eps, self.num_perturbations)

    def forwards_at(self, step: int) -> int:
        """Two for each direction, and one."""
        return 2 * self.num_perturbations + 1

    def gain_at(self, step: int) -> float:
        """Return one: the estimate is unbiased to leading order."""
        return 1.0

    def __call__(self, evaluate: Evaluate, *, seed: int, step: int) -> Estimate:
        """Evaluate the centre and both ends of every direction."""
        centre = evaluate({})
        coefficients, losses, curvature = {}, [centre], []
        for index in range(self.num_perturbations):
            above, below = evaluate({index: self.eps}), evaluate({index: -self.eps})
            coefficients[index] = (above - below) / (2 * self.eps) / self.num_perturbations
            curvature.append((above + below - 2 * centre) / self.eps**2)
            losses += [above, below]
        return Estimate(coefficients, losses, curvature=tuple(curvature))
