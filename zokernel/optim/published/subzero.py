"""SubZero: perturbations of every matrix inside random row and column spaces of low dimension."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Subspace
from zokernel.estimators import TwoPoint
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder


@register("subzero")
class SubZero(ZerothOrder):
    r"""MeZO on directions :math:`z = U Z V^T \sqrt{mn}/r`, with U and V redrawn every ``refresh`` steps.

    The scale makes :math:`E|z|^2 = mn` as for dense directions, so ``eps`` and ``lr`` mean the same as for MeZO, and
    the estimate is unbiased over the draws of U and V.  Its variance is not smaller than MeZO's.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        rank: r, the dimension of the row and column spaces.
        refresh: Steps for which U and V stay.
        most_square: Refold thin matrices, such as adapters, into the most square ones.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step; each costs two forward passes.
        distribution: Distribution of Z, and of the directions of vectors: ``gaussian``, ``rademacher`` or ``uniform``.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.  Bases are drawn from the seed too, so a
            resumed run has the same ones.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(6, 5))
        >>> optimizer = SubZero([weight], lr=0.005, rank=2, refresh=10)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(600)]
        >>> losses[-1] < 0.3 < losses[0]
        True

    References:
        Yu et al. (2024), Zeroth-Order Fine-Tuning of LLMs in Random Subspaces, arXiv:2410.08989.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        rank: int = 8,
        refresh: int = 1000,
        most_square: bool = False,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        distribution: str = "gaussian",
        momentum: float = 0.0,
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Subspace(distribution=distribution, rank=rank, refresh=refresh, most_square=most_square),
            estimator=TwoPoint(eps, num_perturbations),
            update=SGD(momentum),
            **options,
        )
