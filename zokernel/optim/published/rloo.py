"""RLOO: leave-one-out differences, one forward pass per direction and none for the unperturbed weights."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.estimators import LeaveOneOut
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder


@register("rloo")
class RLOO(ZerothOrder):
    r"""Zeroth-order SGD in which the baseline of each direction is the mean loss of the others.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P \epsilon} \sum_{p=1}^P \Big( L(\theta + \epsilon z_p)
        - \frac{1}{P-1} \sum_{q \ne p} L(\theta + \epsilon z_q) \Big) z_p

    P forward passes give P directions.  The estimate has the mean of MeZO's and, at equal forwards, about the variance
    of one-sided differences; :mod:`zokernel.estimators.leave_one_out` has the exact second moments.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step, at least 2; each costs one forward pass.
        distribution: Distribution of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = RLOO([weight], lr=0.05)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True

    References:
        Seung, Lee and Ko (2025), Low-Rank Curvature for Zeroth-Order Optimization in LLM Fine-Tuning (LOREN),
        arXiv:2511.07971, whose baseline this is, on dense directions.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 8,
        distribution: str = "rademacher",
        momentum: float = 0.0,
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=LeaveOneOut(eps, num_perturbations),
            update=SGD(momentum),
            **options,
        )
