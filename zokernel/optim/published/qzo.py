"""QZO: two-point SPSA with a clipped slope, for the scales of a quantized model."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.estimators import TwoPoint
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.coefficients import ClipSlopes
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.values import plain_number


@register("qzo")
class QZO(ZerothOrder):
    r"""Zeroth-order SGD with slopes clipped to :math:`[-C, C]`, which bounds the length of every step.

    .. math:: d_p = \frac{L(\theta + \epsilon z_p) - L(\theta - \epsilon z_p)}{2\epsilon}, \qquad
        \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P \max(-C, \min(C, d_p))\, z_p

    Published for the scales of a quantized model, which ``--train scales`` trains; there, scales cannot become
    negative.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step, P; each costs two forward passes.
        clip_slope: C, the largest slope that counts in full.
        distribution: Distribution of the directions: ``gaussian``, ``rademacher``, ``uniform`` or ``sphere``.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = QZO([weight], lr=0.05, clip_slope=2.0)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True

    References:
        Shang et al. (2025), Fine-tuning Quantized Neural Networks with Zeroth-order Optimization, arXiv:2505.13430.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        clip_slope: float = 100.0,
        distribution: str = "gaussian",
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=TwoPoint(eps, num_perturbations),
            update=ClipSlopes(plain_number("clip_slope", clip_slope)),
            **options,
        )
