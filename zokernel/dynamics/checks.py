"""What dynamics accepts: learning rates, vectors of numbers, step numbers and kernels, or one clear sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from zokernel.errors import UsageError

Steps = int | Iterable[int] | Tensor


def check_learning_rate(lr: float) -> float:
    """Return the learning rate if it is a positive number.

    Raises:
        UsageError: If it is not.
    """
    if not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"The learning rate must be positive and finite, not {lr}.")
    return float(lr)


def as_vector(values: Tensor, what: str) -> Tensor:
    """Return values as a float64 vector.

    Raises:
        UsageError: If they are not finite or there is none.
    """
    vector = torch.as_tensor(values, dtype=torch.float64).detach().reshape(-1)
    if not len(vector) or not vector.isfinite().all():
        raise UsageError(f"The {what} must be finite numbers, at least one.")
    return vector


def as_steps(steps: Steps, like: Tensor) -> Tensor:
    """Return step numbers as a float64 vector.

    Raises:
        UsageError: If one is negative or there is none.
    """
    wanted = torch.as_tensor(steps if isinstance(steps, int | Tensor) else list(steps)).reshape(-1).to(like)
    if not len(wanted) or (wanted < 0).any() or not (wanted == wanted.round()).all():
        raise UsageError("Steps must be whole numbers, zero or more, at least one.")
    return wanted


def as_kernel(kernel: Tensor, size: int) -> Tensor:
    """Return a kernel as a symmetric float64 matrix.

    Args:
        kernel: Kernel of ``size`` predictions, as a matrix or with an axis for several outputs.
        size: Number of predictions.

    Returns:
        The kernel, (size, size).

    Raises:
        UsageError: If its shape does not fit, it is not finite, or it is clearly not symmetric.
    """
    matrix = torch.as_tensor(kernel, dtype=torch.float64).detach()
    if matrix.numel() != size * size:
        raise UsageError(f"The kernel has shape {tuple(matrix.shape)}, which does not fit {size} predictions.")
    matrix = matrix.reshape(size, size)
    if not matrix.isfinite().all():
        raise UsageError("The kernel must be finite: check the features for NaN and infinity.")
    scale = matrix.abs().max()
    if (matrix - matrix.T).abs().max() > 1e-5 * scale:
        raise UsageError("The kernel must be symmetric: pass K = X X^T of one set of points.")
    return (matrix + matrix.T) / 2
