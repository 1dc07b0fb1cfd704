"""Compiled sweeps of the CPU backend: generate a tile of every term, combine it with the weights, store.

Legend: a *tile* is TILE consecutive positions starting at a multiple of GROUP; ``z``, ``acc`` and ``words`` are scratch
arrays of one tile that stay in cache.  Tables are read by field name; ``numba_backend`` fills them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from zokernel.directions.gaussian_math import BITS_PER_BLOCK, GROUP, PLANE
from zokernel.directions.numba_math import (
    bitcast,
    carray,
    fill_words,
    from_bfloat16,
    from_float16,
    normal_pair,
    philox_block,
    pointer_to,
    sign_value,
    stochastic_bits,
    to_bfloat16,
    to_float16,
    uniform,
)

TILE = 8 * GROUP
BLOCKS = TILE // 4

_U8, _I8, _F8 = np.uint64, np.int64, np.float64


def _table(fields: dict[str, type]) -> np.dtype:
    return np.dtype(list(fields.items()))


JOB = _table(
    {
        **dict.fromkeys(("dtype", "rule", "first", "last"), _I8),
        **dict.fromkeys(("keep", "shift", "decay_minus_one", "grid"), _F8),
        **dict.fromkeys(("key0", "key1", "step", "index"), _U8),
    }
)
TERM = _table(
    {
        **dict.fromkeys(("kind", "law"), _I8),
        **dict.fromkeys(("key0", "key1", "step", "index", "first", "second"), _U8),
        **dict.fromkeys(("rank", "columns"), _I8),
        **dict.fromkeys(("gain", "scale", "old_scale"), _F8),
    }
)
SEGMENT = _table({"job": _I8, "address": _U8, **dict.fromkeys(("position", "length", "stride", "local"), _I8)})


_SIGN_SHIFT = np.uint32(31)
_ONE = np.uint32(1)
_TO_UNIT = 2.0**-32


@njit(cache=True, nogil=True)
def fill_noise(z, words, law, base, count, step, index, key0, key1):
    """Write a law's values at positions ``base`` to ``base + count`` into ``z``, rounded up to whole groups."""
    if law == 0:
        for b in range((count + BITS_PER_BLOCK - 1) // BITS_PER_BLOCK):
            block = philox_block(np.uint64(base // BITS_PER_BLOCK + b), step, index, key0, key1)
            for k in range(4):
                word = np.uint32(block[k])
                begin = b * BITS_PER_BLOCK + 32 * k
                for j in range(32):
                    z[begin + j] = sign_value(word, np.uint32(j))
        return
    groups = (count + GROUP - 1) // GROUP
    fill_words(words, np.uint64(base // 4), groups * PLANE, step, index, key0, key1)
    for g in range(groups):
        begin, plane = g * GROUP, g * PLANE
        if law == 1:
            for j in range(PLANE):
                first, second = normal_pair(words[0, plane + j], words[1, plane + j])
                third, fourth = normal_pair(words[2, plane + j], words[3, plane + j])
                z[begin + j] = first
                z[begin + PLANE + j] = second
                z[begin + 2 * PLANE + j] = third
                z[begin + 3 * PLANE + j] = fourth
        else:
            for k in range(4):
                for j in range(PLANE):
                    z[begin + k * PLANE + j] = uniform(words[k, plane + j])


@njit(cache=True, nogil=True)
def fill_product(z, low, high, shift, term):
    """Write entries ``low`` to ``high`` (row-major) of left @ right into ``z`` from ``shift`` on."""
    rank, columns = term.rank, term.columns
    right = carray(pointer_to(term.second, np.float32), rank * columns)
    at = low
    while at < high:
        row, column = at // columns, at % columns
        n = min(columns - column, high - at)
        begin = shift + at - low
        left = carray(pointer_to(term.first + np.uint64(4 * row * rank), np.float32), rank)
        out = z[begin : begin + n]
        out[:] = np.float32(0)
        for k in range(rank):
            factor = left[k]
            entries = right[k * columns + column : k * columns + column + n]
            for j in range(n):
                out[j] += factor * entries[j]
        at += n


@njit(cache=True, nogil=True)
def fill_term(z, words, term, base, low, high, local):
    """Write one term at positions ``low`` to ``high`` into ``z``, which starts at position ``base``."""
    shift, n = low - base, high - low
    if term.kind == 0:
        fill_noise(z, words, term.law, base, high - base, term.step, term.index, term.key0, term.key1)
        if term.first != 0:
            mask = carray(pointer_to(term.first, np.uint8), (local + n + 7) // 8)
            for j in range(n):
                bit = (mask[(local + j) >> 3] >> np.uint8((local + j) & 7)) & np.uint8(1)
                z[shift + j] *= np.float32(bit)
    elif term.kind == 1:
        fill_product(z, low, high, shift, term)
    else:
        values = carray(pointer_to(term.first, np.float32), high)
        for j in range(n):
            z[shift + j] = values[low + j]
    gain = np.float32(term.gain)
    if gain != np.float32(1):
        for j in range(shift, shift + n):
            z[j] *= gain


@njit(cache=True, nogil=True)
def accumulate(acc, z, scale, begin, end):
    """Add ``scale * z`` to ``acc``, in the precision of ``acc``."""
    for j in range(begin, end):
        acc[j] += scale * z[j]


@njit(cache=True, forceinline=True)
def affine(x, keep, shift, acc):
    """Return ``keep x + (shift x + acc)``; a weight without decay is not multiplied at all."""
    if shift == 0 and keep == 1:
        return x + acc
    return keep * x + (shift * x + acc)


@njit(cache=True, nogil=True)
def store_nearest(dtype, address, stride, n, keep, shift, acc):
    """Store the affine update of ``n`` float32 or 16-bit weights, rounded to nearest."""
    a, b = np.float32(keep), np.float32(shift)
    if dtype == 0:
        x = carray(pointer_to(address, np.float32), 1 + (n - 1) * stride)
        if stride == 1:
            for j in range(n):
                x[j] = affine(x[j], a, b, acc[j])
        else:
            for j in range(n):
                x[j * stride] = affine(x[j * stride], a, b, acc[j])
        return
    half = carray(pointer_to(address, np.uint16), 1 + (n - 1) * stride)
    if dtype == 2:
        for j in range(n):
            half[j * stride] = to_bfloat16(affine(from_bfloat16(half[j * stride]), a, b, acc[j]))
    else:
        for j in range(n):
            half[j * stride] = to_float16(affine(from_float16(half[j * stride]), a, b, acc[j]))


@njit(cache=True, nogil=True)
def store_double(address, stride, n, keep, shift, acc):
    """Store the affine update of ``n`` float64 weights."""
    x = carray(pointer_to(address, np.float64), 1 + (n - 1) * stride)
    for j in range(n):
        x[j * stride] = affine(x[j * stride], keep, shift, acc[j])


@njit(cache=True, nogil=True)
def store_stochastic(dtype, address, stride, n, keep, shift, acc, words):
    """Store the affine update of ``n`` weights of 16 or 32 bits, rounded stochastically."""
    if dtype == 0:
        x = carray(pointer_to(address, np.float32), 1 + (n - 1) * stride)
        for j in range(n):
            y = affine(np.float64(x[j * stride]), keep, shift, acc[j])
            x[j * stride] = np.float32(stochastic_bits(y, words[j], 29))
        return
    half = carray(pointer_to(address, np.uint16), 1 + (n - 1) * stride)
    if dtype == 2:
        for j in range(n):
            y = affine(np.float64(from_bfloat16(half[j * stride])), keep, shift, acc[j])
            half[j * stride] = to_bfloat16(np.float32(stochastic_bits(y, words[j], 45)))
    else:
        for j in range(n):
            y = affine(np.float64(from_float16(half[j * stride])), keep, shift, acc[j])
            # Below 2^-14 float16 has a fixed unit of 2^-24.
            fixed = np.floor(y * 2.0**24 + words[j] * _TO_UNIT) * 2.0**-24
            rounded = fixed if abs(y) < 2.0**-14 else stochastic_bits(y, words[j], 42)
            half[j * stride] = to_float16(np.float32(rounded))


@njit(cache=True, nogil=True)
def store_grid(address, stride, n, job, commit, acc, old, words):
    """Move ``n`` float32 weights along their grid; return the largest magnitude reached."""
    x = carray(pointer_to(address, np.float32), 1 + (n - 1) * stride)
    grid, per_grid = np.float32(job.grid), np.float32(1.0 / job.grid)
    peak = np.float32(0)
    for j in range(n):
        value = x[j * stride]
        before = np.float32(np.rint(old[j] * per_grid)) * grid
        if commit:
            theta = value - before
            change = np.float64(theta) * job.decay_minus_one + np.float64(acc[j])
            moved = theta + np.float32(np.floor(change / job.grid + words[j] * _TO_UNIT) * job.grid)
        else:
            moved = value + (np.float32(np.rint(acc[j] * per_grid)) * grid - before)
        x[j * stride] = moved
        peak = max(peak, abs(moved))
    return peak


@njit(cache=True, nogil=True)
def rounding_words(out, words, base, count, job):
    """Write one random word an element into ``out``, positions ``base`` to ``base + count``."""
    groups = (count + GROUP - 1) // GROUP
    fill_words(words, np.uint64(base // 4), groups * PLANE, job.step, job.index, job.key0, job.key1)
    for g in range(groups):
        for k in range(4):
            for j in range(PLANE):
                out[g * GROUP + k * PLANE + j] = words[k, g * PLANE + j]


@njit(cache=True, nogil=True)
def run_segments(segments, chosen, jobs, terms, peaks):
    """Carry out the chosen segments of a sweep: any dtype, law, kind of term and rule."""
    words = np.empty((4, BLOCKS), np.uint32)
    z, acc, old = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    wide, random = np.empty(TILE, np.float64), np.empty(TILE, np.uint32)
    widths = (4, 8, 2, 2)
    for number in chosen:
        segment = segments[number]
        job = jobs[segment.job]
        rule = job.rule
        double = job.dtype == 1 or rule == 1
        start, end = segment.position, segment.position + segment.length
        base = start - start % GROUP
        while base < end:
            low, high = max(start, base), min(end, base + TILE)
            shift, n = low - base, high - low
            acc[:] = np.float32(0)
            if double:
                wide[:] = 0.0
            if rule >= 2:
                old[:] = np.float32(0)
            for t in range(job.first, job.last):
                term = terms[t]
                fill_term(z, words, term, base, low, high, segment.local + low - start)
                if double:
                    accumulate(wide, z, term.scale, shift, shift + n)
                else:
                    accumulate(acc, z, np.float32(term.scale), shift, shift + n)
                if rule >= 2:
                    accumulate(old, z, np.float32(term.old_scale), shift, shift + n)
            address = segment.address + np.uint64((low - start) * segment.stride * widths[job.dtype])
            if (rule == 1 and job.dtype != 1) or rule == 3:
                rounding_words(random, words, base, high - base, job)
            if job.dtype == 1:
                store_double(address, segment.stride, n, job.keep, job.shift, wide[shift:])
            elif rule == 0:
                store_nearest(job.dtype, address, segment.stride, n, job.keep, job.shift, acc[shift:])
            elif rule == 1:
                store_stochastic(
                    job.dtype, address, segment.stride, n, job.keep, job.shift, wide[shift:], random[shift:]
                )
            else:
                peak = store_grid(address, segment.stride, n, job, rule == 3, acc[shift:], old[shift:], random[shift:])
                peaks[number] = max(peaks[number], peak)
            base += TILE


@njit(cache=True, forceinline=True)
def signed(word, bit, scale):
    """``scale`` with the sign of one random bit."""
    return bitcast(np.uint32(bitcast(scale, np.uint32) ^ np.uint32(np.uint32(word >> bit) << _SIGN_SHIFT)), np.float32)


@njit(cache=True, nogil=True)
def add_signs(segments, chosen, jobs, terms, peaks):
    """Add one Rademacher direction to contiguous float32 or 16-bit weights: a loop bound by memory alone."""
    for number in chosen:
        segment = segments[number]
        job = jobs[segment.job]
        term = terms[job.first]
        scale, shift = np.float32(term.scale), np.float32(job.shift)
        n, lead = segment.length, segment.position % BITS_PER_BLOCK
        first_block = segment.position // BITS_PER_BLOCK
        x = carray(pointer_to(segment.address, np.float32), n)
        half = carray(pointer_to(segment.address, np.uint16), n)
        for b in range((lead + n + BITS_PER_BLOCK - 1) // BITS_PER_BLOCK):
            block = philox_block(np.uint64(first_block + b), term.step, term.index, term.key0, term.key1)
            for k in range(4):
                word = np.uint32(block[k])
                begin = b * BITS_PER_BLOCK + 32 * k - lead
                if begin >= 0 and begin + 32 <= n:
                    if job.dtype == 0 and shift == 0:
                        for j in range(32):
                            x[begin + j] += signed(word, np.uint32(j), scale)
                        continue
                    if job.dtype == 2:
                        for j in range(32):
                            half[begin + j] = to_bfloat16(
                                affine(
                                    from_bfloat16(half[begin + j]),
                                    np.float32(1),
                                    shift,
                                    signed(word, np.uint32(j), scale),
                                )
                            )
                        continue
                for j in range(max(0, -begin), min(32, n - begin)):
                    change = signed(word, np.uint32(j), scale)
                    at = begin + j
                    if job.dtype == 0:
                        x[at] = affine(x[at], np.float32(1), shift, change)
                    elif job.dtype == 2:
                        half[at] = to_bfloat16(affine(from_bfloat16(half[at]), np.float32(1), shift, change))
                    else:
                        half[at] = to_float16(affine(from_float16(half[at]), np.float32(1), shift, change))


@njit(cache=True, nogil=True)
def squared_norm(parts, number, start, n, law, key0, key1, step, index):
    """Write into ``parts[number]`` the squared norm of a law's values at positions ``start`` to ``start + n``."""
    words, z = np.empty((4, BLOCKS), np.uint32), np.empty(TILE, np.float32)
    lanes = np.zeros(PLANE)
    base, end = start, start + n
    while base < end:
        count = min(TILE, end - base)
        fill_noise(z, words, law, base, count, step, index, key0, key1)
        z[count:] = np.float32(0)
        for g in range(TILE // PLANE):
            for j in range(PLANE):
                lanes[j] += np.float64(z[g * PLANE + j]) * np.float64(z[g * PLANE + j])
        base += TILE
    parts[number] = lanes.sum()
