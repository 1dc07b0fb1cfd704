"""MeZO: two-point SPSA with plain SGD, at the memory of inference."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.estimators import TwoPoint
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder


@register("mezo")
class MeZO(ZerothOrder):
    r"""Zeroth-order SGD with the memory of inference.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P
        \frac{L(\theta + \epsilon z_p) - L(\theta - \epsilon z_p)}{2\epsilon}\, z_p

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: P, directions per step; each costs two forward passes.
        sample_schedule: ``constant``, or ``linear``: :math:`\max(1, \lfloor P t/T \rfloor)` directions in step t = 0,
            1, ... of T, which stays below P.
        total_steps: T, the length of the run, which the linear sample schedule needs.
        distribution: Distribution of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = MeZO([weight], lr=0.05)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True

    References:
        Malladi et al. (2023), Fine-Tuning Language Models with Just Forward Passes, arXiv:2305.17333, Algorithm 1;
        Spall (1992), Multivariate stochastic approximation using a simultaneous perturbation gradient approximation.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        sample_schedule: str = "constant",
        total_steps: int | None = None,
        distribution: str = "rademacher",
        momentum: float = 0.0,
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=TwoPoint(eps, num_perturbations, sample_schedule, total_steps),
            update=SGD(momentum),
            **options,
        )
