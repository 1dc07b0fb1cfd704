"""Zeroth-order SGD with Richardson-extrapolated differences: KerZOO's order of bias at MeZO's variance."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.estimators import Richardson as RichardsonEstimator
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder


@register("richardson")
class Richardson(ZerothOrder):
    r"""Zeroth-order SGD whose projected gradients are exact to :math:`O(\epsilon^4)`.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P \frac{4 D_p(\epsilon/2) - D_p(\epsilon)}{3}\, z_p

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: As for :class:`~zokernel.optim.MeZO`.
        distribution: As for :class:`~zokernel.optim.MeZO`.
        momentum: As for :class:`~zokernel.optim.MeZO`.
        eps: The larger of the two radii, in units of the weights.
        num_perturbations: Directions per step; each costs four forward passes.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        The slope of a cubic is exact, where a symmetric difference would be off by eps squared.

        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        >>> optimizer = Richardson([weight], lr=0.1, eps=0.5)
        >>> loss = optimizer.step(lambda: weight.pow(3).sum())
        >>> round(weight.item(), 12)  # 1 - 0.1 * 3
        0.7

    References:
        Richardson (1911), The approximate arithmetical solution by finite differences, Phil. Trans. A 210.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        distribution: str = "rademacher",
        momentum: float = 0.0,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=RichardsonEstimator(eps, num_perturbations),
            update=SGD(momentum),
            **options,
        )
