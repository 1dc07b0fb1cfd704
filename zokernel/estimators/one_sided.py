r"""One-sided differences: one forward pass per direction and one for the unperturbed weights.

.. math:: c_p = \frac{1}{P} \frac{L(\theta + \epsilon z_p) - L(\theta)}{s}

with :math:`s = \epsilon` (a gradient estimate with bias of order :math:`\epsilon`) or, normalised as FZOO does,
:math:`s = \sigma`, the standard deviation of the P perturbed losses.  Then :math:`\epsilon` cancels to leading order,
and the step has the length of normalised gradient descent.

References: Duchi et al. (2015), Optimal rates for zero-order convex optimization, arXiv:1312.2139; for the normalised
form Dang et al. (2025), FZOO, arXiv:2506.09034.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate, Estimator, Offsets, check_radius
from zokernel.values import check_switches, plain_fields


@dataclass(frozen=True)
class OneSided(Estimator):
    """Average of ``num_perturbations`` one-sided differences.

    Args:
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per estimate; each costs one forward pass.
        normalize: Divide by the standard deviation of the perturbed losses instead of by ``eps``.

    Raises:
        UsageError: If a setting is out of range, or one direction is to be normalised by its spread.

    Example:
        >>> estimate = OneSided(eps=0.5)(lambda offsets: 3.0 * offsets.get(0, 0.0), seed=0, step=0)
        >>> estimate.coefficients[0]
        3.0
    """

    eps: float = 1e-3
    num_perturbations: int = 1
    normalize: bool = False

    def __post_init__(self):
        plain_fields(self)
        check_radius(self.eps, self.num_perturbations)
        check_switches(normalize=self.normalize)
        if self.normalize and self.num_perturbations < 2:
            raise UsageError(
                "Normalising by the spread of the losses needs num_perturbations of at least 2; 8 is usual."
            )

    def gain_at(self, step: int, last: Estimate | None = None) -> float:
        r"""Return one; normalised, :math:`\epsilon / \sigma` of the last estimate, NaN before there is one."""
        if not self.normalize:
            return 1.0
        if last is None or last.loss_std is None:
            return math.nan
        return self.eps / last.loss_std if last.loss_std else 0.0

    def points(self, *, seed: int, step: int) -> list[Offsets]:
        """Return the centre and one end of every direction."""
        return [{}, *({index: self.eps} for index in range(self.num_perturbations))]

    def combine(self, losses: Sequence[float], *, seed: int, step: int) -> Estimate:
        """Return the differences from the centre, divided by ``eps`` or by the spread of the losses."""
        centre, *ends = losses
        if not self.normalize:
            scale, spread = self.eps, None
        else:
            spread = scale = statistics.pstdev(ends)
        # Equal losses say nothing about the gradient, so the weights stay; dividing would send them to infinity.
        weights = [(end - centre) / scale / len(ends) if scale > 0 else 0.0 for end in ends]
        return Estimate(dict(enumerate(weights)), list(losses), loss_std=spread, centre=centre)
