"""Zeroth-order SGD with Richardson-extrapolated differences: KerZOO's order of bias at MeZO's variance."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.estimators import Richardson as RichardsonEstimator
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates import SGD
from zokernel.optim.zeroth_order import ZerothOrder


@register("richardson")
class Richardson(ZerothOrder):
    r"""Zeroth-order SGD whose projected gradients are exact to :math:`O(\epsilon^4)`.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P \frac{4 D_p(\epsilon/2) - D_p(\epsilon)}{3}\, z_p

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: The larger of the two radii, in units of the weights.
        num_perturbations: Directions per step; each costs four forward passes.
        distribution: Distribution of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Richardson([weight], lr=0.05)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True

    References:
        Richardson (1911), The approximate arithmetical solution by finite differences, Phil. Trans. A 210.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        distribution: str = "rademacher",
        momentum: float = 0.0,
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
