"""FZOO: batched one-sided differences, normalised by the spread of the losses."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.estimators import OneSided
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrder


@register("fzoo")
class FZOO(ZerothOrder):
    r"""Normalised zeroth-order SGD from one-sided differences.

    .. math:: \theta \leftarrow \theta - \eta \sum_{p=1}^P \frac{L(\theta + \epsilon z_p) - L(\theta)}{P\,\sigma}\, z_p

    with :math:`\sigma` the standard deviation of the P perturbed losses.  Since
    :math:`\sigma \approx \epsilon \|\nabla L\|`, this is normalised gradient descent and the learning rate is a
    distance.  When all losses are equal, the weights stay.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step; each costs one forward pass, and one more is shared by all.
        distribution: Distribution of the directions; the published method uses ``rademacher``.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = FZOO([weight], lr=0.02)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-2 < losses[0]
        True

    References:
        Dang et al. (2025), FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models,
        arXiv:2506.09034.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 5e-5,
        *,
        eps: float = 1e-4,
        num_perturbations: int = 8,
        distribution: str = "rademacher",
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=OneSided(eps, num_perturbations, normalize=True),
            **options,
        )
