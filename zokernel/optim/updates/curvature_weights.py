"""Weights that fall with the curvature along each direction, as 1.5-SPSA has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.optim.trained import Trained
from zokernel.optim.updates.base import Update
from zokernel.values import is_number, plain_fields


@dataclass
class CurvatureWeights(Update):
    r"""Weight every coefficient by :math:`1 / \max(1, |c_p|^a)`, with the curvature :math:`c_p` along its direction.

    The mean weight becomes the factor of the estimate, so that ``effective_lr()`` counts it.

    Args:
        power: a, in [0, 1].

    Raises:
        UsageError: If the power is out of range.

    References:
        Chaubard et al. (2026), Probe-Space Preconditioning for Fast and Stable Zero-Order Training (1.5-SPSA),
        arXiv:2609.38095.
    """

    normalizes = True
    power: float = 0.1

    def __post_init__(self) -> None:
        plain_fields(self)
        if not (is_number(self.power) and 0 <= self.power <= 1):
            raise UsageError(f"The power of the curvature must be in [0, 1], not {self.power!r}.")

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the weighted estimate.

        Raises:
            UsageError: If the estimator measures no curvature.
        """
        if estimate.curvature is None:
            raise UsageError("Weights by curvature need an estimator that measures it: use two_point_curvature.")
        weights = [curvature_weight(curvature, self.power) for curvature in estimate.curvature]
        mean = math.fsum(weights) / len(weights)
        weighted = {i: c * w / mean for (i, c), w in zip(estimate.coefficients.items(), weights, strict=True)}
        return replace(estimate, coefficients=weighted, factor=estimate.factor * mean)


def curvature_weight(curvature: float, power: float) -> float:
    r"""Return :math:`1 / \max(1, |c|^a)`.

    Example:
        >>> curvature_weight(-1024.0, 0.1), curvature_weight(0.5, 0.1)
        (0.5, 1.0)
    """
    return 1 / max(1.0, abs(curvature) ** power)
