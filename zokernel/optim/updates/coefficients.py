"""Parts that change the coefficients of the estimate: normalising, bounding, clipping and signs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.optim.trained import Trained
from zokernel.optim.updates.base import Update
from zokernel.values import check_positive, check_shares, is_number, plain_fields


@dataclass
class SignOfProjections(Update):
    r"""Replace every coefficient by its sign over P, so that the step stays a few scalars.

    References:
        Zhang et al. (2024), Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning,
        arXiv:2402.11592, whose benchmark calls this ZO-SGD-Sign.
    """

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the signs."""
        count = len(estimate.coefficients)
        signs = {i: math.copysign(1.0, c) / count if c else 0.0 for i, c in estimate.coefficients.items()}
        return replace(estimate, coefficients=signs, factor=1.0)


@dataclass
class Normalized(Update):
    r"""Divide the slopes by the root of a running mean of their squares.

    .. math:: s_t^2 = \frac{1 - \beta}{1 - \beta^t} \sum_{k \le t} \beta^{t-k}\, \frac1P \sum_p (P c_{k,p})^2

    A step then has the length :math:`\eta \sqrt{d/P}` on average, whatever the scale of the loss, so that one learning
    rate suits several tasks.

    Args:
        beta: Weight of the past in the running mean, in [0, 1).
    """

    normalizes = True
    beta: float = 0.9

    def __post_init__(self) -> None:
        plain_fields(self)
        check_shares(beta=self.beta)
        self._weighted_squares = 0.0  # sum over past steps of beta^age (1 - beta) times their mean squared slope

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the estimate with the factor :math:`1/s_t`."""
        square = mean_squared_slope(estimate)
        self._weighted_squares = self.beta * self._weighted_squares + (1 - self.beta) * square
        if not self._weighted_squares:
            return replace(estimate, factor=0.0)  # equal losses so far say nothing about the gradient
        steps = trained.step_count + 1
        return replace(estimate, factor=math.sqrt((1 - self.beta**steps) / self._weighted_squares))

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean."""
        return {"weighted_squares": self._weighted_squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the running mean."""
        self._weighted_squares = state["weighted_squares"]


@dataclass
class PolyakBound(Update):
    r"""Bound the step by a share of Polyak's, for a loss whose least value is zero.

    .. math:: \eta_t = \min\big(\eta_t,\; c\, \bar L_t / s_t^2\big), \qquad E[s_t^2] \approx \|\nabla L\|^2

    The means run over past steps.  A schedule lowers both sides.  With parameter groups of other rates the largest rate
    counts, so that no group steps further.

    Args:
        share: c, the longest step as a share of Polyak's.  Along P directions the step that descends fastest is a
            share :math:`P / (P + 1 + r)` of gradient descent's, with r an effective rank of the curvature.
        beta: Weight of the past in the running means, in [0, 1).

    References:
        Polyak (1969), Minimization of unsmooth functionals.
    """

    share: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        plain_fields(self)
        check_shares(beta=self.beta)
        if self.share != math.inf:
            check_positive(polyak_share=self.share)
        self._weighted_squares = self._weighted_losses = 0.0
        self._largest_lr = 0.0

    def attach(self, trained: Trained) -> None:
        """Note the largest rate that a schedule starts from."""
        self._largest_lr = max(self._largest_lr, *(group["lr"] for group in trained.param_groups))

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the estimate with a factor that is no longer than the bound."""
        loss = estimate.loss if estimate.centre is None else estimate.centre
        if loss < 0:
            raise UsageError(
                f"The loss is {loss:.3g}, and Polyak's bound is for losses whose least value is zero: leave it out."
            )
        square = mean_squared_slope(estimate)
        self._weighted_squares = self.beta * self._weighted_squares + (1 - self.beta) * square
        self._weighted_losses = self.beta * self._weighted_losses + (1 - self.beta) * loss
        if not self._weighted_squares or not self._largest_lr:
            return estimate
        bound = self.share * self._weighted_losses / self._weighted_squares / self._largest_lr
        return replace(estimate, factor=min(estimate.factor, bound))

    def state_dict(self) -> dict[str, Any]:
        """Return the running means and the rate that the schedule started from."""
        means = {"weighted_squares": self._weighted_squares, "weighted_losses": self._weighted_losses}
        return means | {"largest_lr": self._largest_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._weighted_squares, self._weighted_losses = state["weighted_squares"], state["weighted_losses"]
        self._largest_lr = state["largest_lr"]


@dataclass
class Clip(Update):
    r"""Limit the norm of the estimate: :math:`\hat g \leftarrow \hat g \min(1, R / \|\hat g\|)`.

    Args:
        radius: R, the largest norm.
    """

    radius: float

    def __post_init__(self) -> None:
        plain_fields(self)
        check_positive(clip_radius=self.radius)

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the estimate with a factor that keeps its norm within the radius."""
        squared = 0.0
        for batch in trained.batches(list(trained.active)):
            squared += total_norm(trained.dense_estimate(batch, estimate)) ** 2
        limit = min(1.0, self.radius / squared**0.5) if squared > 0 else 1.0
        return replace(estimate, factor=estimate.factor * limit)


@dataclass
class ClipSlopes(Update):
    r"""Limit every slope, so that no step is long because one loss was odd.

    .. math:: d_p \leftarrow \max(-C, \min(C, d_p))

    Args:
        bound: C, the largest slope that counts in full.

    References:
        Shang et al. (2025), Fine-tuning Quantized Neural Networks with Zeroth-order Optimization, arXiv:2505.13430.
    """

    bound: float

    def __post_init__(self) -> None:
        plain_fields(self)
        if not (is_number(self.bound) and self.bound > 0):
            raise UsageError(f"The largest slope must be positive, not {self.bound!r}.")

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the estimate with slopes within the bound; coefficients are slopes over P."""
        limit = self.bound / max(1, len(estimate.coefficients))
        clipped = {index: max(-limit, min(limit, c)) for index, c in estimate.coefficients.items()}
        return replace(estimate, coefficients=clipped)


def mean_squared_slope(estimate: Estimate) -> float:
    """Return the mean of the squared slopes; coefficients are slopes over P."""
    return len(estimate.coefficients) * sum(c * c for c in estimate.coefficients.values())


def total_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm over all tensors, accumulated in fp32 or wider."""
    return math.sqrt(
        math.fsum(
            float(torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))) ** 2
            for t in tensors.values()
        )
    )
