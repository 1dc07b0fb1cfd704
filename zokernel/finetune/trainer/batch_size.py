"""The largest batch that fits, found before the first step and without changing what a step is.

A zeroth-order step needs the memory of one forward, so a forward on the longest examples decides.  Where the
requested batch does not fit, it is split into micro-batches whose losses are averaged: the same step, in less memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import find_executable_batch_size

from zokernel.errors import RunError


@torch.no_grad()
def largest_batch(forward: Callable[[int], object], requested: int) -> int:
    """Return the largest divisor of a batch size that fits in memory.

    Args:
        forward: Runs a forward on the longest examples, as many as it is told to.
        requested: The requested batch size.

    Returns:
        Examples per micro-batch.

    Raises:
        RunError: If not even one example fits.

    Example:
        >>> def forward(size):
        ...     if size > 5:
        ...         raise RuntimeError("CUDA out of memory.")
        >>> largest_batch(forward, 16)
        4
    """
    size = requested

    def next_divisor() -> int:
        nonlocal size
        # The next smaller divisor, so that micro-batches add up to the batch.
        size = next((n for n in range(size - 1, 0, -1) if requested % n == 0), 0)
        return size

    def fits(batch_size: int) -> int:
        forward(batch_size)
        return batch_size

    try:
        return find_executable_batch_size(fits, starting_batch_size=requested, reduce_batch_size_fn=next_divisor)()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        raise RunError(
            "Not even one example fits in memory: lower max_length, use a smaller model, or dtype bfloat16."
        ) from error
