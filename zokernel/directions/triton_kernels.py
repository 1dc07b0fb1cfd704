"""Triton sweep of one tensor: generate a tile of every term, combine it with the weights, store.

Legend: a program handles 4 planes of shape (ROWS, COLUMNS); plane k of row r holds elements
``(r * 4 + k) * COLUMNS + column`` of its tile, which is how a Philox block's four words are laid out (COLUMNS is 32
bits of one word for Rademacher, 64 blocks for the other laws).  ``ALIGNED`` means that positions are consecutive and
the tile starts at a whole block; otherwise every element finds its own block and takes the word it needs.
"""

# Triton reads argument names and literals at compile time; annotations other than constexpr would be evaluated.
import triton
import triton.language as tl

from zokernel.directions import gaussian_math as gm
from zokernel.directions import philox

M0, M1 = tl.constexpr(philox.MULTIPLIER_0), tl.constexpr(philox.MULTIPLIER_1)
W0, W1 = tl.constexpr(philox.WEYL_0), tl.constexpr(philox.WEYL_1)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(c) for c in gm.LOG_COEFFICIENTS)
S0, S1, S2 = (tl.constexpr(c) for c in gm.SIN_COEFFICIENTS)
C0, C1, C2 = (tl.constexpr(c) for c in gm.COS_COEFFICIENTS)
LOG_2, ANGLE_UNIT = tl.constexpr(gm.LOG_2), tl.constexpr(gm.ANGLE_UNIT)
HALF_UNIT, UNIFORM_SCALE = tl.constexpr(gm.UNIFORM_UNIT), tl.constexpr(gm.UNIFORM_SCALE)
SQRT_HALF_BITS = tl.constexpr(gm.SQRT_HALF_BITS)

TILE = 1024
SIGN_COLUMNS, WORD_COLUMNS = 32, gm.PLANE


@triton.jit
def philox_words(block, step, index, k0, k1):
    """Four uint32 words for each int64 block number."""
    c0 = (block & 0xFFFFFFFF).to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + step, tl.zeros_like(c0) + index
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, M0, tl.uint32)), c0 * tl.full(c0.shape, M0, tl.uint32)
        high1, low1 = tl.umulhi(c2, tl.full(c0.shape, M1, tl.uint32)), c2 * tl.full(c0.shape, M1, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + tl.full(k0.shape, W0, tl.uint32)).to(tl.uint32)
        k1 = (k1 + tl.full(k1.shape, W1, tl.uint32)).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def normal_pair(word_a, word_b):
    """Box-Muller on two tensors of uint32 words (gaussian_math has the formulas)."""
    u = ((word_a >> 1).to(tl.int32).to(tl.float32) + 0.5) * HALF_UNIT
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * 0.0 + L0
    p = p * f + L1
    p = p * f + L2
    p = p * f + L3
    p = p * f + L4
    p = p * f + L5
    p = p * f + L6
    p = p * f + L7
    f2 = f * f
    log_u = (f + (f2 * f * p - 0.5 * f2)) + exponent.to(tl.float32) * LOG_2
    radius = tl.sqrt_rn(-2.0 * log_u)
    quadrant = (word_b + tl.full(word_b.shape, 1 << 29, tl.uint32)) >> 30
    x = (word_b - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * ANGLE_UNIT
    y = x * x
    sine = x + x * y * ((S0 * y + S1) * y + S2)
    cosine = (1.0 - 0.5 * y) + y * y * ((C0 * y + C1) * y + C2)
    odd = (quadrant & 1) != 0
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    second = tl.where((quadrant & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def uniform(word):
    """One uint32 word to a uniform on [-sqrt(3), sqrt(3)]."""
    return (word.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * UNIFORM_SCALE


@triton.jit
def block_values(block, step, index, k0, k1, LAW: tl.constexpr):
    """The four float32 values (Gaussian, uniform) that each block's words give."""
    w0, w1, w2, w3 = philox_words(block, step, index, k0, k1)
    if LAW == 1:
        z0, z1 = normal_pair(w0, w1)
        z2, z3 = normal_pair(w2, w3)
    else:
        z0, z1, z2, z3 = uniform(w0), uniform(w1), uniform(w2), uniform(w3)
    return z0, z1, z2, z3


@triton.jit
def pick(lane, v0, v1, v2, v3):
    """Element by element, the value of number ``lane``."""
    return tl.where(lane == 0, v0, tl.where(lane == 1, v1, tl.where(lane == 2, v2, v3)))


@triton.jit
def sign_of(word, bit):
    """A bit of a word as +1 (clear) or -1 (set)."""
    return 1.0 - 2.0 * ((word >> bit.to(tl.uint32)) & 1).to(tl.float32)


@triton.jit
def noise_at(position, step, index, k0, k1, LAW: tl.constexpr):
    """A law's value at each position, one block an element."""
    if LAW == 0:
        w0, w1, w2, w3 = philox_words(position // 128, step, index, k0, k1)
        value = sign_of(pick(position // 32 % 4, w0, w1, w2, w3), position % 32)
    else:
        block = position // 256 * 64 + position % 64
        z0, z1, z2, z3 = block_values(block, step, index, k0, k1, LAW)
        value = pick(position // 64 % 4, z0, z1, z2, z3)
    return value


@triton.jit
def word_at(position, step, index, k0, k1):
    """The random word that rounds each position."""
    w0, w1, w2, w3 = philox_words(position // 256 * 64 + position % 64, step, index, k0, k1)
    return pick(position // 64 % 4, w0, w1, w2, w3)


@triton.jit
def finish_values(z, local, inside, gain, mask_ptr, MASKED: tl.constexpr):
    """Apply mask and gain."""
    if MASKED:
        byte = tl.load(mask_ptr + (local >> 3), mask=inside, other=0).to(tl.int32)
        z = z * ((byte >> (local & 7).to(tl.int32)) & 1).to(tl.float32)
    return z * gain


@triton.jit
def stored_term(position, inside, first_ptr, second_ptr, term, numel, rank, columns, KIND: tl.constexpr):
    """Entries of left @ right (KIND 1) or given values (KIND 2) at each position."""
    if KIND == 1:
        row, column = position // columns, position % columns
        left = first_ptr + term * (numel // columns) * rank
        right = second_ptr + term * rank * columns
        z = tl.zeros(position.shape, tl.float32)
        for k in range(rank):
            a = tl.load(left + row * rank + k, mask=inside, other=0.0)
            z += a * tl.load(right + k * columns + column, mask=inside, other=0.0)
    else:
        z = tl.load(first_ptr + term * numel + position, mask=inside, other=0.0)
    return z


@triton.jit
def rint(x):
    """Round float32 to the nearest integer, ties to even."""
    magnitude = tl.abs(x)
    rounded = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def round_stochastically(y, word, DROP: tl.constexpr, HALF: tl.constexpr):
    """Round float64 to 53 - DROP significant bits (float16: no finer than 2^-24)."""
    bits = y.to(tl.int64, bitcast=True)
    wide = word.to(tl.int64)
    if DROP > 32:
        noise = wide << (DROP - 32)
    else:
        noise = wide >> (32 - DROP)
    rounded = (((bits + noise) >> DROP) << DROP).to(tl.float64, bitcast=True)
    if HALF:
        fixed = tl.floor(y * 16777216.0 + wide.to(tl.float64) * 2.3283064365386963e-10) * 5.9604644775390625e-08
        rounded = tl.where(tl.abs(y) < 6.103515625e-05, fixed, rounded)
    # Infinity and NaN compare false and stay what they are.
    return tl.where(tl.abs(y) < float("inf"), rounded, y)


@triton.jit
def to_bfloat16(x):
    """Float32 to the nearest bfloat16, ties to even, by its bits (compilers and the interpreter differ here)."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    kept = tl.where(x == x, rounded, 0x7FC0)
    return kept.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def store(
    x_ptr, local, position, inside, acc, old, job_ptr, round_ptr, RULE: tl.constexpr, DECAYED: tl.constexpr,
    DROP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Combine one plane with its weights, store it and return the new values (zero outside)."""
    x = tl.load(x_ptr + local, mask=inside, other=0.0)
    precision = acc.dtype
    if RULE >= 1 and DROP > 0:
        k0, k1 = tl.load(round_ptr).to(tl.uint32), tl.load(round_ptr + 1).to(tl.uint32)
        step, index = tl.load(round_ptr + 2).to(tl.uint32), tl.load(round_ptr + 3).to(tl.uint32)
        word = word_at(position, step, index, k0, k1)
    if RULE <= 1:
        value = x.to(precision)
        if DECAYED:
            keep, shift = tl.load(job_ptr).to(precision), tl.load(job_ptr + 1).to(precision)
            value = keep * value + (shift * value + acc)
        else:
            value = value + acc
        if RULE == 1 and DROP > 0:
            value = round_stochastically(value, word, DROP, HALF).to(tl.float32)
        new = to_bfloat16(value) if x.dtype == tl.bfloat16 else value.to(x.dtype)
    else:
        grid = tl.load(job_ptr + 3)
        per_grid, grid32 = (1.0 / grid).to(tl.float32), grid.to(tl.float32)
        before = rint(old * per_grid) * grid32
        if RULE == 2:
            new = x + (rint(acc * per_grid) * grid32 - before)
        else:
            theta = x - before
            change = theta.to(tl.float64) * tl.load(job_ptr + 2) + acc.to(tl.float64)
            steps = tl.floor(change / grid + word.to(tl.float64) * 2.3283064365386963e-10)
            new = theta + (steps * grid).to(tl.float32)
    tl.store(x_ptr + local, new, mask=inside)
    return tl.where(inside, tl.abs(new.to(tl.float32)), 0.0)


@triton.jit
def sweep_kernel(
    x_ptr, job_ptr, round_ptr, counter_ptr, scale_ptr, mask_ptr, first_ptr, second_ptr, peak_ptr,
    num_terms, count, start, run, run_stride, numel, rank, columns,
    KIND: tl.constexpr, LAW: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, RULE: tl.constexpr,
    DECAYED: tl.constexpr, WIDE: tl.constexpr, DROP: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add every term to one tile of a tensor; ``triton_backend`` explains the arguments."""
    tile = tl.program_id(0).to(tl.int64) * (ROWS * 4 * COLUMNS)
    row, column = tl.arange(0, ROWS)[:, None].to(tl.int64), tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    lead = start % 256 if ALIGNED else start * 0
    l0 = tile - lead + row * (4 * COLUMNS) + column
    l1, l2, l3 = l0 + COLUMNS, l0 + 2 * COLUMNS, l0 + 3 * COLUMNS
    i0, i1, i2, i3 = (l0 >= 0) & (l0 < count), (l1 >= 0) & (l1 < count), (l2 >= 0) & (l2 < count), (l3 >= 0) & (l3 < count)  # noqa: E501  # fmt: skip
    p0, p1 = start + l0 // run * run_stride + l0 % run, start + l1 // run * run_stride + l1 % run
    p2, p3 = start + l2 // run * run_stride + l2 % run, start + l3 // run * run_stride + l3 % run
    a0 = tl.zeros([ROWS, COLUMNS], tl.float64 if WIDE else tl.float32)
    a1, a2, a3 = a0, a0, a0
    o0, o1, o2, o3 = a0, a0, a0, a0

    for term in range(num_terms):
        scale, old_scale = tl.load(scale_ptr + term * 3), tl.load(scale_ptr + term * 3 + 1)
        gain = tl.load(scale_ptr + term * 3 + 2).to(tl.float32)
        if KIND == 0:
            k0, k1 = tl.load(counter_ptr + term * 4).to(tl.uint32), tl.load(counter_ptr + term * 4 + 1).to(tl.uint32)
            step = tl.load(counter_ptr + term * 4 + 2).to(tl.uint32)
            index = tl.load(counter_ptr + term * 4 + 3).to(tl.uint32)
            if not ALIGNED:
                z0, z1 = noise_at(p0, step, index, k0, k1, LAW), noise_at(p1, step, index, k0, k1, LAW)
                z2, z3 = noise_at(p2, step, index, k0, k1, LAW), noise_at(p3, step, index, k0, k1, LAW)
            elif LAW == 0:
                block = (tile + start - lead) // 128 + row
                w0, w1, w2, w3 = philox_words(block, step, index, k0, k1)
                z0, z1, z2, z3 = sign_of(w0, column), sign_of(w1, column), sign_of(w2, column), sign_of(w3, column)
            else:
                block = (tile + start - lead) // 4 + row * COLUMNS + column
                z0, z1, z2, z3 = block_values(block, step, index, k0, k1, LAW)
        else:
            which = tile * 0 + term  # 64-bit, since it multiplies sizes
            z0 = stored_term(p0, i0, first_ptr, second_ptr, which, numel, rank, columns, KIND)
            z1 = stored_term(p1, i1, first_ptr, second_ptr, which, numel, rank, columns, KIND)
            z2 = stored_term(p2, i2, first_ptr, second_ptr, which, numel, rank, columns, KIND)
            z3 = stored_term(p3, i3, first_ptr, second_ptr, which, numel, rank, columns, KIND)
        z0, z1 = finish_values(z0, l0, i0, gain, mask_ptr, MASKED), finish_values(z1, l1, i1, gain, mask_ptr, MASKED)
        z2, z3 = finish_values(z2, l2, i2, gain, mask_ptr, MASKED), finish_values(z3, l3, i3, gain, mask_ptr, MASKED)
        if RULE >= 2:
            s = old_scale.to(o0.dtype)
            o0, o1, o2, o3 = o0 + s * z0, o1 + s * z1, o2 + s * z2, o3 + s * z3
        s = scale.to(a0.dtype)
        a0, a1, a2, a3 = a0 + s * z0, a1 + s * z1, a2 + s * z2, a3 + s * z3

    v0 = store(x_ptr, l0, p0, i0, a0, o0, job_ptr, round_ptr, RULE, DECAYED, DROP, HALF)
    v1 = store(x_ptr, l1, p1, i1, a1, o1, job_ptr, round_ptr, RULE, DECAYED, DROP, HALF)
    v2 = store(x_ptr, l2, p2, i2, a2, o2, job_ptr, round_ptr, RULE, DECAYED, DROP, HALF)
    v3 = store(x_ptr, l3, p3, i3, a3, o3, job_ptr, round_ptr, RULE, DECAYED, DROP, HALF)
    if RULE >= 2:
        peak = tl.max(tl.max(tl.maximum(tl.maximum(v0, v1), tl.maximum(v2, v3)), axis=1), axis=0)
        tl.store(peak_ptr + tl.program_id(0), peak)
