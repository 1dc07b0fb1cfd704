"""ZO-signSGD: every weight moves by the learning rate, in the direction of the estimate's sign."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.estimators import TwoPoint
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.coefficients import SignOfProjections
from zokernel.optim.updates.rules import Sign
from zokernel.optim.zeroth_order import ZerothOrder


@register("zo_sign")
class ZOSign(ZerothOrder):
    r"""Sign descent on a two-point estimate.

    .. math:: \theta \leftarrow \theta - \eta\, \mathrm{sign}(\hat g) \qquad\text{or}\qquad
        \theta \leftarrow \theta - \frac{\eta}{P} \sum_p \mathrm{sign}(c_p)\, z_p

    The first is ZO-signSGD; the second, which benchmarks of language models run under that name, keeps the update a few
    scalars.  They are the same for one Rademacher direction.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate: how far each weight moves.
        sign_of: ``estimate`` or ``projection``.
        eps: As for :class:`~zokernel.optim.MeZO`.
        num_perturbations: As for :class:`~zokernel.optim.MeZO`.
        distribution: As for :class:`~zokernel.optim.MeZO`.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = ZOSign([weight], lr=0.25, num_perturbations=64)
        >>> loss = optimizer.step(lambda: weight.square().sum())
        >>> weight.detach()
        tensor([ 0.7500, -0.7500])

    References:
        Liu et al. (2019), signSGD via Zeroth-Order Oracle, ICLR; Zhang et al. (2024), arXiv:2402.11592.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        sign_of: str = "estimate",
        eps: float = 1e-3,
        num_perturbations: int = 1,
        distribution: str = "rademacher",
        **options: Unpack[ZerothOrderOptions],
    ):
        if sign_of not in ("estimate", "projection"):
            raise UsageError(f"There is no sign_of {sign_of!r}: choose estimate or projection.")
        same = num_perturbations == 1 and distribution == "rademacher"
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=TwoPoint(eps, num_perturbations),
            update=SignOfProjections() if sign_of == "projection" or same else Sign(),
            **options,
        )

    def effective_lr(self) -> float:
        """Return the learning rate; sign descent normalises the gradient, so it does not compare with SGD's."""
        return self.param_groups[0]["lr"]
