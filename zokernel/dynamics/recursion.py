r"""The second moment of the residual step by step: O(n) without a diagonal term, dense with one.

:mod:`zokernel.dynamics.evolution` reaches any step at once; these recursions do the same one step at a time, for
learning-rate schedules, for distributions whose noise depends on the features' coordinates, and as the reference in
tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from zokernel.errors import UsageError
from zokernel.theory.nzk_moments import ProcessMoments
from zokernel.theory.stability import diagonal_noise, noise_coefficients


def spectral_path(
    squares: np.ndarray,
    eigenvalues: np.ndarray,
    lr: float | Sequence[float],
    moments: ProcessMoments,
    num_perturbations: int,
    *,
    steps: int,
) -> Iterator[np.ndarray]:
    r"""Yield :math:`c_i = E \hat e_i^2` for steps 0, 1, ..., ``steps``, at O(r) per step.

    See docs/theory.md, "Second moment".

    .. math:: c_i^+ = [(1 - \eta c\, l_i)^2 + \eta^2 (\kappa - c^2) l_i^2]\, c_i
              + \eta^2 \tfrac{trace}{P}\, l_i \sum_j l_j c_j

    Args:
        squares: Initial squared residuals in the kernel's eigenbasis, (r,).
        eigenvalues: Eigenvalues of K/n, (r,).
        lr: One learning rate, or one for every step.
        moments: Moments of the random step, without a diagonal term.
        num_perturbations: Directions P averaged per step.
        steps: Number of steps.

    Yields:
        Expected squares, (r,).

    Raises:
        UsageError: If the distribution has a diagonal term, or there are fewer learning rates than steps.

    Example:
        >>> moments = ProcessMoments(mean=1.0, outer=2.0, trace=1.0)
        >>> path = spectral_path(np.ones(1), np.ones(1), 0.5, moments, 1, steps=2)
        >>> [float(state[0]) for state in path]
        [1.0, 0.75, 0.5625]
    """
    if moments.diagonal:
        raise UsageError(
            "The noise of this distribution has a diagonal term, which needs the features: use dense_path."
        )
    kappa, trace, _ = noise_coefficients(moments, num_perturbations)
    state = np.array(squares, dtype=np.float64)
    yield state
    for rate in _schedule(lr, steps):
        contraction = 1 - 2 * rate * moments.mean * eigenvalues + rate**2 * kappa * eigenvalues**2
        state = contraction * state + rate**2 * trace * (eigenvalues @ state) * eigenvalues
        yield state


def dense_path(
    state: np.ndarray,
    eigenvalues: np.ndarray,
    left: np.ndarray,
    lr: float | Sequence[float],
    moments: ProcessMoments,
    num_perturbations: int,
    *,
    steps: int,
) -> Iterator[np.ndarray]:
    r"""Yield the whole :math:`C = E \hat e \hat e^T` for steps 0, 1, ..., ``steps``, at O(r^2 d) per step.

    Args:
        state: Initial second moment in the kernel's eigenbasis, (r, r).
        eigenvalues: Eigenvalues of K/n, (r,).
        left: :math:`Y = U^T X / \sqrt n`, (r, d).
        lr: One learning rate, or one for every step.
        moments: Moments of the random step.
        num_perturbations: Directions P averaged per step.
        steps: Number of steps.

    Yields:
        Second moments, (r, r).

    Raises:
        UsageError: If there are fewer learning rates than steps.
    """
    kappa, trace, diagonal = noise_coefficients(moments, num_perturbations)
    pairs, outer = np.add.outer(eigenvalues, eigenvalues), np.outer(eigenvalues, eigenvalues)
    state = np.array(state, dtype=np.float64)
    yield state
    for rate in _schedule(lr, steps):
        noise = kappa * outer * state + trace * (eigenvalues @ state.diagonal()) * np.diag(eigenvalues)
        noise += diagonal * diagonal_noise(left, state)
        state = state - rate * moments.mean * pairs * state + rate**2 * noise
        yield state


def _schedule(lr: float | Sequence[float], steps: int) -> Iterable[float]:
    if isinstance(lr, int | float):
        return itertools.repeat(float(lr), steps)
    if len(lr) < steps:
        raise UsageError(f"There are {len(lr)} learning rates for {steps} steps.")
    return [float(rate) for rate in lr[:steps]]
