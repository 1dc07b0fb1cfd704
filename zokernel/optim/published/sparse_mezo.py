"""Sparse-MeZO: only the small weights of each tensor are perturbed and trained."""

from __future__ import annotations

from zokernel.directions import Sparse
from zokernel.estimators.two_point import TwoPoint
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer


@register("sparse_mezo")
class SparseMeZO(ZerothOrderOptimizer):
    r"""MeZO on directions :math:`m \odot z` with :math:`m_k = 1[|\theta_k| \le h]`, h a quantile of each tensor.

    The mask is taken from the weights when the optimizer is made and kept as one bit a weight, in the state too: masks
    recomputed later would differ between the two ends of a perturbation and drift with training.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        density: Share of each tensor that is trained: its smallest weights.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs two forward passes.
        distribution: Law of the trained coordinates: ``rademacher``, ``gaussian`` or ``uniform``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay; it applies to all weights.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([0.1, -0.2, 3.0, -4.0]))
        >>> optimizer = SparseMeZO([weight], lr=0.05, density=0.5)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> weight.detach().round(decimals=2).abs()
        tensor([0., 0., 3., 4.])
    """

    directions: Sparse

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        density: float = 0.25,
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
            estimator=TwoPoint(eps, num_perturbations),
            directions=Sparse(distribution, density=density),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            seed=seed,
            restore=restore,
        )
        self.directions.freeze(self.named_params)
