r"""The stochastic process itself: thousands of runs at once, a fresh direction in every run at every step.

Each step applies :math:`\theta^+ = \theta - \tfrac{\eta}{P} \sum_p M_p \nabla L(\theta)` with :math:`M = z z^T`,
:math:`|z|^2 z z^T` or :math:`\zeta\zeta^T z z^T`.  For the squared loss of a linear model the central difference along
z is exactly :math:`z^T \nabla L`, so this is zeroth-order training, not a model of it.

For distributions that rotations leave alone (Gaussian, sphere) only the coordinates inside the span of the features are
drawn, and the rest enters through its norm (a chi-square): the same distribution at the cost of the rank instead of d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.dynamics.checks import Steps, as_steps, as_vector, check_learning_rate
from zokernel.errors import UsageError
from zokernel.private_apis import standard_gamma
from zokernel.theory.checks import check_num_perturbations
from zokernel.theory.nzk_moments import check_coupling

# Shape suffixes: R runs, P directions per step, D coordinates, N predictions, T recorded steps.


@dataclass(frozen=True)
class Simulation:
    """Recorded steps of many independent runs.

    Attributes:
        steps: Recorded step numbers, (T,).
        losses: Loss of every run, (T, runs).
        mean: Mean prediction over runs, (T, n), and ``mean_error`` its standard error.
        mean_error: Standard error of ``mean``.
        square: Mean squared residual over runs, (T, n), and ``square_error`` its standard error.
        square_error: Standard error of ``square``.
    """

    steps: Tensor
    losses: Tensor
    mean: Tensor
    mean_error: Tensor
    square: Tensor
    square_error: Tensor

    def loss_band(self, low: float = 0.05, high: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ``low`` quantile, median and ``high`` quantile of the loss over runs, each (T,)."""
        probabilities = torch.tensor([low, 0.5, high], dtype=self.losses.dtype)
        low_T, median_T, high_T = torch.quantile(self.losses, probabilities, dim=1)
        return low_T, median_T, high_T


def simulate(
    features: Tensor,
    y: Tensor,
    f0: Tensor,
    lr: float,
    steps: Steps,
    *,
    num_perturbations: int = 1,
    distribution: str | Distribution = "gaussian",
    coupling: str = "zo_sgd",
    runs: int = 1000,
    seed: int = 0,
    zeta_distribution: str | Distribution | None = None,
    dim: int | None = None,
) -> Simulation:
    """Run zeroth-order training of a linear(ised) model many times.

    Args:
        features: Features X, (n, d).
        y: Targets, (n,).
        f0: Initial predictions, (n,).
        lr: Learning rate.
        steps: A number T to record 0, 1, ..., T, or the step numbers to record.
        num_perturbations: Directions P averaged per step.
        distribution: Distribution of the directions, any that can be sampled (a mean and a covariance included);
            Gaussian by default, the setting of the NZK paper.
        coupling: ``zo_sgd``, ``shared`` or ``independent``.
        runs: Number of independent runs.
        seed: Seed of the draws.
        zeta_distribution: Distribution of the second vector (``independent`` only).
        dim: Number of parameters when ``features`` are coordinates in a basis of their span only, as a kernel's
            eigenvectors give (distributions that rotations leave alone).

    Returns:
        Losses of every run and moments of every prediction at the recorded steps.

    Raises:
        UsageError: If shapes do not match or a setting makes no sense.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> result = simulate(x, torch.ones(2), torch.zeros(2), lr=0.5, steps=[0, 50], runs=100)
        >>> bool(result.losses[1].mean() < result.losses[0].mean())
        True
    """
    check_learning_rate(lr)
    check_coupling(coupling)
    count = check_num_perturbations(num_perturbations)
    if runs < 2:
        raise UsageError(f"Standard errors need at least 2 runs, not {runs}.")
    target, start = as_vector(y, "targets"), as_vector(f0, "initial predictions")
    x = features.detach().to(target)
    if x.ndim != 2 or not len(x) == len(target) == len(start) or not x.isfinite().all():
        raise UsageError(f"Features must be finite of shape ({len(target)}, d), not {tuple(x.shape)}.")
    distribution = Distribution.parse(distribution)
    zeta = None if coupling != "independent" else Distribution.parse(zeta_distribution or distribution)
    sampler = _Sampler(x, distribution, zeta, coupling, seed, x.shape[1] if dim is None else dim)
    requested = as_steps(range(steps + 1) if isinstance(steps, int) else steps, target)
    recorded = sorted({int(step) for step in requested})
    x = sampler.basis
    n, d = x.shape
    offset_D = (start - target) @ x / n
    hessian_DD = x.T @ x / n
    change_RD = x.new_zeros(runs, d)
    records, previous = [], 0
    for step in recorded:
        for _ in range(step - previous):
            gradient_RD = change_RD @ hessian_DD + offset_D
            change_RD -= (lr / count) * sampler.apply(gradient_RD, count)
        previous = step
        residual_RN = (start - target) + change_RD @ x.T
        records.append(_summary(residual_RN, target))
    losses, means, mean_errors, squares, square_errors = (torch.stack(column) for column in zip(*records, strict=True))
    return Simulation(torch.tensor(recorded), losses, means, mean_errors, squares, square_errors)


class _Sampler:
    """Draws directions in the coordinates the process needs and applies the step matrix to gradients."""

    def __init__(
        self, x: Tensor, distribution: Distribution, zeta: Distribution | None, coupling: str, seed: int, dim: int
    ):
        self.distribution, self.zeta, self.coupling = distribution, zeta, coupling
        self.generator = torch.Generator(x.device).manual_seed(seed)
        self.dim, self.unseen = dim, 0
        self.basis = x
        if distribution.is_rotation_invariant and (zeta is None or zeta.is_rotation_invariant):
            left, singular, _ = torch.linalg.svd(x, full_matrices=False)
            keep = singular > len(singular) * torch.finfo(x.dtype).eps * singular.max()
            self.basis = left[:, keep] * singular[keep]
            self.unseen = dim - self.basis.shape[1]
        if self.unseen < 0 or (self.unseen == 0 and dim != self.basis.shape[1]):
            raise UsageError(
                f"Features of {x.shape[1]} coordinates cannot stand for {dim} parameters of {distribution.name} draws."
            )

    def apply(self, gradient_RD: Tensor, count: int) -> Tensor:
        """Return the sum over ``count`` directions of M times each run's gradient."""
        z_RPD, unseen_RP = self._draw(self.distribution, gradient_RD, count)
        slope_RP = torch.einsum("rpd,rd->rp", z_RPD, gradient_RD)
        if self.zeta is None:
            if self.coupling == "shared":
                slope_RP = slope_RP * (z_RPD.square().sum(-1) + unseen_RP)
            return torch.einsum("rp,rpd->rd", slope_RP, z_RPD)
        zeta_RPD, zeta_unseen_RP = self._draw(self.zeta, gradient_RD, count)
        inner_RP = (z_RPD * zeta_RPD).sum(-1)
        if self.unseen == 1:
            signs = torch.empty_like(inner_RP).bernoulli_(generator=self.generator) * 2 - 1
            inner_RP = inner_RP + (unseen_RP * zeta_unseen_RP).sqrt() * signs
        elif self.unseen > 1:  # the cosine between two independent directions of a sphere in `unseen` dimensions
            pair = torch.empty(2, *inner_RP.shape, dtype=inner_RP.dtype, device=inner_RP.device)
            normal = pair[0].normal_(generator=self.generator)
            rest = 2 * standard_gamma(torch.full_like(pair[1], (self.unseen - 1) / 2), self.generator)
            cosine = normal / (normal.square() + rest).sqrt()
            inner_RP = inner_RP + (unseen_RP * zeta_unseen_RP).sqrt() * cosine
        return torch.einsum("rp,rpd->rd", slope_RP * inner_RP, zeta_RPD)

    def _draw(self, distribution: Distribution, like: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return directions in the basis (R, P, r) and the squared norm of what lies outside it (R, P)."""
        shape, rank = (like.shape[0], count), self.basis.shape[1]
        if not self.unseen:
            draws = distribution.sample(shape, rank, self.generator, dtype=like.dtype)
            return draws, draws.new_zeros(shape)
        draws = torch.empty(*shape, rank, dtype=like.dtype, device=like.device).normal_(generator=self.generator)
        half = torch.full(shape, self.unseen / 2, dtype=like.dtype, device=like.device)
        unseen = 2 * standard_gamma(half, self.generator)
        scale = torch.full_like(unseen, distribution.scale)
        if distribution.is_sphere:
            scale = scale * math.sqrt(self.dim) / (draws.square().sum(-1) + unseen).sqrt()
        return draws * scale[..., None], unseen * scale.square()


def _summary(residual_RN: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    runs, n = residual_RN.shape
    square_RN = residual_RN.square()
    root = math.sqrt(runs)
    return (
        square_RN.sum(1) / (2 * n),
        target + residual_RN.mean(0),
        residual_RN.std(0) / root,
        square_RN.mean(0),
        square_RN.std(0) / root,
    )


def record_steps(total: int, count: int = 200) -> list[int]:
    """Return at most ``count`` step numbers from 0 to ``total``, dense at the start and even in the logarithm after.

    Args:
        total: Last step.
        count: About how many.

    Returns:
        Sorted step numbers, 0 and ``total`` among them.

    Example:
        >>> record_steps(1000, 7)
        [0, 1, 3, 10, 32, 100, 316, 1000]
    """
    if total < 1:
        return [0]
    points: Iterable[float] = (10 ** (math.log10(total) * k / max(1, count - 1)) for k in range(count))
    return sorted({0, total, *(round(point) for point in points)})
