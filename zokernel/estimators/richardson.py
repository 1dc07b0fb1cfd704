r"""Richardson extrapolation along the same direction: KerZOO's order of bias without its variance.

.. math:: c_p = \frac{1}{P} \frac{4 D_p(\epsilon/2) - D_p(\epsilon)}{3}, \qquad
    D_p(h) = \frac{L(\theta + h z_p) - L(\theta - h z_p)}{2h}

Both differences use the same direction, so the :math:`\epsilon^2` terms cancel exactly and not only on average: the
bias is :math:`O(\epsilon^4)` and the second moment stays MeZO's.  Round-off in the losses has 65/9 times the variance.

References: Richardson (1911), The approximate arithmetical solution by finite differences of physical problems,
Philosophical Transactions A 210; section C.3 of docs/theory.md compares it with KerZOO's estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zokernel.estimators.base import Estimate, Estimator, Offsets, check_radius
from zokernel.values import plain_fields


@dataclass(frozen=True)
class Richardson(Estimator):
    """Average of ``num_perturbations`` extrapolated differences.

    Args:
        eps: The larger of the two radii, in units of the weights.
        num_perturbations: Directions per estimate; each costs four forward passes.

    Raises:
        UsageError: If a setting is out of range.

    Example:
        >>> estimate = Richardson(eps=0.5)(lambda offsets: offsets[0] ** 3 + offsets[0], seed=0, step=0)
        >>> estimate.coefficients[0]
        1.0
    """

    eps: float = 1e-3
    num_perturbations: int = 1

    def __post_init__(self):
        plain_fields(self)
        check_radius(self.eps, self.num_perturbations)

    def points(self, *, seed: int, step: int) -> list[Offsets]:
        """Return four points along every direction."""
        ends = (self.eps, 0.5 * self.eps, -0.5 * self.eps, -self.eps)
        return [{index: end} for index in range(self.num_perturbations) for end in ends]

    def combine(self, losses: Sequence[float], *, seed: int, step: int) -> Estimate:
        """Return the extrapolated differences."""
        coefficients = {}
        for index in range(self.num_perturbations):
            ends = losses[4 * index : 4 * index + 4]
            wide, narrow = (ends[0] - ends[3]) / (2 * self.eps), (ends[1] - ends[2]) / self.eps
            coefficients[index] = (4 * narrow - wide) / 3 / self.num_perturbations
        return Estimate(coefficients, list(losses))
