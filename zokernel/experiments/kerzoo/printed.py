r"""KerZOO's Algorithm 1 as printed, and with what the scheme that it copies has besides; to reproduce the paper.

Printed, with :math:`\beta_t = 1 + t/6`: the gradient is estimated at :math:`\theta_t`, a step of constant length is
projected on the ball of radius R, and the weighted average :math:`\theta^{ag}` is returned.  The accelerated scheme of
Lan (2012) evaluates the gradient at :math:`\theta^{md}_t = \theta_t/\beta_t + (1 - 1/\beta_t)\theta^{ag}_t` and
lengthens its steps as :math:`\gamma(t + 1)`; without both there is averaging but no acceleration.  ``grad_at="md"`` and
``step_schedule="accelerated"`` put them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import torch

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.estimators import Estimate, Smoothed
from zokernel.optim import KerZOO
from zokernel.optim.affine_move import AffineMove
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.published.kerzoo import log_facts
from zokernel.optim.registry import register
from zokernel.optim.trained import Trained
from zokernel.optim.updates.averaging.averages import STORAGES, IterateAverage, iterate_average
from zokernel.optim.updates.averaging.iterate_weights import average_weight
from zokernel.optim.updates.base import Update
from zokernel.optim.updates.coefficients import Clip, total_norm
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.perturb import Perturb
from zokernel.perturb.base import Closure
from zokernel.values import check_positive, plain_number

CLIPS = ("none", "param_origin", "param_init", "grad")
STEP_SCHEDULES = ("constant", "accelerated")


@register("kerzoo_printed")
class PrintedKerZOO(KerZOO):
    r"""KerZOO with the options that only reproduce the paper.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate; with ``step_schedule="accelerated"`` the base :math:`\gamma` of steps :math:`\gamma(t+1)`.
        eps: Radius of the perturbation at r = 1, in units of the weights.
        num_perturbations: Directions per step.
        kernel_order: As for :class:`~zokernel.optim.KerZOO`.
        kernel_constant: As for :class:`~zokernel.optim.KerZOO`.
        paper_k5: Use the misprinted constant of the paper's kernel of order 5.
        radius: As for :class:`~zokernel.optim.KerZOO`.
        radius_schedule: As for :class:`~zokernel.optim.KerZOO`.
        shrink_to: As for :class:`~zokernel.optim.KerZOO`.
        total_steps: As for :class:`~zokernel.optim.KerZOO`.
        clip: ``none``; ``param_origin`` (as printed: projects the weights on the ball around zero); ``param_init`` (the
            ball around the initial weights, at the cost of a copy); ``grad`` (limits the estimate's norm).
        clip_radius: Radius of the clip.
        grad_at: ``theta`` (as printed) or ``md`` (needs ``averaging`` ``fp32`` or ``int8`` and fp32 weights).
        step_schedule: ``constant`` (as printed) or ``accelerated``.
        averaging: As for :class:`~zokernel.optim.KerZOO`.
        distribution: As for :class:`~zokernel.optim.KerZOO`.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Raises:
        UsageError: If a setting is out of range or settings do not go together.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = PrintedKerZOO([weight], lr=0.002, averaging="fp32", grad_at="md", step_schedule="accelerated")
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(60)]
        >>> losses[-1] < 1e-2 < losses[0]
        True

    References:
        arXiv:2505.18886, Algorithm 1; Lan (2012), An optimal method for stochastic composite optimization.
    """

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
        **options: Unpack[ZerothOrderOptions],
    ):
        estimator = Smoothed(
            eps,
            num_perturbations,
            plain_number("kernel_order", kernel_order),
            plain_number("kernel_constant", kernel_constant),
            paper_k5,
            radius,
            radius_schedule,
            shrink_to,
            total_steps,
        )
        clip_radius = plain_number("clip_radius", clip_radius)
        _check_settings(clip, clip_radius, grad_at, step_schedule, averaging)
        average = None if averaging == "none" else iterate_average(averaging)
        update = _updates(average, clip, clip_radius, grad_at, step_schedule)
        ZerothOrder.__init__(
            self, params, lr, directions=Dense(distribution), estimator=estimator, update=update, **options
        )
        self.averaging, self.grad_at = averaging, grad_at
        if grad_at == "md" and any(p.dtype not in (torch.float32, torch.float64) for p in self.named_params.values()):
            raise UsageError(
                "grad_at='md' moves the weights by tiny amounts and needs them in fp32: load the model in fp32."
            )
        log_facts(self.facts())

    def effective_lr(self) -> float:
        r"""Return the learning rate of MeZO that moves as far on average: :math:`\eta_t\, E[rK]` at the coming step."""
        lengthens = any(isinstance(part, LengtheningSteps) for part in self.updates)
        factor = self.step_count + 1.0 if lengthens else 1.0
        return self.param_groups[0]["lr"] * self.estimator.gain_at(self.step_count) * factor

    def _ask_tell_obstacle(self) -> str | None:
        shifted = "grad_at='md' takes its losses around another point than the weights"
        return shifted if self.grad_at == "md" else super()._ask_tell_obstacle()

    def _step(self, perturb: Perturb, closure: Closure) -> float:
        """Take a step whose losses are evaluated around the shifted point, if there is one."""
        shifts = [part for part in self.updates if isinstance(part, ShiftedPoint)]
        if not shifts:
            return super()._step(perturb, closure)
        self._refresh_base()
        self._shift(shifts[0], 1.0)
        try:
            return super()._step(perturb, closure)
        except BaseException:
            self._shift(shifts[0], -1.0)
            raise

    def _shift(self, part: ShiftedPoint, factor: float) -> None:
        part.shift(self, factor)
        self.perturb.weights.resync()
        self._note_versions()


def _check_settings(clip: str, clip_radius: float | None, grad_at: str, step_schedule: str, averaging: str) -> None:
    """Refuse settings that do not exist or do not go together."""
    for setting, value, choices in (
        ("clip", clip, CLIPS),
        ("grad_at", grad_at, ("theta", "md")),
        ("step_schedule", step_schedule, STEP_SCHEDULES),
        ("averaging", averaging, ("none", *STORAGES)),
    ):
        if value not in choices:
            raise UsageError(f"There is no {setting} {value!r}: choose one of {', '.join(choices)}.")
    if (clip == "none") != (clip_radius is None):
        raise UsageError("clip and a positive clip_radius go together: give both or neither.")
    if clip_radius is not None:
        check_positive(clip_radius=clip_radius)
    if grad_at == "md" and averaging not in ("fp32", "int8"):
        raise UsageError("grad_at='md' needs the averaged iterate at every step: set averaging to 'fp32' or 'int8'.")


def _updates(
    average: IterateAverage | None, clip: str, clip_radius: float | None, grad_at: str, step_schedule: str
) -> list[Update]:
    """Return the parts of the update in their order."""
    updates: list[Update] = [SGD()]
    if clip == "grad" and clip_radius is not None:
        updates.insert(0, Clip(clip_radius))
    if step_schedule == "accelerated":
        updates.insert(0, LengtheningSteps())
    if grad_at == "md" and average is not None:
        updates.append(ShiftedPoint(average))
    if clip in ("param_origin", "param_init") and clip_radius is not None:
        updates.append(Projection(clip_radius, around_initial=clip == "param_init"))
    if average is not None:
        updates.append(average)
    return updates


class LengtheningSteps(Update):
    r"""Steps of length :math:`\gamma(t + 1)`."""

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the estimate times the number of the step."""
        return replace(estimate, factor=estimate.factor * (trained.step_count + 1.0))


class ShiftedPoint(Update):
    r"""The gradient at the shifted point, the step from the weights themselves.

    .. math:: \theta^{md} = \theta + (1 - 1/\beta_t)(\theta^{ag} - \theta)

    Args:
        average: Keeps :math:`\theta^{ag} - \theta`.
    """

    keeps_to_directions = False

    def __init__(self, average: IterateAverage):
        self.average = average

    def shift(self, trained: Trained, factor: float | dict[str, float]) -> None:
        """Move the weights by a multiple of the way to the shifted point, the same for all or by name."""
        share = 1.0 - average_weight(trained.step_count)
        for batch in trained.batches(list(trained.active)) if share > 0 else ():
            for name, offset in self.average.offset(trained, batch).items():
                alpha = factor[name] if isinstance(factor, dict) else factor
                trained.named_params[name].add_(offset, alpha=alpha * share)

    def after_move(self, trained: Trained, estimate: Estimate, moves: Sequence[AffineMove]) -> Sequence[AffineMove]:
        r"""Take the shift off again: the step made :math:`d\,\theta^{md} + u` instead of :math:`d\,\theta + u`."""
        self.shift(trained, {name: -m.decay for m, (_, names) in zip(moves, trained.moving_groups()) for name in names})
        return moves


class Projection(Update):
    """Projects the weights on a ball after every step.

    Args:
        radius: Of the ball, over all parameters together.
        around_initial: Around the initial weights, of which a copy is kept; around zero otherwise.
    """

    keeps_to_directions = False

    def __init__(self, radius: float, *, around_initial: bool):
        self.radius, self.around_initial = radius, around_initial

    def attach(self, trained: Trained) -> None:
        """Keep the initial weights, if the ball is around them."""
        for tensor in trained.named_params.values() if self.around_initial else ():
            state = trained.state[tensor]
            if "initial" not in state:
                state["initial"] = tensor.detach().clone()

    def after_move(self, trained: Trained, estimate: Estimate, moves: Sequence[AffineMove]) -> Sequence[AffineMove]:
        """Project, and return the moves that end where the weights are now."""
        squared = 0.0
        for name, tensor in trained.active.items():
            offset = tensor - trained.state[tensor]["initial"] if self.around_initial else tensor
            squared += total_norm({name: offset}) ** 2
        shrink = 1.0 if squared <= self.radius**2 else self.radius / squared**0.5
        for tensor in trained.active.values() if shrink < 1.0 else ():
            if self.around_initial:
                tensor.lerp_(trained.state[tensor]["initial"], 1.0 - shrink)
            else:
                tensor.mul_(shrink)
        anchor = 1.0 - shrink if self.around_initial else 0.0
        return [move.shrunk(shrink, anchor) for move in moves]
