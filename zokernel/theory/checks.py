"""What closed forms accept, or one clear sentence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zokernel.errors import UsageError


def check_num_perturbations(num_perturbations: int) -> int:
    """Return the number of perturbations if it is a positive whole number.

    Raises:
        UsageError: If it is not.
    """
    if int(num_perturbations) != num_perturbations or num_perturbations < 1:
        raise UsageError(f"The number of perturbations must be a positive whole number, not {num_perturbations}.")
    return int(num_perturbations)


def check_noise_ratio(noise_ratio: float) -> float:
    """Return the relative noise of the examples' gradients if it is one.

    Raises:
        UsageError: If it is negative or not finite.
    """
    if not 0.0 <= noise_ratio < math.inf:
        raise UsageError(f"The noise of the examples' gradients must be at least 0 and finite, not {noise_ratio}.")
    return noise_ratio


def as_kernel(kernel: Tensor, size: int | None = None) -> Tensor:
    """Return a kernel as a symmetric float64 matrix.

    Args:
        kernel: Kernel of ``size`` predictions, as a matrix or with an axis for several outputs.
        size: Number of predictions; that of the matrix's rows when not given.

    Returns:
        The kernel, (size, size).

    Raises:
        UsageError: If its shape does not fit, it is not finite, or it is clearly not symmetric.

    Example:
        >>> as_kernel(torch.ones(2, 2)).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    matrix = torch.as_tensor(kernel, dtype=torch.float64).detach()
    if size is None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise UsageError(f"A kernel must be a square matrix, not of shape {tuple(matrix.shape)}.")
        size = len(matrix)
    if matrix.numel() != size * size:
        raise UsageError(f"The kernel has shape {tuple(matrix.shape)}, which does not fit {size} predictions.")
    matrix = matrix.reshape(size, size)
    if not matrix.isfinite().all():
        raise UsageError("The kernel must be finite: check the features for NaN and infinity.")
    scale = matrix.abs().max()
    if (matrix - matrix.T).abs().max() > 1e-5 * scale:
        raise UsageError("The kernel must be symmetric: pass K = X X^T of one set of points.")
    return (matrix + matrix.T) / 2
