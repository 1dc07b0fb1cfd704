"""The first batches of a run, and the test whether its losses at several weights can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from zokernel.errors import UsageError

# Losses of the same batch at the same weights differ by rounding on some GPUs, and by more if something is drawn.
TOLERANCE = 1e-3


def first_batches(loader: DataLoader, count: int) -> list[Any]:
    """Return the first batches of a loader without using up random numbers, or the state that accelerate keeps."""
    with torch.random.fork_rng(devices=[]):
        return list(islice(DataLoader.__iter__(loader), count))


def refuse_random_loss(loss: Callable[[], Tensor]) -> None:
    """Refuse a loss that differs between two evaluations at the same weights.

    Args:
        loss: Returns the loss of the first batch.

    Raises:
        UsageError: If it draws random numbers.
    """
    with torch.no_grad():
        first, second = (float(loss()) for _ in range(2))
    if math.isfinite(first) and abs(first - second) > TOLERANCE * max(1.0, abs(first)):
        raise UsageError(
            f"The same batch gave the losses {first:.6g} and {second:.6g} at the same weights, so losses at different "
            "weights cannot be compared: take the randomness (sampling, dropout, noise) out of the loss."
        )
