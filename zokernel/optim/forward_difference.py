"""Forward differences: all directions of a step share one loss at the unperturbed weights."""

from __future__ import annotations

from zokernel.directions import Dense
from zokernel.estimators.one_sided import OneSided
from zokernel.optim.base import ZerothOrderOptimizer
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register


@register("forward_difference")
class ForwardDifference(ZerothOrderOptimizer):
    r"""Zeroth-order SGD from one-sided differences: P + 1 forward passes for P directions.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P
        \frac{L(\theta + \epsilon z_p) - L(\theta)}{\epsilon}\, z_p

    MeZO needs 2P forwards for as many directions.  A direction's slope is off by
    :math:`\frac{\epsilon}{2} z_p^T H z_p`, which adds noise but no bias under a symmetric law:
    :math:`E[(z^T H z)\, z] = 0`.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs one forward pass, and one more is shared by all.
        distribution: Law of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ForwardDifference([weight], lr=0.05, num_perturbations=4)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-2 < losses[0]
        True
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 2,
        distribution: str = "rademacher",
        seed: int = 0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        restore: str = "fold",
    ):
        super().__init__(
            params,
            estimator=OneSided(eps, num_perturbations),
            directions=Dense(distribution),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            seed=seed,
            restore=restore,
        )
