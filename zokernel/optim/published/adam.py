"""ZO-Adam (MeZO-Adam) and ZO-AdaMM: Adam and AMSGrad on a zeroth-order estimate."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.estimators import TwoPoint
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.adam import Adam
from zokernel.optim.zeroth_order import ZerothOrder


@register("zo_adam")
class ZOAdam(ZerothOrder):
    r"""Adam on the average of two-point estimates; two fp32 copies of the parameters.

    .. math:: m \leftarrow \beta_1 m + (1-\beta_1)\hat g, \quad v \leftarrow \beta_2 v + (1-\beta_2)\hat g^2, \quad
        \theta \leftarrow \theta - \eta\, \frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)} + \delta}

    with :math:`\hat g` MeZO's estimate.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate: about how far each weight moves in a step.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        delta: Added to the root of the second moment (Adam's own epsilon).
        eps: As for :class:`~zokernel.optim.MeZO`.
        num_perturbations: As for :class:`~zokernel.optim.MeZO`.
        distribution: As for :class:`~zokernel.optim.MeZO`.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ZOAdam([weight], lr=0.05)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(300)]
        >>> losses[-1] < 1e-2 < losses[0]
        True

    References:
        Malladi et al. (2023), arXiv:2305.17333, appendix B; Kingma and Ba (2015), arXiv:1412.6980.
    """

    memory_copies = 2.0
    amsgrad = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-5,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        delta: float = 1e-8,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        distribution: str = "rademacher",
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=TwoPoint(eps, num_perturbations),
            update=Adam(beta1, beta2, delta, amsgrad=self.amsgrad),
            **options,
        )


@register("zo_adamm")
class ZOAdaMM(ZOAdam):
    """ZO-AdaMM: the same with the running maximum of the second moment; one more copy of the parameters.

    References:
        Chen et al. (2019), ZO-AdaMM: Zeroth-Order Adaptive Momentum Method, arXiv:1910.06513.
    """

    memory_copies = 3.0
    amsgrad = True
