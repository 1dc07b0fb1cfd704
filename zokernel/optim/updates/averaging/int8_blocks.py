"""Eight bits a number: blocks of 256 with an fp32 scale each, rounded stochastically."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 256
CHUNK = 1 << 17


def quantize_(codes: Tensor, scales: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Round ``values`` stochastically to eight bits with one scale a block of 256, into ``codes`` and ``scales``.

    Args:
        codes: (n,) int8, overwritten.
        scales: (ceil(n / 256),) float32, overwritten: the blocks' largest magnitudes over 127.
        values: (n,) float32.
        generator: Source of the rounding.

    Example:
        >>> codes, scales = torch.zeros(3, dtype=torch.int8), torch.zeros(1)
        >>> quantize_(codes, scales, torch.tensor([0.0, 1.27, -0.5]), torch.Generator().manual_seed(0))
        >>> codes.tolist()[:2], round(float(scales[0]), 6)
        ([0, 127], 0.01)
    """
    for begin, end in _chunks(values.numel()):
        blocks, length = _blocks(values[begin:end])
        scale = blocks.abs().amax(dim=1) / 127.0
        first = begin // BLOCK
        scales[first : first + len(scale)] = scale
        noise = torch.rand(blocks.shape, generator=generator, dtype=torch.float32, device=values.device)
        steps = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
        # The largest magnitude sits on +-127 up to rounding, so the clamp never changes a value by more than an ulp.
        codes[begin:end] = torch.floor(steps + noise).clamp_(-127, 127).view(-1)[:length].to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor, *, out: Tensor) -> None:
    """Write what ``codes`` and ``scales`` of :func:`quantize_` stand for to ``out``, (n,) float32."""
    for begin, end in _chunks(codes.numel()):
        first, last = begin // BLOCK, math.ceil(end / BLOCK)
        per_value = scales[first:last].repeat_interleave(BLOCK)[: end - begin]
        torch.mul(codes[begin:end], per_value, out=out[begin:end])


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, CHUNK):
        yield begin, min(begin + CHUNK, count)


def _blocks(values: Tensor) -> tuple[Tensor, int]:
    length = values.numel()
    padded = torch.nn.functional.pad(values, (0, -length % BLOCK))
    return padded.view(-1, BLOCK), length
