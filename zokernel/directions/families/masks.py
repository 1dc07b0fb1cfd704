"""Masks of the small elements of a tensor, one bit per element, found in a few megabytes of memory."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 17
# Integer type of the same width, and the number of 16-bit digits in it.
BITS = {
    torch.float64: (torch.int64, 4),
    torch.float32: (torch.int32, 2),
    torch.bfloat16: (torch.int16, 1),
    torch.float16: (torch.int16, 1),
}


def mask_of_small(weight: Tensor, density: float, *, whole: Tensor | None = None) -> Tensor:
    """Return which elements are among the smallest in magnitude, as packed bits, a chunk of the tensor at a time.

    Args:
        weight: Any shape; float64, float32, bfloat16 or float16.
        density: Share of the elements to keep; ties at the threshold are all kept.
        whole: Tensor that decides how small is small, when ``weight`` is a part of it; ``weight`` when not given.

    Returns:
        (ceil(n / 8),) uint8, least significant bit first, row-major.

    Example:
        >>> mask_of_small(torch.tensor([0.1, -3.0, 0.2, 5.0]), 0.5)
        tensor([5], dtype=torch.uint8)
    """
    flat = weight.detach().reshape(-1)
    ranked = flat if whole is None else whole.detach().reshape(-1)
    threshold = kth_magnitude(ranked, round(density * ranked.numel()))
    return torch.cat([pack_bits(chunk.abs() <= threshold) for chunk in flat.split(CHUNK)])


def kth_magnitude(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest magnitude (k from 1) of a vector, exactly; minus one for k = 0.

    Floating point magnitudes are ordered as their bit patterns are, so it is found 16 bits at a time, from histograms.
    """
    if k == 0:
        return torch.tensor(-1.0, dtype=values.dtype, device=values.device)
    patterns, digits = BITS[values.dtype]
    prefix = torch.zeros((), dtype=torch.int64, device=values.device)
    for shift in reversed(range(0, 16 * digits, 16)):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
        for chunk in values.split(CHUNK):
            bits = chunk.abs().view(patterns).to(torch.int64) >> shift
            matching = bits[(bits >> 16) == (prefix >> shift >> 16)]
            counts += torch.bincount(matching & 0xFFFF, minlength=1 << 16)
        cumulative = counts.cumsum(0)
        digit = torch.searchsorted(cumulative, torch.tensor(k, device=values.device))
        k -= int(cumulative[digit] - counts[digit])
        prefix += digit << shift
    return prefix.to(patterns).view(values.dtype)


def pack_bits(flags: Tensor) -> Tensor:
    """Pack booleans eight to a byte, least significant bit first.

    Args:
        flags: (n,) booleans.

    Returns:
        (ceil(n / 8),) uint8.

    Example:
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    padded = torch.zeros(-(-flags.numel() // 8) * 8, dtype=torch.uint8, device=flags.device)
    padded[: flags.numel()] = flags
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Undo :func:`pack_bits`, padding included.

    Args:
        packed: (k,) uint8.

    Returns:
        (8 k,) booleans.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).bool().flatten()


def count_bits(packed: Tensor) -> int:
    """Return how many bits are set."""
    return sum(int(unpack_bits(chunk).sum()) for chunk in packed.split(CHUNK))
