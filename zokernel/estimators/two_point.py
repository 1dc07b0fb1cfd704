r"""The symmetric two-point estimator of SPSA, as MeZO uses it.

.. math:: c_p = \frac{1}{P} \frac{L(\theta + \epsilon z_p) - L(\theta - \epsilon z_p)}{2\epsilon}

Its bias is :math:`(\epsilon^2/2)\, \nabla tr H` to leading order (theory C.2.9); on a quadratic it is unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass

from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate, Evaluate


@dataclass(frozen=True)
class TwoPoint:
    """Average of ``num_perturbations`` symmetric differences.

    Args:
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions an estimate; each costs two forward passes.

    Raises:
        UsageError: If ``eps`` or ``num_perturbations`` is not positive.

    Example:
        >>> estimate = TwoPoint(eps=0.5, num_perturbations=1)(lambda offsets: offsets[0] ** 2 + offsets[0], seed=0, step=0)
        >>> estimate.coefficients[0]
        1.0
    """

    eps: float = 1e-3
    num_perturbations: int = 1
    gain: float = 1.0

    def __post_init__(self):
        if not self.eps > 0:
            raise UsageError(f"eps must be positive, not {self.eps}: 1e-3 suits most models.")
        if self.num_perturbations < 1:
            raise UsageError(f"num_perturbations must be at least 1, not {self.num_perturbations}.")

    @property
    def num_forwards(self) -> int:
        """Two for each direction."""
        return 2 * self.num_perturbations

    def __call__(self, evaluate: Evaluate, *, seed: int, step: int) -> Estimate:
        """Evaluate both ends of every direction and return the projected gradients."""
        coefficients, losses = {}, []
        for index in range(self.num_perturbations):
            above, below = evaluate({index: self.eps}), evaluate({index: -self.eps})
            coefficients[index] = (above - below) / (2 * self.eps) / self.num_perturbations
            losses += [above, below]
        return Estimate(coefficients, losses)
