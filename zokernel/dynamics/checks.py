"""What dynamics accepts: learning rates, vectors of numbers and step numbers, or one clear sentence."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.values import is_number

Steps = int | Iterable[int] | Tensor


def check_learning_rate(lr: float) -> float:
    """Return the learning rate if it is a positive number.

    Raises:
        UsageError: If it is not.
    """
    if not (is_number(lr) and lr > 0):
        raise UsageError(f"The learning rate must be positive and finite, not {lr!r}.")
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
    numbers = torch.as_tensor(steps if isinstance(steps, int | Tensor) else list(steps)).reshape(-1).to(like)
    if not len(numbers) or (numbers < 0).any() or not (numbers == numbers.round()).all():
        raise UsageError("Steps must be whole numbers, zero or more, at least one.")
    return numbers
