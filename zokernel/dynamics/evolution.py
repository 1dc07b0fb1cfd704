r"""How predictions evolve under gradient descent and zeroth-order training of a linear(ised) model, in closed form.

With the loss :math:`|f - y|^2 / 2n`, residual :math:`e = f - y`, kernel :math:`K = X X^T = n U L U^T` and one step
:math:`e^+ = e - (\eta/n) X M X^T e` (M as in :mod:`zokernel.theory.nzk_moments`), in the eigenbasis
:math:`\hat e = U^T e`:

* mean: :math:`E \hat e_i(t) = (1 - \eta c l_i)^t \hat e_i(0)`, exact at any t;
* second moment: :math:`C = E \hat e \hat e^T` has off-diagonal entries that evolve alone,
  :math:`C_{ij}^+ = [1 - \eta c (l_i + l_j) + \eta^2 \kappa l_i l_j] C_{ij}`, and a diagonal that evolves by the
  symmetric matrix :math:`T = diag((1 - \eta c l)^2 + \eta^2 (\kappa - c^2) l^2) + \eta^2 \tfrac{trace}{P} l l^T`, so
  one more eigendecomposition gives the expected loss at any t (docs/theory.md, "Second moment");
* directions of zero eigenvalue never move: their part of the loss is a floor, and adds no noise.

Gradient descent is the special case without noise; an expected kernel is gradient descent with a factor c.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from zokernel.dynamics.checks import Steps, as_steps, as_vector, check_learning_rate
from zokernel.dynamics.recursion import dense_path
from zokernel.errors import UsageError
from zokernel.theory.checks import as_kernel
from zokernel.theory.nzk_moments import ProcessMoments
from zokernel.theory.stability import clean_eigenvalues, limit_from_moments, noise_coefficients

# Shape suffixes: T requested steps, N training predictions, M test predictions, R nonzero eigenvalues, D parameters.


class Evolution:
    r"""The mean and the spread of a linear(ised) model's predictions after any number of steps.

    Args:
        f0: Initial predictions, (n,).
        y: Targets, (n,).
        kernel: Training kernel :math:`K = X X^T`, (n, n): symmetric, positive semi-definite.
        lr: Learning rate :math:`\eta`.
        moments: Moments of the random step; gradient descent when not given.
        num_perturbations: Directions P averaged per step.
        features: Features X, (n, d); needed for the second moment of distributions with a diagonal term (Rademacher,
            ...).
        num_examples: The n in the loss; the number of predictions when not given (models of several outputs have
            more predictions than examples).

    Raises:
        UsageError: If shapes do not match, values are not finite, the kernel is not one, or lr is not positive.

    Example:
        >>> kernel = torch.eye(2, dtype=torch.float64)
        >>> evolution = Evolution(torch.zeros(2), torch.ones(2), kernel, lr=1.0)
        >>> [round(loss, 4) for loss in evolution.expected_loss([0, 1, 2]).tolist()]
        [0.5, 0.125, 0.0312]
    """

    def __init__(
        self,
        f0: Tensor,
        y: Tensor,
        kernel: Tensor,
        lr: float,
        *,
        moments: ProcessMoments | None = None,
        num_perturbations: int = 1,
        features: Tensor | None = None,
        num_examples: int | None = None,
    ):
        self._set_step(lr, moments or ProcessMoments.deterministic(), num_perturbations)
        self.f0, self.y = as_vector(f0, "initial predictions"), as_vector(y, "targets")
        matrix = as_kernel(kernel, len(self.f0))
        if len(self.y) != len(self.f0):
            raise UsageError(f"There are {len(self.f0)} predictions but {len(self.y)} targets.")
        self.n = num_examples or len(self.f0)
        values, vectors = torch.linalg.eigh(matrix / self.n)
        values = torch.as_tensor(clean_eigenvalues(values if kernel.dtype == torch.float64 else values.float()))
        keep = values > 0
        self.eigenvalues, self.vectors = values[keep].to(matrix), vectors[:, keep]
        residual = self.f0 - self.y
        self.residual_R = self.vectors.T @ residual
        self.fixed_N = residual - self.vectors @ self.residual_R
        self._scaled_features: np.ndarray | None = None
        if features is not None:
            rows = features.detach().to(matrix)
            if rows.shape[0] != len(self.f0):
                raise UsageError(f"There are {len(self.f0)} predictions but features of {rows.shape[0]}.")
            self._scaled_features = (self.vectors.T @ rows).cpu().numpy() / math.sqrt(self.n)

    def at(
        self, lr: float, *, moments: ProcessMoments | None = None, num_perturbations: int | None = None
    ) -> Evolution:
        """Return the same model and data under another learning rate, distribution or number of directions.

        The kernel's eigendecomposition is shared, so sweeps are cheap.

        Args:
            lr: Learning rate.
            moments: Moments of the random step; these when not given.
            num_perturbations: Directions averaged per step; as many as here when not given.

        Returns:
            Another evolution.
        """
        other = copy.copy(self)
        count = self.num_perturbations if num_perturbations is None else num_perturbations
        other._set_step(lr, moments or self.moments, count)
        return other

    def _set_step(self, lr: float, moments: ProcessMoments, num_perturbations: int) -> None:
        self.lr, self.moments, self.num_perturbations = check_learning_rate(lr), moments, num_perturbations
        self._kappa, self._trace, self._diagonal = noise_coefficients(moments, num_perturbations)
        self._modes: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """Number of directions of function space that training can move."""
        return len(self.eigenvalues)

    @property
    def floor(self) -> float:
        """The part of the loss that no number of steps removes: targets outside the range of the kernel."""
        return float(self.fixed_N.square().sum() / (2 * self.n))

    @property
    def stability_limit(self) -> float:
        """Largest learning rate with a bounded expected loss (a safe value for distributions with kurtosis below 3)."""
        return limit_from_moments(self.eigenvalues.cpu().numpy(), self.moments, self.num_perturbations)

    def mean(self, steps: Steps) -> Tensor:
        """Return the mean prediction after each number of steps, (T, n)."""
        return self.y + self.fixed_N + self._mean_modes(as_steps(steps, self.f0)) @ self.vectors.T

    def mean_loss(self, steps: Steps) -> Tensor:
        """Return the loss of the mean prediction, (T,): the curve of the published figures, below the expected loss."""
        modes = self._mean_modes(as_steps(steps, self.f0))
        return self.floor + modes.square().sum(1) / (2 * self.n)

    def expected_loss(self, steps: Steps) -> Tensor:
        """Return the expected loss after each number of steps, (T,); infinite once it overflows.

        Raises:
            UsageError: If the distribution has a diagonal term and no features were given.
        """
        steps_T = as_steps(steps, self.f0)
        if self._diagonal:
            diagonals = torch.stack([state.diagonal() for state in self._dense_states(steps_T)])
        else:
            diagonals = self._diagonal_modes(steps_T)
        return self.floor + diagonals.sum(1) / (2 * self.n)

    def loss_modes(self, *, of_mean: bool = False) -> tuple[Tensor, Tensor]:
        r"""Return c and b of the loss :math:`floor + \sum_k c_k b_k^t` after t steps.

        Args:
            of_mean: Take the loss of the mean path instead of the expected one.

        Returns:
            Coefficients (R,), of either sign, and factors per step (R,), none negative.

        Raises:
            UsageError: If the distribution has a diagonal term, whose expected loss is no such sum.
        """
        squares = self.residual_R.square() / (2 * self.n)
        if of_mean:
            return squares, (1 - self.lr * self.moments.mean * self.eigenvalues).square()
        if self._diagonal:
            raise UsageError("The expected loss of this distribution is no sum of powers: follow it with dense_states.")
        values, vectors = self._mode_matrix()
        return vectors.sum(0) * (vectors.T @ squares), values.clamp_min(0)

    def variance(self, steps: Steps) -> Tensor:
        """Return the variance of every prediction after each number of steps, (T, n)."""
        return self._quadratic(as_steps(steps, self.f0), self.vectors)

    def second_moment(self, steps: Steps) -> Tensor:
        """Return the expected squared residual of every prediction, (T, n): summed over 2n, the expected loss."""
        return self.variance(steps) + (self.mean(steps) - self.y).square()

    def loss_band(self, steps: Steps, *, z: float = 1.645) -> tuple[Tensor, Tensor]:
        r"""Return a band that holds about 90% of runs (for ``z`` = 1.645) after each number of steps.

        The residual's mean and covariance are exact; treating it as Gaussian gives the variance of the loss,
        :math:`[2 tr(\Sigma^2) + 4 m^T \Sigma m] / 4n^2`, and a gamma distribution with that mean and variance the
        quantiles (Wilson-Hilferty).  An approximation: simulate for the exact band.

        Args:
            steps: Numbers of steps (T).
            z: Standard normal quantile of the band's ends.

        Returns:
            Lower and upper ends, each (T,).
        """
        steps_T = as_steps(steps, self.f0)
        means, spreads = self._mean_modes(steps_T), self._spreads(steps_T)
        variances = [
            2 * spread.square().sum() + 4 * mean @ spread @ mean for mean, spread in zip(means, spreads, strict=True)
        ]
        variance = torch.stack(variances) / (4 * self.n**2)
        centre = self.expected_loss(steps_T) - self.floor
        root = (variance.clamp_min(0).sqrt() / centre.clamp_min(torch.finfo(centre.dtype).tiny) / 3).nan_to_num(0.0)
        ends = [(1 - root.square() + sign * z * root).clamp_min(0) ** 3 * centre for sign in (-1, 1)]
        return self.floor + ends[0], self.floor + ends[1].nan_to_num(nan=math.inf)

    def test_mean(self, steps: Steps, f0: Tensor, cross_kernel: Tensor) -> Tensor:
        """Return the mean prediction at other points.

        Args:
            steps: Numbers of steps (T).
            f0: Initial predictions there, (m,).
            cross_kernel: Kernel between them and the training points, (m, n).

        Returns:
            Mean predictions, (T, m).
        """
        start = as_vector(f0, "initial test predictions")
        change = self._mean_modes(as_steps(steps, self.f0)) - self.residual_R
        return start + change @ self._test_weights(cross_kernel, len(start)).T

    def test_variance(self, steps: Steps, cross_kernel: Tensor, diagonal: Tensor) -> Tensor:
        r"""Return the variance of predictions at other points.

        Beside the spread of the training residual they feel the random walk of weights that training cannot see:
        :math:`\eta^2 \tfrac{trace}{P} \sum_{s<t} E|\nabla L|^2` times the part of the test kernel outside the range
        of the training features.

        Args:
            steps: Numbers of steps (T).
            cross_kernel: Kernel between them and the training points, (m, n).
            diagonal: Kernel of each test point with itself, (m,).

        Returns:
            Variances, (T, m).

        Raises:
            UsageError: If the distribution has a diagonal term (its test variance is not known here: simulate instead).
        """
        if self._diagonal:
            raise UsageError("The variance at test points is known for the Gaussian and the sphere: simulate instead.")
        steps_T = as_steps(steps, self.f0)
        own = as_vector(diagonal, "test kernel diagonal")
        weights_MR = self._test_weights(cross_kernel, len(own))
        unseen = (own - weights_MR.square() @ (self.n * self.eigenvalues)).clamp_min(0)
        values, vectors = self._mode_matrix()
        start = vectors.T @ self.residual_R.square()
        sums = torch.stack([_geometric_sum(values, t) * start for t in steps_T]) @ vectors.T
        walk = self.lr**2 * self._trace * (sums @ self.eigenvalues) / self.n
        return self._quadratic(steps_T, weights_MR) + walk[:, None] * unseen

    def _mean_modes(self, steps_T: Tensor) -> Tensor:
        decay = 1 - self.lr * self.moments.mean * self.eigenvalues
        return _power(decay, steps_T) * self.residual_R

    def _mode_matrix(self) -> tuple[Tensor, Tensor]:
        if self._modes is None:
            step, level = self.lr, self.eigenvalues
            contraction = 1 - 2 * step * self.moments.mean * level + step**2 * self._kappa * level.square()
            matrix = torch.diag(contraction) + step**2 * self._trace * torch.outer(level, level)
            self._modes = torch.linalg.eigh(matrix)
        return self._modes

    def _diagonal_modes(self, steps_T: Tensor) -> Tensor:
        values, vectors = self._mode_matrix()
        start = vectors.T @ self.residual_R.square()
        return ((_power(values, steps_T) * start) @ vectors.T).nan_to_num(nan=math.inf).clamp_min(0)

    def _quadratic(self, steps_T: Tensor, weights: Tensor) -> Tensor:
        """Return the variance of ``weights @ residual modes`` for every row of weights, (T, rows)."""
        rows = [((weights @ spread) * weights).sum(1) for spread in self._spreads(steps_T)]
        return torch.stack(rows).nan_to_num(nan=math.inf).clamp_min(0)

    def _spreads(self, steps_T: Tensor) -> Iterator[Tensor]:
        """Yield the covariance of the residual modes after each number of steps, (R, R)."""
        means = self._mean_modes(steps_T)
        if self._diagonal:
            for state, mean in zip(self._dense_states(steps_T), means, strict=True):
                yield state - torch.outer(mean, mean)
            return
        level, pair = self.eigenvalues, torch.outer(self.residual_R, self.residual_R)
        step, c = self.lr, self.moments.mean
        off = 1 - step * c * (level[:, None] + level) + step**2 * self._kappa * torch.outer(level, level)
        alone = (1 - step * c * level[:, None]) * (1 - step * c * level)
        for t, mean, diagonal in zip(steps_T, means, self._diagonal_modes(steps_T), strict=True):
            spread = (off**t - alone**t) * pair
            spread.diagonal().copy_((diagonal - mean.square()).clamp_min(0))
            yield spread

    def dense_states(self, steps: int) -> Iterator[Tensor]:
        """Yield the second moment of the residual's modes step by step, (R, R), for distributions with a diagonal term.

        Args:
            steps: Number of steps.

        Yields:
            The second moment after 0, 1, ..., ``steps`` steps.

        Raises:
            UsageError: If no features were given.
        """
        if self._scaled_features is None:
            raise UsageError(
                "The second moment of distributions other than the Gaussian and the sphere needs the features: "
                "pass features=."
            )
        start = torch.outer(self.residual_R, self.residual_R).cpu().numpy()
        levels = self.eigenvalues.cpu().numpy()
        path = dense_path(
            start, levels, self._scaled_features, self.lr, self.moments, self.num_perturbations, steps=steps
        )
        yield from (torch.as_tensor(state).to(self.f0) for state in path)

    def _dense_states(self, steps_T: Tensor) -> list[Tensor]:
        requested = {int(t) for t in steps_T}
        states = {t: state for t, state in enumerate(self.dense_states(max(requested))) if t in requested}
        return [states[int(t)] for t in steps_T]

    def _test_weights(self, cross_kernel: Tensor, count: int) -> Tensor:
        cross = cross_kernel.detach().to(self.f0)
        if cross.shape != (count, len(self.f0)) or not cross.isfinite().all():
            raise UsageError(
                f"The test kernel must be finite of shape ({count}, {len(self.f0)}), not {tuple(cross.shape)}."
            )
        return cross @ self.vectors / (self.n * self.eigenvalues)


def _power(base_R: Tensor, steps_T: Tensor) -> Tensor:
    return base_R[None, :] ** steps_T[:, None]


def _geometric_sum(ratio: Tensor, count: Tensor) -> Tensor:
    near_one = (ratio - 1).abs() < 1e-14
    safe = torch.where(near_one, 0.5, ratio)
    return torch.where(near_one, count, (1 - safe**count) / (1 - safe))
