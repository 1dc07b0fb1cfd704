r"""HiZOO: directions scaled by an estimate of the Hessian's diagonal.

.. math:: \tilde z = H^{-1/2} z, \qquad \theta \leftarrow \theta - \eta\,
    \frac{L(\theta + \epsilon\tilde z) - L(\theta - \epsilon\tilde z)}{2\epsilon}\,\tilde z, \qquad
    H \leftarrow (1-\alpha) H + \alpha\, \frac{|L_+ + L_- - 2L_0|}{2\epsilon^2}\, H z^2

The mean step is :math:`-\eta H^{-1}\nabla L`.  Differences from the published code, which are on purpose: H is fp32
for any weights (with the published smoothing of 1e-8 no fp16 entry ever changes); perturbation and update use the same
H, so that the estimate is unbiased for :math:`H^{-1}\nabla L`; a step takes three forward passes, not four.  In
high dimension :math:`E[z_i^2\, z^T H z] = tr H + 2H_{ii}` is nearly the same for all i, so H mostly learns
the mean curvature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokernel.directions import Dense
from zokernel.directions.family import Family
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Term, Values
from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.estimators.curvature import TwoPointCurvature
from zokernel.optim.base import ZerothOrderOptimizer
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register

PIECE = 1 << 17


class Preconditioned(Family):
    r"""Directions :math:`H^{-1/2} z` with a diagonal H by tensor name, generated a tensor at a time.

    Args:
        base: Dense directions z.
        curvature: H by name, positive, float32; read anew at every use.
    """

    def __init__(self, base: Dense, curvature: Mapping[str, Tensor]):
        super().__init__()
        self.base, self.curvature = base, curvature
        self.law = base.law

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the scaled directions as values; see :meth:`Family.terms`."""
        like = {place.name: self.curvature[place.name] for place in places}
        draws = self.base(like, seed=seed, step=step, index=index)
        for place in places:
            # In pieces: a root of the whole Hessian would be one more temporary of the tensor's size.
            pieces = draws[place.name].view(-1).split(PIECE), self.curvature[place.name].view(-1).split(PIECE)
            for draw, curvature in zip(*pieces):
                draw.mul_(curvature.rsqrt())
        return [Values(draws[place.name]) for place in places]

    def sweep_(self, tensors: Mapping[str, Tensor], scale: Any, **kwargs: Any) -> dict[str, float]:
        """Sweep one tensor after the other, so that only one direction is held; see :meth:`Family.sweep_`."""
        peaks: dict[str, float] = {}
        for name, tensor in tensors.items():
            peaks |= super().sweep_({name: tensor}, scale, **kwargs)
        return peaks


@register("hizoo")
class HiZOO(ZerothOrderOptimizer):
    r"""Zeroth-order SGD preconditioned by a running estimate of the Hessian's diagonal.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs two forward passes, and one more is shared by all.
        hessian_smooth: :math:`\alpha`, the weight of a new curvature in the running one.
        distribution: Law of the directions: ``gaussian`` or ``uniform``.  Rademacher directions have
            :math:`z_i^2 = 1` and cannot tell coordinates apart.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Raises:
        UsageError: If a setting is out of range, or the law cannot tell coordinates apart.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = HiZOO([weight], lr=0.05, hessian_smooth=1e-4)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(300)]
        >>> losses[-1] < 1e-2 < losses[0]
        True
    """

    memory_copies = 1.0

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        hessian_smooth: float = 1e-6,
        distribution: str = "gaussian",
        seed: int = 0,
        weight_decay: float = 0.0,
        restore: str = "fold",
    ):
        if distribution not in ("gaussian", "uniform"):
            raise UsageError(
                f"HiZOO learns the Hessian from z_i^2, which {distribution} directions do not offer tensor by tensor: "
                "use gaussian or uniform."
            )
        if not 0 <= hessian_smooth < 1:
            raise UsageError(f"hessian_smooth must be in [0, 1), not {hessian_smooth}.")
        self.hessian_smooth = hessian_smooth
        self.curvature: dict[str, Tensor] = {}
        super().__init__(
            params,
            estimator=TwoPointCurvature(eps, num_perturbations),
            directions=Preconditioned(Dense(distribution), self.curvature),
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            restore=restore,
        )
        for name, tensor in self.named_params.items():
            ones = torch.ones_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format)
            self.state[tensor]["hessian"] = self.curvature[name] = ones

    @property
    def is_replayable(self) -> bool:
        """Never: the directions depend on the Hessian, which the scalars of one step do not give."""
        return False

    def effective_lr(self) -> float:
        r"""Return :math:`\eta` times the mean of :math:`1/H`: the mean step is :math:`\eta H^{-1}\nabla L`."""
        total = sum(float(h.reciprocal().sum(dtype=torch.float64)) for h in self.curvature.values())
        return super().effective_lr() * total / sum(h.numel() for h in self.curvature.values())

    def update(self, estimate: Estimate) -> None:
        """Step with the Hessian that the perturbations used, then renew it."""
        super().update(estimate)
        assert estimate.curvature is not None
        if self.hessian_smooth == 0:
            return
        assert isinstance(self.directions, Preconditioned)
        for name, hessian in self.curvature.items():
            growth: Tensor | None = None
            for index, curvature in enumerate(estimate.curvature):
                z = self.directions.base({name: hessian}, seed=self.seed, step=self.step_count, index=index)[name]
                z.square_().mul_(self.hessian_smooth * abs(curvature) / 2 / len(estimate.curvature))
                growth = z if growth is None else growth.add_(z)
            if growth is not None:
                hessian.mul_(growth.add_(1 - self.hessian_smooth))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``, with its Hessian."""
        super().load_state_dict(state_dict)
        for name, tensor in self.named_params.items():
            self.curvature[name] = self.state[tensor]["hessian"]
