r"""Exact directional derivatives in place of differences: the limit of a radius of zero.

.. math:: c_p = \frac{1}{P} \langle \nabla L(\theta), z_p \rangle
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zokernel.estimators.base import Estimate, Estimator, Offsets, check_radius
from zokernel.values import plain_fields


@dataclass(frozen=True)
class ForwardDerivative(Estimator):
    r"""Average of ``num_perturbations`` directional derivatives.

    A point names the direction to differentiate along.  :class:`zokernel.perturb.Tangents` returns the losses and then
    the coefficients, and :meth:`combine` takes both.

    Args:
        num_perturbations: Directions per estimate; each costs one forward pass with tangents.

    Raises:
        UsageError: If there is no direction.

    Example:
        >>> ForwardDerivative(2).combine([0.7, 0.7, 1.5, -0.5], seed=0, step=0).coefficients
        {0: 1.5, 1: -0.5}

    References:
        Baydin et al. (2022), Gradients without Backpropagation, arXiv:2202.08587.
    """

    numbers_per_point = 2
    num_perturbations: int = 1

    def __post_init__(self):
        plain_fields(self)
        check_radius(1.0, self.num_perturbations)

    def points(self, *, seed: int, step: int) -> list[Offsets]:
        """Return one unit offset per direction."""
        return [{index: 1.0} for index in range(self.num_perturbations)]

    def combine(self, losses: Sequence[float], *, seed: int, step: int) -> Estimate:
        """Return the coefficients, which follow the losses."""
        count = self.num_perturbations
        return Estimate(dict(enumerate(losses[count:])), list(losses[:count]))
