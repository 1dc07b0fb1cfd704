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
from zokernel.directions.backends import dispatch
from zokernel.directions.base import Directions
from zokernel.directions.terms import Job, Term, Values
from zokernel.directions.weights.placement import Placement, place_all
from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.estimators.curvature import TwoPointCurvature
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer

# Elements whose directions are held at a time: a temporary as large as an embedding would be a fifth of a small model.
WINDOW = 1 << 21


class Preconditioned(Directions):
    r"""Directions :math:`H^{-1/2} z` with a diagonal H by tensor name, generated a window of a tensor at a time.

    Args:
        base: Dense directions z.
        curvature: H by name, positive, float32; read anew at every use.
    """

    def __init__(self, base: Dense, curvature: Mapping[str, Tensor]):
        super().__init__()
        self.base, self.curvature = base, curvature
        self.distribution = base.distribution

    def draw(self, name: str, begin: int, end: int, *, seed: int, step: int, index: int) -> Tensor:
        """Return z at positions ``begin`` to ``end`` of a tensor, (end - begin,) float32."""
        curvature = self.curvature[name]
        z = torch.zeros(end - begin, device=curvature.device)
        place = Placement(name, z, z, (curvature.numel(),), (begin,))
        (term,) = self.base.terms([place], seed=seed, step=step, index=index)
        if term is not None:
            dispatch.sweep([Job(place, (term,), (1.0,))], self.backend)
        return z

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the scaled directions of whole tensors as values; see :meth:`Directions.terms`."""
        result: list[Term | None] = []
        for place in places:
            z = self.draw(place.name, 0, place.numel, seed=seed, step=step, index=index)
            for begin, end in windows(z):
                z[begin:end] *= self.curvature[place.name].view(-1)[begin:end].rsqrt()
            result.append(Values(z.view(place.shape)))
        return result

    def sweep_(self, tensors: Mapping[str, Tensor], scale: Any, **kwargs: Any) -> dict[str, float]:
        """Sweep one window after the other, so that only its directions are held; see :meth:`Directions.sweep_`."""
        peaks: dict[str, float] = {}
        step, index = (v if isinstance(v, int) else [*v, 0][0] for v in (kwargs["step"], kwargs["index"]))
        kwargs["rounding"] = kwargs.get("rounding") or (step, index)
        for place in place_all(tensors):
            name, local = place.name, place.local
            if not local.is_contiguous() or tuple(local.shape) != place.shape:
                peaks |= super().sweep_({name: tensors[name]}, scale, **kwargs)
                continue
            for number, (begin, end) in enumerate(windows(local)):
                # Windows count positions from their own start: they need their own bits to round with.
                rounding = kwargs["rounding"][0], kwargs["rounding"][1] + (number << 20)
                window = _Window(self, begin, end)
                found = window.sweep_({name: local.view(-1)[begin:end]}, scale, **kwargs | {"rounding": rounding})
                peaks[name] = max(peaks.get(name, 0.0), found[name])
        return peaks


class _Window(Directions):
    """The directions of :class:`Preconditioned` on a stretch of one tensor."""

    def __init__(self, whole: Preconditioned, begin: int, end: int):
        super().__init__(whole.backend)
        self.whole, self.begin, self.end = whole, begin, end

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the scaled directions of the stretch; see :meth:`Directions.terms`."""
        (place,) = places
        z = self.whole.draw(place.name, self.begin, self.end, seed=seed, step=step, index=index)
        return [Values(z.mul_(self.whole.curvature[place.name].view(-1)[self.begin : self.end].rsqrt()))]


def windows(tensor: Tensor) -> list[tuple[int, int]]:
    """Return begin and end of the stretches of at most ``WINDOW`` elements that make up a tensor."""
    return [(begin, min(begin + WINDOW, tensor.numel())) for begin in range(0, tensor.numel(), WINDOW)]


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
        count = len(estimate.curvature)
        for name, hessian in self.curvature.items():
            flat = hessian.view(-1)
            for begin, end in windows(flat):
                growth = torch.full((end - begin,), 1 - self.hessian_smooth, device=flat.device)
                for index, curvature in enumerate(estimate.curvature):
                    z = self.directions.draw(name, begin, end, seed=self.seed, step=self.step_count, index=index)
                    growth.add_(z.square_(), alpha=self.hessian_smooth * abs(curvature) / 2 / count)
                flat[begin:end] *= growth

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``, with its Hessian."""
        super().load_state_dict(state_dict)
        for name, tensor in self.named_params.items():
            self.curvature[name] = self.state[tensor]["hessian"]
