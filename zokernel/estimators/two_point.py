r"""The symmetric two-point estimator of SPSA, as MeZO uses it.

.. math:: c_p = \frac{1}{P} \frac{L(\theta + \epsilon z_p) - L(\theta - \epsilon z_p)}{2\epsilon}

On a quadratic it is unbiased.  Otherwise its bias in coordinate k is, to leading order, for directions with independent
coordinates of kurtosis :math:`\kappa`,

.. math:: \frac{\epsilon^2}{2}\, \frac{\partial}{\partial\theta_k} tr H
    + \frac{\epsilon^2}{6} (\kappa - 3)\, \frac{\partial^3 L}{\partial\theta_k^3}

so that the second term vanishes for Gaussian directions and is
:math:`-\frac{\epsilon^2}{3} \partial^3 L / \partial\theta_k^3` for Rademacher ones.

References: Spall (1992), IEEE Transactions on Automatic Control 37(3); Malladi et al. (2023), arXiv:2305.17333.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate, Estimator, Offsets, check_radius, check_total_steps
from zokernel.values import plain_fields

SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class TwoPoint(Estimator):
    r"""Average of ``num_perturbations`` symmetric differences.

    Args:
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per estimate; each costs two forward passes.
        schedule: ``constant``, or ``linear``: :math:`\max(1, \lfloor P t/T \rfloor)` directions in step t = 0, 1, ...
            of T, where P is ``num_perturbations``; above one, P itself is not reached.
        total_steps: T, the length of the run, which the linear schedule needs.

    Raises:
        UsageError: If a setting is out of range, or a schedule lacks ``total_steps``.

    Example:
        >>> estimate = TwoPoint(eps=0.5)(lambda offsets: offsets[0] ** 2 + offsets[0], seed=0, step=0)
        >>> estimate.coefficients[0]
        1.0
        >>> [TwoPoint(num_perturbations=4, schedule="linear", total_steps=8).directions_at(t) for t in (0, 3, 4, 7)]
        [1, 1, 2, 3]
    """

    eps: float = 1e-3
    num_perturbations: int = 1
    schedule: str = "constant"
    total_steps: int | None = None

    def __post_init__(self):
        plain_fields(self)
        check_radius(self.eps, self.num_perturbations)
        if self.schedule not in SCHEDULES:
            raise UsageError(f"There is no sample schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}.")
        check_total_steps(self.total_steps, "The linear sample schedule" if self.schedule == "linear" else None)

    def directions_at(self, step: int) -> int:
        r"""Return the number of directions of ``step``; :math:`\max(1, \lfloor P t/T \rfloor)` when it grows."""
        if self.schedule == "constant":
            return self.num_perturbations
        assert self.total_steps is not None
        return min(self.num_perturbations, max(1, step * self.num_perturbations // self.total_steps))

    def points(self, *, seed: int, step: int) -> list[Offsets]:
        """Return both ends of every direction."""
        return [{index: end} for index in range(self.directions_at(step)) for end in (self.eps, -self.eps)]

    def combine(self, losses: Sequence[float], *, seed: int, step: int) -> Estimate:
        """Return the symmetric differences."""
        slopes = symmetric_differences(losses, self.eps)
        return Estimate({index: slope / len(slopes) for index, slope in enumerate(slopes)}, list(losses))


def symmetric_differences(losses: Sequence[float], eps: float) -> list[float]:
    """Return (above - below) / (2 eps) of losses that alternate between both ends of the directions."""
    return [(above - below) / (2 * eps) for above, below in zip(losses[::2], losses[1::2], strict=True)]
