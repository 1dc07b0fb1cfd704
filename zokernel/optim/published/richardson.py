"""Zeroth-order SGD with Richardson-extrapolated differences: KerZOO's order of bias at MeZO's variance."""

from __future__ import annotations

from zokernel.directions import Dense
from zokernel.estimators.richardson import Richardson as RichardsonEstimator
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer


@register("richardson")
class Richardson(ZerothOrderOptimizer):
    r"""Zeroth-order SGD whose projected gradients are exact to :math:`O(\epsilon^4)` (theory C.4).

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P \frac{4 D_p(\epsilon/2) - D_p(\epsilon)}{3}\, z_p

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: The larger of the two radii, in units of the weights.
        num_perturbations: Directions a step; each costs four forward passes.
        distribution: Law of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Richardson([weight], lr=0.05)
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
        distribution: str = "rademacher",
        seed: int = 0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        restore: str = "fold",
    ):
        super().__init__(
            params,
            estimator=RichardsonEstimator(eps, num_perturbations),
            directions=Dense(distribution),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            seed=seed,
            restore=restore,
        )
