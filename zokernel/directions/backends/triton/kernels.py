"""Triton sweep of many tensors: generate a tile of every term, combine it with the weights, store.

Legend: a program takes one segment (``tables.SEGMENT``), tile by tile; a tile starts at a multiple of 256 positions and
has 4 planes of shape (ROWS, COLUMNS).  Plane k of row r holds positions ``(r * 4 + k) * COLUMNS + column`` of the tile,
which is how a Philox block's four words are laid out (COLUMNS is 32 bits of one word for Rademacher, 64 blocks for the
other distributions).  ``n`` counts elements from the segment's first, ``p`` is their position in the whole tensor.
"""

# Triton reads argument names and literals at compile time; annotations other than constexpr would be evaluated.
import triton
import triton.language as tl

from zokernel.directions import philox
from zokernel.directions.backends import gaussian_math as gm
from zokernel.directions.backends.tables import JOB, SEGMENT, TERM, columns_of

M0, M1 = tl.constexpr(philox.MULTIPLIER_0), tl.constexpr(philox.MULTIPLIER_1)
W0, W1 = tl.constexpr(philox.WEYL_0), tl.constexpr(philox.WEYL_1)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(c) for c in gm.LOG_COEFFICIENTS)
S0, S1, S2 = (tl.constexpr(c) for c in gm.SIN_COEFFICIENTS)
C0, C1, C2 = (tl.constexpr(c) for c in gm.COS_COEFFICIENTS)
LOG_2, ANGLE_UNIT = tl.constexpr(gm.LOG_2), tl.constexpr(gm.ANGLE_UNIT)
HALF_UNIT, UNIFORM_SCALE = tl.constexpr(gm.UNIFORM_UNIT), tl.constexpr(gm.UNIFORM_SCALE)
SQRT_HALF_BITS = tl.constexpr(gm.SQRT_HALF_BITS)
ROUNDS = tl.constexpr(philox.ROUNDS)
GROUP, PLANE, BITS_PER_BLOCK = tl.constexpr(gm.GROUP), tl.constexpr(gm.PLANE), tl.constexpr(gm.BITS_PER_BLOCK)

SIGN_COLUMNS, WORD_COLUMNS = 32, gm.PLANE

# Tables are read as int64, by column.
SEGMENT_FIELDS, JOB_FIELDS, TERM_FIELDS = (tl.constexpr(len(columns_of(table))) for table in (SEGMENT, JOB, TERM))
S_JOB, S_ADDRESS, S_POSITION, S_LENGTH, S_STRIDE, S_LOCAL = (
    tl.constexpr(columns_of(SEGMENT)[name]) for name in ("job", "address", "position", "length", "stride", "local")
)
J_FIRST, J_LAST, J_KEEP, J_SHIFT, J_DECAY, J_GRID, J_KEY0, J_KEY1, J_STEP, J_INDEX = (
    tl.constexpr(columns_of(JOB)[name])
    for name in ("first", "last", "keep", "shift", "decay_minus_one", "grid", "key0", "key1", "step", "index")
)
T_KEY0, T_KEY1, T_STEP, T_INDEX, T_FIRST, T_SECOND, T_RANK, T_COLUMNS, T_GAIN, T_SCALE, T_OLD = (
    tl.constexpr(columns_of(TERM)[name])
    for name in ("key0", "key1", "step", "index", "first", "second", "rank", "columns", "gain", "scale", "old_scale")
)


@triton.jit
def philox_words(block, step, index, k0, k1):
    """Four uint32 words for each int64 block number."""
    c0 = (block & 0xFFFFFFFF).to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + step, tl.zeros_like(c0) + index
    for _ in tl.static_range(ROUNDS):
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
def block_values(block, step, index, k0, k1, DISTRIBUTION: tl.constexpr):
    """The four float32 values (Gaussian, uniform) that each block's words give."""
    w0, w1, w2, w3 = philox_words(block, step, index, k0, k1)
    if DISTRIBUTION == 1:
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
def word_at(position, step, index, k0, k1):
    """The random word that rounds each position."""
    w0, w1, w2, w3 = philox_words(position // GROUP * PLANE + position % PLANE, step, index, k0, k1)
    return pick(position // PLANE % 4, w0, w1, w2, w3)


@triton.jit
def real(ptr):
    """A float64 kept in an int64 table."""
    return tl.load(ptr).to(tl.float64, bitcast=True)


@triton.jit
def word(ptr):
    """A 32-bit word kept in an int64 table."""
    return tl.load(ptr).to(tl.uint32)


@triton.jit
def finish_values(z, n, inside, local, term, MASKED: tl.constexpr):
    """Apply mask and gain."""
    if MASKED:
        mask_ptr, bit = tl.load(term + T_FIRST).to(tl.pointer_type(tl.uint8)), local + n
        byte = tl.load(mask_ptr + (bit >> 3), mask=inside, other=0).to(tl.int32)
        z = z * ((byte >> (bit & 7).to(tl.int32)) & 1).to(tl.float32)
    return z * real(term + T_GAIN).to(tl.float32)


@triton.jit
def stored_values(p, inside, term, KIND: tl.constexpr):
    """Entries of left @ right (KIND 1) or given values (KIND 2) at each position."""
    first = tl.load(term + T_FIRST).to(tl.pointer_type(tl.float32))
    if KIND == 1:
        second = tl.load(term + T_SECOND).to(tl.pointer_type(tl.float32))
        rank, columns = tl.load(term + T_RANK), tl.load(term + T_COLUMNS)
        row, column = p // columns, p % columns
        z = tl.zeros(p.shape, tl.float32)
        for k in range(rank):
            a = tl.load(first + row * rank + k, mask=inside, other=0.0)
            z += a * tl.load(second + k * columns + column, mask=inside, other=0.0)
    else:
        z = tl.load(first + p, mask=inside, other=0.0)
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
    result = tl.where(x == x, rounded, 0x7FC0)
    return result.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to(value, TYPE: tl.constexpr):
    """Round to nearest in the type of weights or of their copies."""
    return to_bfloat16(value.to(tl.float32)) if TYPE is tl.bfloat16 else value.to(TYPE)


@triton.jit
def store(
    x_ptr, y_ptr, x_stride, y_stride, n, p, inside, acc, old, job,
    RULE: tl.constexpr, DECAYED: tl.constexpr, DROP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Combine one plane with its weights, store it and return the new values' magnitudes (zero outside)."""
    x = tl.load(x_ptr + n * x_stride, mask=inside, other=0.0)
    precision = acc.dtype
    if RULE >= 1 and DROP > 0:
        random = word_at(p, word(job + J_STEP), word(job + J_INDEX), word(job + J_KEY0), word(job + J_KEY1))
    if RULE <= 1:
        value = x.to(precision)
        if DECAYED:
            keep, shift = real(job + J_KEEP).to(precision), real(job + J_SHIFT).to(precision)
            value = keep * value + (shift * value + acc)
        else:
            value = value + acc
        if RULE == 1 and DROP > 0:
            value = round_stochastically(value, random, DROP, HALF).to(tl.float32)
        new = round_to(value, x.dtype)
    else:
        grid = real(job + J_GRID)
        per_grid, grid32 = (1.0 / grid).to(tl.float32), grid.to(tl.float32)
        before = rint(old * per_grid) * grid32
        if RULE == 2:
            new = x + (rint(acc * per_grid) * grid32 - before)
        else:
            theta = x - before
            change = theta.to(tl.float64) * real(job + J_DECAY) + acc.to(tl.float64)
            steps = tl.floor(change / grid + random.to(tl.float64) * 2.3283064365386963e-10)
            new = theta + (steps * grid).to(tl.float32)
    tl.store(y_ptr + n * y_stride, round_to(new, y_ptr.dtype.element_ty), mask=inside)
    return tl.where(inside, tl.abs(new.to(tl.float32)), 0.0)


@triton.jit
def sweep_kernel(
    segment_ptr, job_ptr, term_ptr, target_ptr, peak_ptr,
    TYPE: tl.constexpr, TARGET: tl.constexpr, WHOLE: tl.constexpr,
    KIND: tl.constexpr, DISTRIBUTION: tl.constexpr, MASKED: tl.constexpr, RULE: tl.constexpr, DECAYED: tl.constexpr,
    WIDE: tl.constexpr, DROP: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add every term to one segment; ``launch`` explains the constants."""
    segment = segment_ptr + tl.program_id(0).to(tl.int64) * SEGMENT_FIELDS
    number, position = tl.load(segment + S_JOB), tl.load(segment + S_POSITION)
    length, local = tl.load(segment + S_LENGTH).to(tl.int32), tl.load(segment + S_LOCAL)
    job = job_ptr + number * JOB_FIELDS
    x_ptr = tl.load(segment + S_ADDRESS).to(tl.pointer_type(TYPE))
    if TARGET is None:
        y_ptr = x_ptr
    else:
        y_ptr = tl.load(target_ptr + tl.program_id(0)).to(tl.pointer_type(TARGET))
    if WHOLE:  # segments begin with a block, and lie where 16 bytes can be moved at once
        x_ptr, y_ptr, length = tl.multiple_of(x_ptr, 16), tl.multiple_of(y_ptr, 16), tl.multiple_of(length, 16)
        lead, x_stride = 0, 1
    else:
        lead, x_stride = (position % GROUP).to(tl.int32), tl.load(segment + S_STRIDE)
    y_stride = x_stride if TARGET is None else 1
    first, last = tl.load(job + J_FIRST), tl.load(job + J_LAST)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    peak = tl.zeros([ROWS, COLUMNS], tl.float32)

    for begin in range(0, length + lead, ROWS * 4 * COLUMNS):
        n0 = row * (4 * COLUMNS) + column + (begin - lead)
        n1, n2, n3 = n0 + COLUMNS, n0 + 2 * COLUMNS, n0 + 3 * COLUMNS
        i0, i1 = (n0 >= 0) & (n0 < length), (n1 >= 0) & (n1 < length)
        i2, i3 = (n2 >= 0) & (n2 < length), (n3 >= 0) & (n3 < length)
        p0, p1, p2, p3 = position + n0, position + n1, position + n2, position + n3
        a0 = tl.zeros([ROWS, COLUMNS], tl.float64 if WIDE else tl.float32)
        a1, a2, a3 = a0, a0, a0
        o0, o1, o2, o3 = a0, a0, a0, a0
        for which in range(first, last):
            term = term_ptr + which * TERM_FIELDS
            if KIND == 0:
                k0, k1 = word(term + T_KEY0), word(term + T_KEY1)
                step, index = word(term + T_STEP), word(term + T_INDEX)
                start = position + (begin - lead)
                if DISTRIBUTION == 0:
                    w0, w1, w2, w3 = philox_words(start // BITS_PER_BLOCK + row, step, index, k0, k1)
                    z0, z1, z2, z3 = sign_of(w0, column), sign_of(w1, column), sign_of(w2, column), sign_of(w3, column)
                else:
                    z0, z1, z2, z3 = block_values(
                        start // 4 + row * COLUMNS + column, step, index, k0, k1, DISTRIBUTION
                    )
            else:
                z0, z1 = stored_values(p0, i0, term, KIND), stored_values(p1, i1, term, KIND)
                z2, z3 = stored_values(p2, i2, term, KIND), stored_values(p3, i3, term, KIND)
            z0, z1 = finish_values(z0, n0, i0, local, term, MASKED), finish_values(z1, n1, i1, local, term, MASKED)
            z2, z3 = finish_values(z2, n2, i2, local, term, MASKED), finish_values(z3, n3, i3, local, term, MASKED)
            if RULE >= 2:
                s = real(term + T_OLD).to(o0.dtype)
                o0, o1, o2, o3 = o0 + s * z0, o1 + s * z1, o2 + s * z2, o3 + s * z3
            s = real(term + T_SCALE).to(a0.dtype)
            a0, a1, a2, a3 = a0 + s * z0, a1 + s * z1, a2 + s * z2, a3 + s * z3

        v0 = store(x_ptr, y_ptr, x_stride, y_stride, n0, p0, i0, a0, o0, job, RULE, DECAYED, DROP, HALF)
        v1 = store(x_ptr, y_ptr, x_stride, y_stride, n1, p1, i1, a1, o1, job, RULE, DECAYED, DROP, HALF)
        v2 = store(x_ptr, y_ptr, x_stride, y_stride, n2, p2, i2, a2, o2, job, RULE, DECAYED, DROP, HALF)
        v3 = store(x_ptr, y_ptr, x_stride, y_stride, n3, p3, i3, a3, o3, job, RULE, DECAYED, DROP, HALF)
        peak = tl.maximum(peak, tl.maximum(tl.maximum(v0, v1), tl.maximum(v2, v3)))
    if RULE >= 2:
        tl.store(peak_ptr + tl.program_id(0), tl.max(tl.max(peak, axis=1), axis=0))


@triton.jit
def squares_kernel(
    segment_ptr, term_ptr, sum_ptr, DISTRIBUTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum the squares of a tensor's noise (its one term) over one segment, in float64."""
    segment = segment_ptr + tl.program_id(0).to(tl.int64) * SEGMENT_FIELDS
    position, length = tl.load(segment + S_POSITION), tl.load(segment + S_LENGTH).to(tl.int32)
    term = term_ptr + tl.load(segment + S_JOB) * TERM_FIELDS
    k0, k1, step, index = word(term + T_KEY0), word(term + T_KEY1), word(term + T_STEP), word(term + T_INDEX)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, length, ROWS * 4 * COLUMNS):
        n0 = row * (4 * COLUMNS) + column + begin
        if DISTRIBUTION == 0:
            total += (n0 < length).to(tl.float64) + (n0 + COLUMNS < length).to(tl.float64)
            total += (n0 + 2 * COLUMNS < length).to(tl.float64) + (n0 + 3 * COLUMNS < length).to(tl.float64)
        else:
            start = position + begin
            z0, z1, z2, z3 = block_values(start // 4 + row * COLUMNS + column, step, index, k0, k1, DISTRIBUTION)
            y0, y1, y2, y3 = z0.to(tl.float64), z1.to(tl.float64), z2.to(tl.float64), z3.to(tl.float64)
            total += tl.where(n0 < length, y0 * y0, 0.0) + tl.where(n0 + COLUMNS < length, y1 * y1, 0.0)
            total += tl.where(n0 + 2 * COLUMNS < length, y2 * y2, 0.0)
            total += tl.where(n0 + 3 * COLUMNS < length, y3 * y3, 0.0)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))
