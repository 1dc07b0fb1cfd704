r"""Leave-one-out differences: one forward pass per direction, and none for the unperturbed weights.

.. math:: c_p = \frac{1}{P\epsilon} \Big( L(\theta + \epsilon z_p)
    - \frac{1}{P-1} \sum_{q \ne p} L(\theta + \epsilon z_q) \Big)

The baseline of a direction is the mean loss of the others, which is independent of it.  So the mean of
:math:`\hat g` is exactly that of the two-point estimator of the same radius, for any loss and any symmetric
distribution.  On a quadratic with gradient g and Hessian H at :math:`\theta`, with Rademacher directions in d
dimensions, :math:`v = 2 (\|H\|_F^2 - \sum_i H_{ii}^2)` the variance of :math:`z^T H z`, and
:math:`s^2 = |g|^2 + \epsilon^2 v / 4`,

.. math::
    E|\hat g|^2 &= \frac{d\, s^2}{P-1} + \frac{(P-1)^2 + 1}{P (P-1)} |g|^2 && \text{leave one out, P forwards} \\
    E|\hat g|^2 &= \frac{d}{P} \Big( s^2 + \frac{\epsilon^2}{4} (tr H)^2 \Big) + \frac{P-1}{P} |g|^2
        && \text{one-sided, P + 1 forwards} \\
    E|\hat g|^2 &= \frac{d + P - 1}{P} |g|^2 && \text{two-point, 2 P forwards}

On a linear loss with directions of kurtosis :math:`\kappa` the first is
:math:`\big( \frac{d + \kappa + P - 2}{P} + \frac{d + 1}{P (P-1)} \big) |g|^2`.

At equal forwards it therefore equals one-sided differences up to :math:`2 |g|^2 / (P (P-1))` on a linear loss: the
missing base forward costs one direction.  It is the better of the two where :math:`\epsilon\, tr H` is not small beside
:math:`|g|`, since a common rise of all losses cancels, and where one rounded base loss would spoil every difference.

References: Kool et al. (2019), Buy 4 REINFORCE Samples, Get a Baseline for Free!; Seung et al. (2025), LOREN,
arXiv:2511.07971, which uses it on its own directions.  The second moments are derived here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from zokernel.errors import UsageError
from zokernel.estimators.base import check_radius
from zokernel.estimators.population import Population
from zokernel.values import plain_fields


@dataclass(frozen=True)
class LeaveOneOut(Population):
    """Average of the differences of every perturbed loss from the mean of the others.

    That is a one-sided :class:`~zokernel.estimators.population.Population` shaped as ``leave_one_out``.

    Args:
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per estimate, at least 2; each costs one forward pass.

    Raises:
        UsageError: If a setting is out of range.

    Example:
        >>> estimate = LeaveOneOut(eps=0.5, num_perturbations=2)(
        ...     lambda offsets: 7.0 + 3.0 * offsets.get(0, 0.0) - offsets.get(1, 0.0), seed=0, step=0)
        >>> estimate.coefficients
        {0: 2.0, 1: -2.0}
    """

    num_perturbations: int = 8
    shaping: str = field(default="leave_one_out", init=False, repr=False)
    antithetic: bool = field(default=False, init=False, repr=False)

    def __post_init__(self):
        plain_fields(self)
        check_radius(self.eps, self.num_perturbations)
        if self.num_perturbations < 2:
            raise UsageError(
                "Leaving one loss out needs the loss of another: set num_perturbations to at least 2; 8 is usual."
            )
