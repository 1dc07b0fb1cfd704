r"""HiZOO: directions scaled by an estimate of the Hessian's diagonal.

.. math:: \tilde z = H^{-1/2} z, \qquad \theta \leftarrow \theta - \eta\,
    \frac{L(\theta + \epsilon\tilde z) - L(\theta - \epsilon\tilde z)}{2\epsilon}\,\tilde z,

.. math:: H \leftarrow (1-\alpha) H + \alpha\, \frac{|L_+ + L_- - 2L_0|}{2\epsilon^2}\, H z^2

The mean step is :math:`-\eta H^{-1}\nabla L`.  In high dimension :math:`E[z_i^2\, z^T H z] = tr H + 2H_{ii}` is nearly
the same for all i, so H mostly learns the mean curvature.

The class differs from the published code on purpose.  H is fp32 for any weights, since no fp16 entry ever changes with
the published smoothing of 1e-8.  Perturbation and update use the same H, so the estimate is unbiased for
:math:`H^{-1}\nabla L`.  A step takes three forward passes, not four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from zokernel.directions import Dense
from zokernel.directions.families.preconditioned import Preconditioned
from zokernel.errors import UsageError
from zokernel.estimators import Estimate, TwoPointCurvature
from zokernel.optim.affine_move import AffineMove
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.trained import Trained
from zokernel.optim.updates.base import Update
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.values import check_shares, plain_number


class RenewHessian(Update):
    """Renews the diagonal that preconditions the directions, after the step that used it.

    Args:
        directions: The preconditioned directions.
        smooth: :math:`alpha`, the weight of a new curvature in the running one.

    Raises:
        UsageError: If the weight is out of range.
    """

    def __init__(self, directions: Preconditioned, smooth: float):
        smooth = plain_number("hessian_smooth", smooth)
        check_shares(hessian_smooth=smooth)
        self.directions, self.smooth = directions, smooth

    def __repr__(self) -> str:
        return f"RenewHessian({self.smooth})"

    def attach(self, trained: Trained) -> None:
        """Keep H in the optimizer's state, where checkpoints have it; take it from there after one was loaded."""
        for name, tensor in trained.named_params.items():
            state = trained.state[tensor]
            self.directions.curvature[name] = state.setdefault("hessian", self.directions.curvature[name])

    def after_move(self, trained: Trained, estimate: Estimate, moves: Sequence[AffineMove]) -> Sequence[AffineMove]:
        """Renew H from the second differences of the step."""
        assert estimate.curvature is not None
        if self.smooth == 0:
            return moves
        draw = {"seed": trained.seed, "step": trained.step_count}
        self.directions.learn(estimate.curvature, self.smooth, names=list(trained.active), **draw)
        return moves


@register("hizoo")
class HiZOO(ZerothOrder):
    r"""Zeroth-order SGD preconditioned by a running estimate of the Hessian's diagonal.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        hessian_smooth: :math:`\alpha`, the weight of a new curvature in the running one.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step; each costs two forward passes, and one more is shared by all.
        distribution: Distribution of the directions: ``gaussian`` or ``uniform``.  Rademacher directions have
            :math:`z_i^2 = 1` and cannot tell coordinates apart.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Raises:
        UsageError: If a setting is out of range, or the distribution cannot tell coordinates apart.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = HiZOO([weight], lr=0.05, hessian_smooth=1e-4)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(300)]
        >>> losses[-1] < 1e-2 < losses[0]
        True

    References:
        Zhao et al. (2024), Second-Order Fine-Tuning without Pain for LLMs: A Hessian Informed Zeroth-Order Optimizer,
        arXiv:2402.15173.
    """

    memory_copies = 1.0
    directions: Preconditioned

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        hessian_smooth: float = 1e-6,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        distribution: str = "gaussian",
        **options: Unpack[ZerothOrderOptions],
    ):
        if distribution not in ("gaussian", "uniform"):
            raise UsageError(
                f"HiZOO learns the Hessian from z_i^2, which {distribution} directions do not offer tensor by tensor: "
                "use gaussian or uniform."
            )
        directions = Preconditioned(Dense(distribution))
        super().__init__(
            params,
            lr,
            directions=directions,
            estimator=TwoPointCurvature(eps, num_perturbations),
            update=[SGD(), RenewHessian(directions, hessian_smooth)],
            **options,
        )

    @property
    def curvature(self) -> dict[str, Tensor]:
        """The running diagonal by parameter name, fp32."""
        return self.directions.curvature
