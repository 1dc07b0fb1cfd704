"""Forward differences: all directions of a step share one loss at the unperturbed weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.estimators.one_sided import OneSided
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer


@register("forward_difference")
class ForwardDifference(ZerothOrderOptimizer):
    r"""Zeroth-order SGD from one-sided differences: P + 1 forward passes for P directions.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P
        \frac{L(\theta + \epsilon z_p) - L(\theta)}{\epsilon}\, z_p

    MeZO needs 2P forwards for as many directions.  A direction's slope is off by
    :math:`\frac{\epsilon}{2} z_p^T H z_p`, which adds noise but no bias under a symmetric law:
    :math:`E[(z^T H z)\, z] = 0`.

    With ``normalize`` every slope is divided by the root of a running mean of squared slopes,

    .. math:: s_t^2 = \frac{1 - \beta}{1 - \beta^t} \sum_{k \le t} \beta^{t-k}\,
        \frac1P \sum_p \Big( \frac{L(\theta_k + \epsilon z_p) - L(\theta_k)}{\epsilon} \Big)^2

    so that a step has the length :math:`\eta \sqrt{d/P}` on average, whatever the scale of the loss, and one learning
    rate suits several tasks.  FZOO divides by the spread of one step's losses, which takes eight of them or so; here
    two are enough.  Where the loss is low, such a step can be longer than the way to its minimum.  ``polyak_share`` c
    bounds it by a share of Polyak's step (1969) for a loss whose least value is zero, from a running mean of the losses
    at the centre:

    .. math:: \eta_t = \min\big(\eta / s_t,\; c\, \bar L_t / s_t^2\big), \qquad E[s_t^2] \approx \|\nabla L\|^2,

    both of which a schedule lowers.  Along P directions the step that descends fastest is a share
    :math:`P / (P + 1 + r)` of gradient descent's, with r an effective rank of the curvature.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs one forward pass, and one more is shared by all.
        distribution: Law of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        normalize: Divide slopes by their running root mean square.
        polyak_share: With ``normalize``, the longest step as a share of Polyak's; infinite for no bound.
        beta: Weight of the past in the running means, in [0, 1).
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Raises:
        UsageError: If a setting is out of range, or a loss is negative although Polyak's step bounds the step.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ForwardDifference([weight], lr=0.05, num_perturbations=4)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-2 < losses[0]
        True
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 2,
        distribution: str = "rademacher",
        seed: int = 0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        normalize: bool = False,
        polyak_share: float = math.inf,
        beta: float = 0.9,
        restore: str = "fold",
    ):
        if not 0 <= beta < 1:
            raise UsageError(f"beta must be in [0, 1), not {beta}.")
        if not polyak_share > 0:
            raise UsageError(f"polyak_share must be above 0, not {polyak_share}.")
        self.normalize, self.polyak_share, self.beta = normalize, polyak_share, beta
        # Sums over past steps of beta^age (1 - beta) times their mean squared slope, and their loss at the centre.
        self._weighted_squares = self._weighted_losses = 0.0
        super().__init__(
            params,
            estimator=OneSided(eps, num_perturbations),
            directions=Dense(distribution),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            seed=seed,
            restore=restore,
        )

    def step_scale(self, steps: int) -> float:
        """Return what the learning rate is multiplied by, from running means over so many steps; NaN before any."""
        if not self.normalize:
            return 1.0
        if steps == 0:
            return math.nan
        if not self._weighted_squares:
            return 0.0  # equal losses at every step so far say nothing about the gradient, so the weights stay
        scale = math.sqrt((1 - self.beta**steps) / self._weighted_squares)
        lr = self.defaults["lr"]
        if lr == 0 or math.isinf(self.polyak_share):
            return scale
        return min(scale, self.polyak_share * self._weighted_losses / self._weighted_squares / lr)

    def effective_lr(self) -> float:
        """Return the learning rate; normalised, that of a method that is not and moves as far as the last step did."""
        return super().effective_lr() * self.step_scale(self.step_count)

    def update(self, estimate: Estimate) -> None:
        """Move the weights along the estimate, normalised if asked for."""
        if self.normalize:
            loss, count = estimate.losses[0], len(estimate.coefficients)
            if loss < 0 and math.isfinite(self.polyak_share):
                self._restore.restore()
                raise UsageError(
                    f"The loss is {loss:.3g}, and polyak_share is for losses whose least value is zero: leave it out."
                )
            # Coefficients are slopes over P.
            square = count * sum(c * c for c in estimate.coefficients.values())
            self._weighted_squares = self.beta * self._weighted_squares + (1 - self.beta) * square
            self._weighted_losses = self.beta * self._weighted_losses + (1 - self.beta) * loss
            scale = self.step_scale(self.step_count + 1)
            estimate = replace(estimate, coefficients={i: c * scale for i, c in estimate.coefficients.items()})
        super().update(estimate)

    def extra_state(self) -> dict[str, Any]:
        """Return what must be saved beside torch's own state, the running means included."""
        means = {"weighted_squares": self._weighted_squares, "weighted_losses": self._weighted_losses}
        return super().extra_state() | means

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned."""
        super().load_extra_state(state)
        self._weighted_squares, self._weighted_losses = state["weighted_squares"], state["weighted_losses"]
