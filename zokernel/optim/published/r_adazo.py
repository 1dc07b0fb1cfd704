"""R-AdaZO: Adam whose second moment is that of the momentum."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.estimators import TwoPoint
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.adam import Adam
from zokernel.optim.zeroth_order import ZerothOrder


@register("r_adazo")
class RAdaZO(ZerothOrder):
    r"""Adam on a zeroth-order estimate, divided by the size of the momentum; two fp32 copies of the parameters.

    .. math:: m \leftarrow \beta_1 m + (1-\beta_1)\hat g, \quad \hat m = \frac{m}{1-\beta_1^t}, \quad
        v \leftarrow \beta_2 v + (1-\beta_2)\hat m^2, \quad
        \theta \leftarrow \theta - \eta\, \frac{\hat m}{\sqrt{v/(1-\beta_2^t)} + \delta}

    The published code has no corrections by :math:`1-\beta^t`, so its first step is
    :math:`1/\sqrt{1-\beta_2} = 32` times as long as its learning rate says.  The first step here is as long as Adam's.

    A momentum of pure noise is :math:`\sqrt{(1+\beta_1)/(1-\beta_1)} = 4.4` times smaller than the estimates in it.
    So at one learning rate this method moves up to 4.4 times as far as :class:`~zokernel.optim.ZOAdam`.  Compare the
    two at rates that differ by this factor, or each at its own best rate.

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
        >>> optimizer = RAdaZO([weight], lr=0.02)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(400)]
        >>> losses[-1] < 1e-2 < losses[0]
        True

    References:
        Shu et al. (2025), Refining Adaptive Zeroth-Order Optimization at Ease, arXiv:2502.01014.
    """

    memory_copies = 2.0

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
            update=Adam(beta1, beta2, delta, of_momentum=True),
            **options,
        )
