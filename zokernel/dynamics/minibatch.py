r"""Training with random mini-batches step by step: the mean and the second moment of the residual, exactly.

The recursion of :mod:`zokernel.theory.batch_stability` couples every pair of examples, so it costs O(n^3) per step:
for up to some hundred examples.  The full batch with shared directions is :func:`zokernel.dynamics.zo_descent`, which
reaches any step at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.dynamics.checks import as_vector, check_learning_rate
from zokernel.dynamics.descent import ZoDescent
from zokernel.theory.batch_stability import residual_noise
from zokernel.theory.checks import as_kernel


def batch_descent(
    f0: Tensor,
    y: Tensor,
    kernel: Tensor,
    lr: float,
    batch_size: int,
    steps: int,
    num_perturbations: int = 1,
    scheme: str = "per_example",
    distribution: str | Distribution = "gaussian",
    *,
    replacement: bool = False,
    features: Tensor | None = None,
) -> ZoDescent:
    r"""Return the mean, the second moment and the expected loss of training on random batches, exactly.

    Every step draws its batch anew, B of N examples, without or with replacement; epochs, whose batches depend on each
    other, are not covered (docs/theory.md, "E.3 Training with mini-batches").

    Args:
        f0: Initial predictions, (N,) or (N, V).
        y: Targets, the same shape.
        kernel: Kernel :math:`K = X X^T`, (N, N) or (N, V, N, V).
        lr: Learning rate.
        batch_size: Examples B per batch.
        steps: Number T of steps.
        num_perturbations: Directions P of the batch, or of each example.
        scheme: ``shared``, ``per_example``, ``flipout``, or ``first_order`` for mini-batch gradient descent.
        distribution: Distribution of the directions; those other than the Gaussian need ``features``.
        replacement: Whether an example can be in a batch twice.
        features: Features X, (N V, d).

    Returns:
        Mean and second moment, (T + 1, *shape of f0), and expected loss :math:`E \|f - y\|^2 / 2N`, (T + 1,).

    Raises:
        UsageError: If the input is not usable.

    Example:
        >>> run = batch_descent(torch.zeros(2), torch.ones(2), torch.eye(2), lr=0.5, batch_size=1, steps=2)
        >>> [round(loss, 4) for loss in run.expected_loss.tolist()]
        [0.5, 0.5, 0.5]
    """
    check_learning_rate(lr)
    start, target = as_vector(f0.reshape(-1), "initial predictions"), as_vector(y.reshape(-1), "targets")
    matrix = as_kernel(kernel, len(start))
    population, outputs = f0.shape[0], start.numel() // f0.shape[0]
    mean = start - target
    state = torch.outer(mean, mean)
    means, squares = [mean], [state.diagonal()]
    for _ in range(steps):
        noise = residual_noise(
            matrix,
            state,
            batch_size,
            num_perturbations,
            scheme,
            distribution,
            replacement=replacement,
            features=features,
            outputs=outputs,
        )
        drift = matrix @ state / population
        state = state - lr * (drift + drift.T) + lr**2 * (noise + noise.T) / 2  # rounding must not break its symmetry
        mean = mean - lr * matrix @ mean / population
        means.append(mean)
        squares.append(state.diagonal())
    second = torch.stack(squares)
    path = torch.stack(means) + target
    return ZoDescent(path.reshape(-1, *f0.shape), second.reshape(-1, *f0.shape), second.sum(1) / (2 * population))
