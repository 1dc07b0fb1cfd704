r"""KerZOO: kernel-smoothed zeroth-order optimization (Algorithm 1), as printed and repaired.

Printed, with :math:`\beta_t = 1 + t/6`: the gradient is estimated at :math:`\theta_t`, a step of constant length is
projected on the ball of radius R, and the weighted average :math:`\theta^{ag}` is returned.  The scheme that it copies
evaluates the gradient at :math:`\theta^{md}_t = \theta_t/\beta_t + (1 - 1/\beta_t)\theta^{ag}_t` and lengthens its
steps as :math:`\gamma(t + 1)`; without both there is averaging but no acceleration (theory C.2.4).  ``grad_at="md"``
and ``step_schedule="accelerated"`` put them back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.estimators.smoothed import Smoothed
from zokernel.optim.averaging.averages import AVERAGES, Average, total_norm
from zokernel.optim.averaging.iterate_weights import average_weight
from zokernel.optim.averaging.moves import split_move
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer
from zokernel.theory.smoothing import KernelFacts

logger = logging.getLogger(__name__)

CLIPS = ("none", "param_origin", "param_init", "grad")
STEP_SCHEDULES = ("constant", "accelerated")


@register("kerzoo")
class KerZOO(ZerothOrderOptimizer):
    r"""Kernel-smoothed zeroth-order SGD with iterate averaging.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P
        \frac{L(\theta + \epsilon r_p z_p) - L(\theta - \epsilon r_p z_p)}{2\epsilon}\, K(r_p)\, z_p

    On average this is MeZO at the learning rate :meth:`effective_lr`, which is ``4 * lr`` with the paper's settings:
    compare methods at equal effective learning rates.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate; with ``step_schedule="accelerated"`` the base :math:`\gamma` of steps :math:`\gamma(t+1)`.
        eps: Radius of the perturbation at r = 1, in units of the weights.
        num_perturbations: Directions a step; each costs two forward passes.
        kernel_order: Order of the smoothing kernel: 1, 3, 5, 7, ...
        kernel_constant: The kernel's constant C, the factor on the mean gradient at ``radius=1``.
        paper_k5: Use the misprinted constant of the paper's kernel of order 5.
        radius: Half-width of the range of r at the start.
        radius_schedule: ``none``, ``literal``, ``rescaled`` or ``lr_compensated``: whether the range shrinks during the
            run, and what that does to the kernel (see :mod:`zokernel.estimators.smoothed`).
        shrink_to: Share of ``radius`` left at the last step, when there is a schedule.
        total_steps: Length of the run, which radius schedules need.
        clip: ``none``; ``param_origin`` (as printed: projects the weights on the ball around zero); ``param_init`` (the
            ball around the initial weights, at the cost of a copy); ``grad`` (limits the estimate's norm).
        clip_radius: Radius of the clip.
        grad_at: ``theta`` (as printed) or ``md`` (repaired; needs ``averaging`` ``fp32`` or ``int8`` and fp32
            weights).
        step_schedule: ``constant`` (as printed) or ``accelerated``.
        averaging: How the averaged iterate is kept: ``none``, ``fp32``, ``int8`` or ``journal`` (no memory; rebuilt
            from seeds and scalars when asked for).  See :meth:`averaged_weights` and :meth:`averaged`.
        distribution: Law of the directions; the paper's algorithm has ``gaussian``.
        seed: Seed of all directions and radii of the run.
        weight_decay: Decoupled weight decay.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Raises:
        UsageError: If a setting is out of range or settings do not go together.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = KerZOO([weight], lr=0.01, averaging="journal")
        >>> optimizer.effective_lr()
        0.04
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True
        >>> optimizer.averaged_weights()["0"].abs().max() < 0.1
        tensor(True)
    """

    estimator: Smoothed

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 3,
        kernel_order: int = 3,
        kernel_constant: float = 4.0,
        paper_k5: bool = False,
        radius: float = 1.0,
        radius_schedule: str = "none",
        shrink_to: float = 0.1,
        total_steps: int | None = None,
        clip: str = "none",
        clip_radius: float | None = None,
        grad_at: str = "theta",
        step_schedule: str = "constant",
        averaging: str = "none",
        distribution: str = "rademacher",
        seed: int = 0,
        weight_decay: float = 0.0,
        restore: str = "fold",
    ):
        estimator = Smoothed(
            eps=eps,
            num_perturbations=num_perturbations,
            order=kernel_order,
            constant=kernel_constant,
            paper_k5=paper_k5,
            radius=radius,
            schedule=radius_schedule,
            shrink_to=shrink_to,
            total_steps=total_steps,
        )
        for what, value, known in (
            ("clip", clip, CLIPS),
            ("grad_at", grad_at, ("theta", "md")),
            ("step_schedule", step_schedule, STEP_SCHEDULES),
            ("averaging", averaging, ("none", *AVERAGES)),
        ):
            if value not in known:
                raise UsageError(f"There is no {what} {value!r}: choose one of {', '.join(known)}.")
        if (clip == "none") != (clip_radius is None) or (clip_radius is not None and not clip_radius > 0):
            raise UsageError("clip and a positive clip_radius go together: give both or neither.")
        if grad_at == "md" and averaging not in ("fp32", "int8"):
            raise UsageError(
                "grad_at='md' needs the averaged iterate at every step: set averaging to 'fp32' or 'int8'."
            )
        self.clip, self.clip_radius = clip, clip_radius
        self.grad_at, self.step_schedule = grad_at, step_schedule
        self.averaging = averaging
        self._average: Average | None = AVERAGES[averaging]() if averaging != "none" else None
        super().__init__(
            params,
            estimator=estimator,
            directions=Dense(distribution),
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            restore=restore,
        )
        if grad_at == "md" and any(p.dtype not in (torch.float32, torch.float64) for p in self.named_params.values()):
            raise UsageError(
                "grad_at='md' moves the weights by tiny amounts and needs them in fp32: load the model in fp32."
            )
        if clip == "param_init":
            for tensor in self.named_params.values():
                self.state[tensor]["initial"] = tensor.detach().clone()
        facts = self.facts()
        logger.info(
            "KerZOO: mean gradient x %.4g, second moment x %.4g, loss noise x %.4g, eps^2 bias x %.4g relative to MeZO",
            facts.gain,
            facts.second_moment_ratio,
            facts.noise_ratio,
            facts.bias_ratio,
        )

    @property
    def is_replayable(self) -> bool:
        """Whether every step is scalars times seeded directions: not with projections or with ``grad_at="md"``."""
        return self.grad_at == "theta" and self.clip in ("none", "grad")

    def facts(self) -> KernelFacts:
        """Return gain, bias, second-moment and noise ratios of the coming step's estimate, all relative to MeZO's."""
        return self.estimator.facts_at(self.step_count)

    def effective_lr(self) -> float:
        r"""Return the learning rate of MeZO that moves as far on average: :math:`\eta_t\, E[rK]` at the coming step."""
        return super().effective_lr() * self._step_factor()

    def _step_factor(self) -> float:
        return 1.0 if self.step_schedule == "constant" else self.step_count + 1.0

    def before_estimate(self) -> None:
        """Move the weights to the point where the gradient is estimated."""
        self._shift(1.0)

    def after_estimate(self) -> None:
        """Move the weights back when a step fails."""
        self._shift(-1.0)

    def _shift(self, factor: float) -> None:
        share = 1.0 - average_weight(self.step_count)
        if self.grad_at == "md" and share > 0:
            assert self._average is not None
            for batch in self.batches(list(self.named_params)):
                for name, offset in self._average.offset(self, batch).items():
                    self.named_params[name].add_(offset, alpha=factor * share)
            self.resync()

    def update(self, estimate: Estimate) -> None:
        """Step, project and average."""
        limit = self._gradient_factor(estimate) * self._step_factor()
        move = self.move(
            [{i: -group["lr"] * limit * c for i, c in estimate.coefficients.items()} for group in self.param_groups]
        )
        if self.grad_at == "md":
            # The step was taken from the shifted weights: theta_md * decay + u, where theta * decay + u is wanted.
            decays = {name: d for (_, names), d in zip(self.groups(), move.decays) for name in names}
            share = 1.0 - average_weight(self.step_count)
            assert self._average is not None
            for batch in self.batches(list(self.named_params)) if share > 0 else ():
                for name, offset in self._average.offset(self, batch).items():
                    self.named_params[name].add_(offset, alpha=-share * decays[name])
        shrink = self._project()
        if self._average is not None:
            anchor = 1.0 - shrink if self.clip == "param_init" else 0.0
            self._average.update(self, split_move(move.shrunk(shrink), anchor))

    def _gradient_factor(self, estimate: Estimate) -> float:
        if self.clip != "grad":
            return 1.0
        assert self.clip_radius is not None
        squared = 0.0
        for batch in self.batches(list(self.named_params)):
            squared += total_norm(self.dense_estimate(batch, estimate)) ** 2
        return min(1.0, self.clip_radius / squared**0.5) if squared > 0 else 1.0

    def _project(self) -> float:
        """Project the weights on the clip's ball; return the factor on their distance from its centre."""
        if self.clip not in ("param_origin", "param_init"):
            return 1.0
        assert self.clip_radius is not None
        from_origin = self.clip == "param_origin"
        squared = 0.0
        for name, tensor in self.named_params.items():
            moved = tensor if from_origin else tensor - self.state[tensor]["initial"]
            squared += total_norm({name: moved}) ** 2
        if squared <= self.clip_radius**2:
            return 1.0
        shrink = self.clip_radius / squared**0.5
        for tensor in self.named_params.values():
            if from_origin:
                tensor.mul_(shrink)
            else:
                tensor.lerp_(self.state[tensor]["initial"], 1.0 - shrink)
        return shrink

    def averaged_weights(self) -> dict[str, Tensor]:
        r"""Return the averaged iterate :math:`\theta^{ag}` by parameter name, in the parameters' dtypes.

        Raises:
            UsageError: If the optimizer was made with ``averaging="none"``.
        """
        if self._average is None:
            raise UsageError("There is no averaged iterate: set averaging to 'fp32', 'int8' or 'journal'.")
        result = {}
        with torch.no_grad():
            for batch in self.batches(list(self.named_params)):
                for name, offset in self._average.offset(self, batch).items():
                    weight = self.named_params[name].detach()
                    result[name] = (weight + offset).to(weight.dtype)
        return result

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged iterate into the model for the length of a ``with`` block, as for evaluation."""
        values = self.averaged_weights()
        self._swap(values)
        try:
            yield
        finally:
            self._swap(values)

    @torch.no_grad()
    def _swap(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self.named_params.items():
            held = tensor.detach().clone()
            tensor.copy_(values[name])
            values[name] = held

    def extra_state(self) -> dict[str, Any]:
        """Return counters, seed and, for ``averaging="journal"``, the journal."""
        return super().extra_state() | {"average": self._average.extra_state() if self._average else None}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned."""
        super().load_extra_state(state)
        if self._average is not None and state["average"] is not None:
            self._average.load_extra_state(state["average"])
