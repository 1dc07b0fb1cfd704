r"""Parts of an update: what happens between the gradient estimate and the weights.

An update is a list of parts.  Some change the coefficients of the estimate (:class:`Normalized`,
:class:`PolyakBound`, :class:`Clip`, :class:`ClipSlopes`, :class:`SignOfProjections`,
:class:`~zokernel.optim.curvature_weights.CurvatureWeights`).  One, the rule, turns the estimate into a step
(:class:`SGD`, :class:`Sign`, :class:`~zokernel.optim.adam_rule.Adam`).  Others look at what has moved
(:class:`~zokernel.optim.averaging.averages.IterateAverage`).

With coefficients only, the step stays :math:`\theta \leftarrow \theta - \eta \sum_p c_p z_p` and is made in the sweep
that restores the weights.  Rules that treat every coordinate on its own (momentum, Adam, the sign of the estimate) take
the estimate as tensors, a few parameters at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from zokernel.directions.terms import Factors
from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.optim.affine_move import AffineMove
from zokernel.optim.trained import Trained

Step = Mapping[str, Tensor | Factors]
"""What a rule adds to each parameter, by name: a tensor, or the factors of a matrix."""


class Update:
    """One part of an update.  Every hook does nothing by default.

    Attributes:
        normalizes: Whether the first step's length is unknown before its losses are.
        keeps_to_directions: Whether the part changes the weights by nothing but multiples of directions.
        trained: The optimizer that the part serves; it serves one only, since it may keep state.
    """

    normalizes: ClassVar[bool] = False
    keeps_to_directions: ClassVar[bool] = True
    trained: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def attach(self, trained: Trained) -> None:
        """Prepare state; called once, when the optimizer has its parameters."""

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the estimate with other coefficients, or with another factor on them."""
        return estimate

    def after_move(self, trained: Trained, estimate: Estimate, moves: Sequence[AffineMove]) -> Sequence[AffineMove]:
        """Take note of what the step did to the weights, or change them further.

        Args:
            trained: The optimizer's parameters.
            estimate: The estimate that was followed.
            moves: What was done so far, one per parameter group.

        Returns:
            What has been done by now, for the parts that follow.
        """
        return moves

    def state_dict(self) -> dict[str, Any]:
        """Return the scalars that must be saved; tensors live in the optimizer's own state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""


class Rule(Update):
    """The part that turns the estimate into a step.

    Attributes:
        dense_where: Setting of a parameter group that makes its step more than scalars times directions when it is
            above zero; nothing if every group's step is.
    """

    dense_where: ClassVar[str | None] = None

    def group_defaults(self) -> dict[str, Any]:
        """Return settings that every parameter group may have its own value of."""
        return {}

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, float | dict[str, float]]:
        """Return the steps of some parameters as tensors, and what they are to be divided by: all, or by name."""
        raise NotImplementedError

    def effective_lr(self, group: Mapping[str, Any], gain: float) -> float:
        """Return the learning rate at which plain SGD on the exact gradient moves as far on average.

        Args:
            group: A parameter group.
            gain: Factor of the estimate on the gradient.
        """
        return group["lr"]


@dataclass
class SGD(Rule):
    r"""A plain step, or one with heavy-ball momentum.

    .. math:: m \leftarrow \beta m + \hat g, \qquad \theta \leftarrow \theta - \eta m

    Args:
        momentum: :math:`\beta`, in [0, 1).  When not zero, one fp32 copy of the parameters is kept.

    References:
        Polyak (1964), Some methods of speeding up the convergence of iteration methods.
    """

    dense_where = "momentum"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum must be in [0, 1), not {self.momentum}.")

    def group_defaults(self) -> dict[str, Any]:
        """Return the momentum."""
        return {"momentum": self.momentum}

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, float]:
        """Advance the momentum buffers and return them."""
        momenta = {name: group["momentum"] for group, members in trained.groups() for name in members}
        buffers = trained.buffers("momentum_buffer", names)
        trained.add_estimate(buffers, estimate, decay={name: momenta[name] for name in names})
        return buffers, 1.0

    def effective_lr(self, group: Mapping[str, Any], gain: float) -> float:
        r"""Return :math:`\eta\, C / (1 - \beta)`."""
        return group["lr"] * gain / (1.0 - group["momentum"])


@dataclass
class Sign(Rule):
    r"""Move every weight by the learning rate: :math:`\theta \leftarrow \theta - \eta\, \mathrm{sign}(\hat g)`.

    References:
        Liu et al. (2019), signSGD via Zeroth-Order Oracle, ICLR.
    """

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, float]:
        """Return the sign of the estimate."""
        gradients = trained.dense_estimate(names, estimate)
        return {name: gradient.sign_() for name, gradient in gradients.items()}, 1.0


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
        check_beta(self.beta)
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
        check_beta(self.beta)
        if not self.share > 0:
            raise UsageError(f"polyak_share must be above 0, not {self.share}.")
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
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise UsageError(f"The clip radius must be positive, not {self.radius}.")

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
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise UsageError(f"The largest slope must be positive, not {self.bound}.")

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the estimate with slopes within the bound; coefficients are slopes over P."""
        limit = self.bound / max(1, len(estimate.coefficients))
        clipped = {index: max(-limit, min(limit, c)) for index, c in estimate.coefficients.items()}
        return replace(estimate, coefficients=clipped)


def check_beta(beta: float) -> None:
    """Refuse a weight of the past outside [0, 1).

    Raises:
        UsageError: If it is.
    """
    if not 0 <= beta < 1:
        raise UsageError(f"beta must be in [0, 1), not {beta}.")


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
