r"""Evolution strategies: the losses of a population, shaped, as weights of the members' directions.

.. math:: c_p = \frac{s_p}{P} \qquad\text{or, antithetic,}\qquad c_p = \frac{s_{p+} - s_{p-}}{2 P}

with the shaped losses s of the members :math:`\theta + \epsilon z_p` (and :math:`\theta - \epsilon z_p`).  Shaped as
``z_score`` or ``centred_ranks``, the radius cancels to leading order and the learning rate is a distance, as in
:class:`~zokernel.estimators.one_sided.OneSided` with ``normalize``.  Shaped as ``leave_one_out``, the estimate is
divided by :math:`\epsilon` and its mean is the gradient's; an antithetic pair is left out together, which leaves the
two-point difference.

References: Salimans et al. (2017), Evolution Strategies as a Scalable Alternative to Reinforcement Learning,
arXiv:1703.03864 (antithetic pairs, centred ranks); Qiu et al. (2025), Evolution Strategies at Scale, arXiv:2509.24372
(z-scores of one-sided losses).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate, Estimator, Offsets, check_radius
from zokernel.estimators.shaping import SHAPINGS
from zokernel.values import check_switches, plain_fields


@dataclass(frozen=True)
class Population(Estimator):
    """Shaped losses of ``num_perturbations`` members, or of twice as many in antithetic pairs.

    Args:
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per estimate, each costing one forward pass, or two if antithetic.
        shaping: ``z_score``, ``centred_ranks`` or ``leave_one_out``; see :mod:`zokernel.estimators.shaping`.
        antithetic: Whether each direction is taken both ways.

    Raises:
        UsageError: If a setting is out of range, or one member alone is to be compared.

    Example:
        >>> population = Population(eps=0.5, num_perturbations=2, antithetic=False)
        >>> population.combine([3.0, 1.0], seed=0, step=0).coefficients
        {0: 0.5, 1: -0.5}
    """

    eps: float = 1e-3
    num_perturbations: int = 15
    shaping: str = "z_score"
    antithetic: bool = True

    def __post_init__(self):
        plain_fields(self)
        check_radius(self.eps, self.num_perturbations)
        check_switches(antithetic=self.antithetic)
        if self.shaping not in list(SHAPINGS):
            raise UsageError(f"shaping must be one of {', '.join(SHAPINGS)}, not {self.shaping!r}.")
        if self.num_perturbations < 2 and not self.antithetic:
            raise UsageError(
                "A population of one member has nothing to be compared with: set num_perturbations to at least 2, or "
                "antithetic to true."
            )

    def points(self, *, seed: int, step: int) -> list[Offsets]:
        """Return the members: one end of every direction, or both, one after the other."""
        ends = (self.eps, -self.eps) if self.antithetic else (self.eps,)
        return [{index: end} for index in range(self.num_perturbations) for end in ends]

    def combine(self, losses: Sequence[float], *, seed: int, step: int) -> Estimate:
        """Return the weights of the directions; all zero if all losses are equal."""
        unbiased = self.shaping == "leave_one_out"
        pairs_left_out = unbiased and self.antithetic
        shaped = list(losses) if pairs_left_out else SHAPINGS[self.shaping](losses)
        if self.antithetic:
            shaped = [(plus - minus) / 2 for plus, minus in zip(shaped[::2], shaped[1::2], strict=True)]
        scale = self.num_perturbations * (self.eps if unbiased else 1.0)
        spread = None if unbiased else statistics.pstdev(losses)
        return Estimate({index: weight / scale for index, weight in enumerate(shaped)}, list(losses), loss_std=spread)

    def gain_at(self, step: int, last: Estimate | None = None) -> float:
        r"""Return one for ``leave_one_out``, else :math:`\epsilon / \sigma` of the last losses (before them: NaN).

        Ranks are :math:`\Phi((l - \bar l) / \sigma) - 1/2` of losses that are normally distributed, so their gain is
        that of z-scores times the mean slope :math:`E[\Phi'(x)] = 1 / (2 \sqrt \pi)`.
        """
        if self.shaping == "leave_one_out":
            return 1.0
        if last is None or last.loss_std is None:
            return math.nan
        slope = 1.0 if self.shaping == "z_score" else 0.5 / math.sqrt(math.pi)
        return slope * self.eps / last.loss_std if last.loss_std else 0.0

    @property
    def normalize(self) -> bool:
        """Whether a common scale of all losses does not matter."""
        return self.shaping != "leave_one_out"
