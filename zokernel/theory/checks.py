"""What closed forms accept, or one clear sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zokernel.errors import UsageError
from zokernel.values import is_number

if TYPE_CHECKING:
    from torch import Tensor


def check_num_perturbations(num_perturbations: int) -> int:
    """Return the number of perturbations if it is a positive whole number.

    Raises:
        UsageError: If it is not.
    """
    return check_count(num_perturbations, "number of perturbations")


def check_count(count: float, what: str) -> int:
    """Return a count if it is a positive whole number, of whatever type.

    Args:
        count: The count.
        what: What it is, for the message.

    Raises:
        UsageError: If it is not.

    Example:
        >>> check_count(4.0, "batch size")
        4
    """
    if not is_number(count) or int(count) != count or count < 1:
        raise UsageError(f"The {what} must be a positive whole number, not {count!r}.")
    return int(count)


def check_noise_ratio(noise_ratio: float) -> float:
    """Return the relative noise of the examples' gradients if it is one.

    Raises:
        UsageError: If it is negative or not finite.
    """
    if not (is_number(noise_ratio) and noise_ratio >= 0):
        raise UsageError(f"The noise of the examples' gradients must be at least 0 and finite, not {noise_ratio!r}.")
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
        >>> import torch
        >>> as_kernel(torch.ones(2, 2)).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    import torch

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
