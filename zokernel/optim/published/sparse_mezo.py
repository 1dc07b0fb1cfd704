"""Sparse-MeZO: only the small weights of each tensor are perturbed and trained."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Sparse
from zokernel.estimators import TwoPoint
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder


@register("sparse_mezo")
class SparseMeZO(ZerothOrder):
    r"""MeZO on directions :math:`m \odot z` with :math:`m_k = 1[|\theta_k| \le h]`, h a quantile of each tensor.

    The mask is taken from the weights when the optimizer is made, and kept as one bit per weight, in the state too.
    Masks recomputed later would differ between the two ends of a perturbation, and drift with training.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        density: Share of each tensor that is trained: its smallest weights.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step; each costs two forward passes.
        distribution: Distribution of the trained coordinates: ``rademacher``, ``gaussian`` or ``uniform``.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.  Weight decay applies to all weights.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([0.1, -0.2, 3.0, -4.0]))
        >>> optimizer = SparseMeZO([weight], lr=0.05, density=0.5)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> weight.detach().round(decimals=2).abs()
        tensor([0., 0., 3., 4.])

    References:
        Liu et al. (2024), Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning,
        arXiv:2402.15751.
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
        momentum: float = 0.0,
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Sparse(density=density, distribution=distribution),
            estimator=TwoPoint(eps, num_perturbations),
            update=SGD(momentum),
            **options,
        )
