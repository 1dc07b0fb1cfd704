"""MeZO: in-place two-point SPSA with plain SGD (Malladi et al. 2023)."""

from __future__ import annotations

from zokernel.directions import Dense
from zokernel.estimators.two_point import TwoPoint
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer


@register("mezo")
class MeZO(ZerothOrderOptimizer):
    r"""Zeroth-order SGD with the memory of inference.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P
        \frac{L(\theta + \epsilon z_p) - L(\theta - \epsilon z_p)}{2\epsilon}\, z_p

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs two forward passes.
        sample_schedule: ``constant``, or ``linear``: from one direction to ``num_perturbations`` over the run.
        total_steps: Length of the run, which the linear sample schedule needs.
        distribution: Law of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = MeZO([weight], lr=0.05)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True
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
        seed: int = 0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        restore: str = "fold",
    ):
        super().__init__(
            params,
            estimator=TwoPoint(eps, num_perturbations, sample_schedule, total_steps),
            directions=Dense(distribution),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            seed=seed,
            restore=restore,
        )
