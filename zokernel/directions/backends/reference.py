r"""Reference backend in plain torch: any device, every rule, one Philox block for each element.

Slow but short: it evaluates a direction element by element from positions, exactly as the definition says, and is what
the fast backends are tested against.  Memory stays bounded by working on CHUNK elements at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zokernel.directions.backends import gaussian_math as gm
from zokernel.directions.philox import MASK_32, philox4x32
from zokernel.directions.terms import Factors, Job, Noise, Rule, Term, affine

CHUNK = 1 << 16
_INDEX_BITS = {torch.float32: 29, torch.bfloat16: 45, torch.float16: 42}


def sweep(jobs: Sequence[Job]) -> list[float]:
    """Carry out one sweep; the same contract as the other backends' ``sweep``.

    Args:
        jobs: One per tensor.

    Returns:
        For grid rules, the largest magnitude that each tensor reached; zeros otherwise.
    """
    return [_sweep_one(job) for job in jobs]


def sums_of_squares(noises: Sequence[Noise], sizes: Sequence[int], device: torch.device) -> list[float]:
    """Return the squared norm of the noise on each of some whole tensors.

    Args:
        noises: One per tensor; gain and mask are ignored.
        sizes: Elements of each tensor.
        device: Where to compute.

    Returns:
        The sums of squares.
    """
    totals = []
    for noise, size in zip(noises, sizes):
        plain, total = Noise(noise.distribution, noise.key, noise.step, noise.index), 0.0
        for begin in range(0, size, CHUNK):
            position = torch.arange(begin, min(begin + CHUNK, size), device=device)
            total += float(noise_values(plain, position).double().square().sum())
        totals.append(total)
    return totals


def random_word(position: Tensor, key: tuple[int, int], step: int, index: int, bits_only: bool = False) -> Tensor:
    """Return the random word that serves each position.

    Args:
        position: (n,) int64 positions.
        key: Philox key.
        step: Third counter word.
        index: Fourth counter word.
        bits_only: Use the layout of one bit per element (Rademacher) instead of one word per element.

    Returns:
        (n,) int64: the word (four neighbouring 32-element stretches share a block), or the word of the plane.
    """
    if bits_only:
        block, lane = position // gm.BITS_PER_BLOCK, (position // 32) % 4
    else:
        block = position // gm.GROUP * gm.PLANE + position % gm.PLANE
        lane = position // gm.PLANE % 4
    words = philox4x32((block & MASK_32, block >> 32, torch.full_like(block, step), torch.full_like(block, index)), key)
    return torch.stack(words).gather(0, lane[None])[0]


def noise_values(noise: Noise, position: Tensor) -> Tensor:
    """Return the float32 values of noise at the given positions (gain applied, mask not)."""
    if noise.distribution == "rademacher":
        word = random_word(position, noise.key, noise.step, noise.index, bits_only=True)
        values = 1.0 - 2.0 * ((word >> (position % 32)) & 1).float()
    elif noise.distribution == "uniform":
        word = random_word(position, noise.key, noise.step, noise.index)
        values = (word.int().float() + 0.5) * _f32(gm.UNIFORM_SCALE)
    else:
        # Box-Muller pairs planes (0, 1) and (2, 3): the partner is one plane away.
        second = position // gm.PLANE % 2 == 1
        first_position = torch.where(second, position - gm.PLANE, position)
        word_a = random_word(first_position, noise.key, noise.step, noise.index)
        word_b = random_word(first_position + gm.PLANE, noise.key, noise.step, noise.index)
        cosine_part, sine_part = normal_pair(word_a, word_b)
        values = torch.where(second, sine_part, cosine_part)
    return values if noise.gain == 1.0 else values * _f32(noise.gain)


def normal_pair(word_a: Tensor, word_b: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller: two tensors of 32-bit words (int64) to two float32 normals (gaussian_math has the formulas)."""
    u = ((word_a >> 1).int().float() + 0.5) * gm.UNIFORM_UNIT
    bits = u.view(torch.int32)
    exponent = (bits - gm.SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    p = torch.full_like(f, gm.LOG_COEFFICIENTS[0])
    for coefficient in gm.LOG_COEFFICIENTS[1:]:
        p = p * f + _f32(coefficient)
    f2 = f * f
    log_u = (f + (f2 * f * p - 0.5 * f2)) + exponent.float() * _f32(gm.LOG_2)
    # Vector math libraries round float32 roots loosely; a float64 root rounds to the correct float32.
    radius = (-2.0 * log_u).double().sqrt().float()

    quadrant = ((word_b + (1 << 29)) & MASK_32) >> 30
    x = (word_b - (quadrant << 30)).int().float() * _f32(gm.ANGLE_UNIT)
    y = x * x
    s0, s1, s2 = map(_f32, gm.SIN_COEFFICIENTS)
    c0, c1, c2 = map(_f32, gm.COS_COEFFICIENTS)
    sine = x + x * y * ((s0 * y + s1) * y + s2)
    cosine = (1.0 - 0.5 * y) + y * y * ((c0 * y + c1) * y + c2)
    odd = quadrant % 2 == 1
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where((quadrant + 1) & 2 == 2, -first, first)
    second = torch.where(quadrant & 2 == 2, -second, second)
    return radius * first, radius * second


def term_values(term: Term, position: Tensor, begin: int) -> Tensor:
    """Return one term's float32 values.

    Args:
        term: What to evaluate.
        position: (n,) positions in the whole tensor.
        begin: Index of the first of them among the local elements.

    Returns:
        (n,) float32.
    """
    if isinstance(term, Noise):
        values = noise_values(term, position)
        if term.mask is not None:
            local = torch.arange(begin, begin + position.numel(), device=position.device)
            values = values * ((term.mask[local >> 3] >> (local & 7).to(torch.uint8)) & 1)
        return values
    if isinstance(term, Factors):
        columns = term.right.shape[1]
        row, column = position // columns, position % columns
        values = torch.zeros(position.numel(), dtype=torch.float32, device=position.device)
        for k in range(term.right.shape[0]):
            values = values + term.left[row, k] * term.right[k, column]
        return values if term.gain == 1.0 else values * _f32(term.gain)
    return term.values.view(-1)[position]


def _f32(value: float) -> float:
    """A Python float that float32 holds exactly, so that scalar arithmetic matches compiled float32 constants."""
    return torch.tensor(value, dtype=torch.float32).item()


def _sweep_one(job: Job) -> float:
    local = job.place.local
    flat = local.view(-1) if local.is_contiguous() else local.contiguous().view(-1)
    peak = 0.0
    for begin in range(0, flat.numel(), CHUNK):
        end = min(begin + CHUNK, flat.numel())
        position = job.place.positions(begin, end)
        chunk = flat[begin:end]
        new = _combine(job, chunk, position, begin)
        chunk.copy_(new)
        if job.rule in (Rule.GRID_MOVE, Rule.GRID_COMMIT):
            peak = max(peak, float(new.abs().max()))
    if not local.is_contiguous():
        local.copy_(flat.view(local.shape))
    return peak


def _combine(job: Job, weights: Tensor, position: Tensor, begin: int) -> Tensor:
    stochastic = job.rule == Rule.STOCHASTIC and weights.dtype != torch.float64
    precision = torch.float64 if stochastic or weights.dtype == torch.float64 else torch.float32
    total = torch.zeros(weights.shape, dtype=precision, device=weights.device)
    old = torch.zeros_like(total)
    for number, term in enumerate(job.terms):
        values = term_values(term, position, begin).to(precision)
        total += values * _rounded(job.scales[number], precision)
        if job.old_scales:
            old += values * _rounded(job.old_scales[number], precision)
    if job.rule in (Rule.NEAREST, Rule.STOCHASTIC):
        keep, shift = affine(job.decay)
        x = weights.to(precision)
        if job.decay == 1.0:
            x = x + total
        else:
            x = _rounded(keep, precision) * x + (_rounded(shift, precision) * x + total)
        return _round_stochastically(x, weights.dtype, _rounding(job, position)) if stochastic else x.to(weights.dtype)
    before = torch.round(old / job.grid) * job.grid
    if job.rule == Rule.GRID_MOVE:
        return weights + (torch.round(total / job.grid) * job.grid - before)
    theta = weights - before
    change = theta.double() * (job.decay - 1.0) + total.double()
    steps = torch.floor(change / job.grid + _rounding(job, position).double() * 2.0**-32)
    return theta + (steps * job.grid).float()


def _rounding(job: Job, position: Tensor) -> Tensor:
    key0, key1, step, index = job.rounding
    return random_word(position, (key0, key1), step, index)


def _round_stochastically(x: Tensor, dtype: torch.dtype, word: Tensor) -> Tensor:
    drop = _INDEX_BITS[dtype]
    noise = word << (drop - 32) if drop > 32 else word >> (32 - drop)
    bits = x.view(torch.int64)
    rounded = torch.where(x.isfinite(), ((bits + noise) >> drop) << drop, bits).view(torch.float64)
    if dtype == torch.float16:
        fixed = torch.floor(x * 2.0**24 + word.double() * 2.0**-32) * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, fixed, rounded)
    return rounded.float().to(dtype)


def _rounded(scale: float, precision: torch.dtype) -> float:
    return scale if precision == torch.float64 else _f32(scale)
