r"""Zeroth-order SGD in parameter space, from losses alone: a baseline in place of "ZO-parametric".

The public code of Zhang et al. (2026), arXiv:2603.21169, does something else (docs/theory.md, "B.2 Errata").  In the
notebooks ``theta (N, 1) + eps * z (1, N)``
broadcasts to (N, N), so every column moves along the all-ones vector: they minimise over one line
(:func:`all_ones_line_minimum`).  In the script the difference of losses has its sign reversed, so it ascends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.dynamics.checks import Steps, as_steps, check_learning_rate
from zokernel.errors import RunError, UsageError
from zokernel.theory.checks import check_num_perturbations

# Shape suffixes: R runs, P directions per step, D parameters, T recorded steps.

ESTIMATORS = ("mean", "best_of")


@dataclass(frozen=True)
class ParametricRun:
    """Losses of independent zeroth-order SGD runs.

    Attributes:
        steps: Recorded step numbers, (T,).
        queries: Loss evaluations spent by then, (T,).
        losses: Loss of every run, (T, runs).
        theta: Final weights, (runs, d).
    """

    steps: Tensor
    queries: Tensor
    losses: Tensor
    theta: Tensor


def zo_sgd_run(
    loss: Callable[[Tensor], Tensor],
    theta: Tensor,
    lr: float,
    steps: Steps,
    *,
    num_perturbations: int = 1,
    distribution: str | Distribution = "gaussian",
    estimator: str = "mean",
    eps: float = 1e-3,
    runs: int = 1,
    seed: int = 0,
) -> ParametricRun:
    r"""Train with central differences of the loss: :math:`\theta^+ = \theta - \eta \hat g`.

    ``mean`` averages over P directions
    :math:`\hat g = \frac1P \sum_p \frac{L(\theta + \epsilon z_p) - L(\theta - \epsilon z_p)}{2\epsilon} z_p`;
    ``best_of`` keeps the one of P directions with the steepest slope, as the public code means to, which is biased: its
    step is longer than a gradient step and :math:`E[z z^T]` is not the identity.

    Args:
        loss: Maps weights (B, d) to losses (B,).
        theta: Initial weights, (d,).
        lr: Learning rate.
        steps: A number T to record 0, 1, ..., T, or the step numbers to record.
        num_perturbations: Directions P per step, each costing two losses.
        distribution: Distribution of the directions; Gaussian by default, the setting of the NZK paper.
        estimator: ``mean`` or ``best_of``.
        eps: Length of the finite difference (any value is exact for a quadratic loss).
        runs: Independent runs, computed together.
        seed: Seed of the draws.

    Returns:
        Losses at the recorded steps.

    Raises:
        UsageError: If a setting makes no sense.
        RunError: If a loss is not a number (lower the learning rate).

    Example:
        >>> run = zo_sgd_run(lambda theta: theta.square().sum(1) / 2, torch.ones(4), lr=0.1, steps=[0, 200])
        >>> bool(run.losses[1] < 1e-3)
        True
    """
    check_learning_rate(lr)
    count = check_num_perturbations(num_perturbations)
    if estimator not in ESTIMATORS:
        raise UsageError(f"There is no estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}.")
    if not eps > 0 or runs < 1:
        raise UsageError("eps must be positive and there must be at least one run.")
    distribution = Distribution.parse(distribution)
    requested = as_steps(range(steps + 1) if isinstance(steps, int) else steps, theta.double())
    recorded = sorted({int(step) for step in requested})
    generator = torch.Generator(theta.device).manual_seed(seed)
    dim = theta.numel()
    theta_RD = theta.detach().reshape(1, dim).repeat(runs, 1)
    losses, previous = [], 0
    for step in recorded:
        for _ in range(step - previous):
            z_RPD = distribution.sample((runs, count), dim, generator, dtype=theta.dtype)
            shifted = torch.stack([theta_RD[:, None] + eps * z_RPD, theta_RD[:, None] - eps * z_RPD])
            up_RP, down_RP = loss(shifted.reshape(-1, dim)).reshape(2, runs, count)
            slope_RP = (up_RP - down_RP) / (2 * eps)
            if estimator == "best_of":
                best_R = slope_RP.abs().argmax(1)
                steepest = torch.arange(runs, device=theta.device), best_R
                theta_RD = theta_RD - lr * slope_RP[steepest][:, None] * z_RPD[steepest]
            else:
                theta_RD = theta_RD - (lr / count) * torch.einsum("rp,rpd->rd", slope_RP, z_RPD)
        previous = step
        value = loss(theta_RD)
        if value.isnan().any():
            raise RunError(f"The loss is not a number at step {step}: lower the learning rate ({lr:g}).")
        losses.append(value)
    numbers = torch.tensor(recorded)
    return ParametricRun(numbers, 2 * count * numbers, torch.stack(losses), theta_RD)


def squared_loss(features: Tensor, y: Tensor, theta0: Tensor, f0: Tensor) -> Callable[[Tensor], Tensor]:
    r"""Return :math:`\theta \mapsto |f_0 + X(\theta - \theta_0) - y|^2 / 2n` for weights (B, d).

    Args:
        features: Features X, (n, d).
        y: Targets, (n,).
        theta0: Weights around which the model is linear, (d,).
        f0: Predictions there, (n,).

    Returns:
        The loss function.
    """
    constant = f0 - features @ theta0 - y

    def loss(theta_BD: Tensor) -> Tensor:
        return (constant + theta_BD @ features.T).square().mean(1) / 2

    return loss


def all_ones_line_minimum(features: Tensor, y: Tensor, f0: Tensor) -> float:
    r"""Return :math:`\min_s |f_0 + s X \mathbf 1 - y|^2 / 2n`: the best that the notebooks' baseline can ever reach.

    Args:
        features: Features X, (n, d).
        y: Targets, (n,).
        f0: Initial predictions, (n,).

    Returns:
        The loss.
    """
    line, residual = features.sum(1), f0 - y
    along = line @ residual / line.square().sum()
    return float((residual - along * line).square().mean() / 2)
