"""1.5-SPSA: two-point differences, each weighted down by the curvature along its direction."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.estimators import TwoPointCurvature
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.curvature_weights import CurvatureWeights
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder


@register("spsa_1_5")
class SPSA15(ZerothOrder):
    r"""Zeroth-order SGD that trusts a direction less the more the loss curves along it.

    .. math:: c_p = \frac{L(\theta + \epsilon z_p) - 2 L(\theta) + L(\theta - \epsilon z_p)}{\epsilon^2}, \qquad
        w_p = \frac{1}{\max(1, |c_p|^a)},

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P w_p
        \frac{L(\theta + \epsilon z_p) - L(\theta - \epsilon z_p)}{2\epsilon}\, z_p

    The published runs have :math:`\eta = \epsilon`, so that a step is :math:`\frac{1}{2P} \sum_p w_p (L_+ - L_-) z_p`.

    In many dimensions :math:`c_p = z_p^T H z_p` is nearly the same for all directions.  With Rademacher ones its mean
    is tr H, and its variance is twice the sum of the squares of H off its diagonal.  So the weights mostly scale the
    learning rate, by :math:`(tr H)^{-a}`.  Rounding of a loss enters :math:`c_p` divided by :math:`\epsilon^2`, so
    take losses in fp32.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        power: a, in [0, 1]; zero is MeZO with one more forward pass.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step; each costs two forward passes, and one more is shared by all.
        distribution: Distribution of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Raises:
        UsageError: If a setting is out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = SPSA15([weight], lr=0.05, num_perturbations=4)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True

    References:
        Chaubard, Kochenderfer and Ré (2026), Probe-Space Preconditioning for Fast and Stable Zero-Order Training,
        arXiv:2609.38095; Spall (1992), Multivariate stochastic approximation using a simultaneous perturbation gradient
        approximation.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 5e-4,
        *,
        power: float = 0.1,
        eps: float = 5e-4,
        num_perturbations: int = 160,
        distribution: str = "rademacher",
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=TwoPointCurvature(eps, num_perturbations),
            update=[CurvatureWeights(power), SGD()],
            **options,
        )
