"""Compiled sweeps of the CPU backend: generate a tile of every term, combine it with the weights, store.

Legend: a *tile* is TILE consecutive positions starting at a multiple of GROUP; ``z``, ``acc`` and ``words`` are scratch
arrays of one tile that stay in cache.  Tables are read by field name; ``backend`` fills them.
"""

from __future__ import annotations

import numpy as np

from zokernel.directions.backends.gaussian_math import BITS_PER_BLOCK, GROUP, PLANE
from zokernel.directions.backends.numba.math import (
    SIGNS,
    carray,
    compiled,
    fill_words,
    from_bfloat16,
    from_float16,
    inlined,
    normal_pair,
    philox_block,
    pointer_to,
    stochastic_bits,
    store_signs,
    to_bfloat16,
    to_float16,
    uniform,
)
from zokernel.directions.backends.numba.threads import ORDER, rows_of, table, take_share
from zokernel.directions.backends.tables import BFLOAT16, FLOAT32, FLOAT64, JOB, SEGMENT, TERM
from zokernel.directions.terms import Rule

TILE = 8 * GROUP
BLOCKS = TILE // 4

NEAREST, STOCHASTIC, GRID_MOVE, GRID_COMMIT = (int(rule) for rule in Rule)

_ONE = np.float32(1)
_BYTES = np.uint64(4 * SIGNS)
_U3, _U7 = np.uint64(3), np.uint64(7)
_TO_UNIT = 2.0**-32
GATHER, SCATTER = np.uint64(0), np.uint64(1)  # typed: for a plain constant every function is compiled once per value


@compiled
def fill_noise(z, words, distribution, base, count, step, index, key0, key1):
    """Write noise at positions ``base`` to ``base + count`` into ``z``, rounded up to whole groups."""
    if distribution == 0:
        address = np.uint64(z.ctypes.data)
        for b in range((count + BITS_PER_BLOCK - 1) // BITS_PER_BLOCK):
            w0, w1, w2, w3 = philox_block(np.uint64(base // BITS_PER_BLOCK + b), step, index, key0, key1)
            store_signs(address, np.uint32(w0), _ONE)
            store_signs(address + _BYTES, np.uint32(w1), _ONE)
            store_signs(address + _BYTES + _BYTES, np.uint32(w2), _ONE)
            store_signs(address + _BYTES + _BYTES + _BYTES, np.uint32(w3), _ONE)
            address += np.uint64(4 * BITS_PER_BLOCK)
        return
    groups = (count + GROUP - 1) // GROUP
    fill_words(words, np.uint64(base // 4), groups * PLANE, step, index, key0, key1)
    for g in range(groups):
        # Slices, so that indices are plainly in range and the loops below vectorize.
        begin, end = g * PLANE, (g + 1) * PLANE
        w0, w1, w2, w3 = words[0][begin:end], words[1][begin:end], words[2][begin:end], words[3][begin:end]
        group = z[g * GROUP : (g + 1) * GROUP]
        z0, z1, z2, z3 = group[:PLANE], group[PLANE : 2 * PLANE], group[2 * PLANE : 3 * PLANE], group[3 * PLANE :]
        if distribution == 1:
            for j in range(PLANE):
                z0[j], z1[j] = normal_pair(w0[j], w1[j])
            for j in range(PLANE):
                z2[j], z3[j] = normal_pair(w2[j], w3[j])
        else:
            for j in range(PLANE):
                z0[j], z1[j], z2[j], z3[j] = uniform(w0[j]), uniform(w1[j]), uniform(w2[j]), uniform(w3[j])


@compiled
def fill_product(out, low, term):
    """Write the entries of left @ right from row-major position ``low`` on into ``out``."""
    rank, columns = term.rank, term.columns
    right = carray(pointer_to(term.second, np.float32), rank * columns)
    done = 0
    while done < out.size:
        row, column = (low + done) // columns, (low + done) % columns
        n = min(columns - column, out.size - done)
        left = carray(pointer_to(term.first + np.uint64(4 * row * rank), np.float32), rank)
        part = out[done : done + n]
        part[:] = np.float32(0)
        for k in range(rank):
            accumulate(part, right[k * columns + column : k * columns + column + n], left[k])
        done += n


@compiled
def fill_term(z, words, term, base, low, high, local):
    """Write one term at positions ``low`` to ``high`` into ``z``, which starts at position ``base``."""
    out = z[low - base : high - base]
    if term.kind == 0:
        fill_noise(z, words, term.distribution, base, high - base, term.step, term.index, term.key0, term.key1)
        if term.first != 0:
            apply_mask(out, carray(pointer_to(term.first, np.uint8), (local + out.size + 7) // 8), local)
    elif term.kind == 1:
        fill_product(out, low, term)
    else:
        copy(out, carray(pointer_to(term.first + np.uint64(4 * low), np.float32), out.size))
    gain = np.float32(term.gain)
    if gain != _ONE:
        for j in range(out.size):
            out[j] *= gain


@compiled
def copy(out, source):
    """Copy ``source`` into ``out``.  Assigning a slice would compile its error message too, for seconds."""
    for j in range(out.size):
        out[j] = source[j]


@compiled
def apply_mask(out, mask, local):
    """Zero the elements of ``out`` whose bit of ``mask`` is clear; ``local`` is the bit of the first."""
    for j in range(out.size):
        at = np.uint64(local + j)
        bit = np.uint8(mask[at >> _U3] >> np.uint8(at & _U7)) & np.uint8(1)
        out[j] *= np.float32(bit)


@compiled
def accumulate(acc, z, scale):
    """Add ``scale * z`` to ``acc``, in the precision of ``acc``."""
    for j in range(acc.size):
        acc[j] += scale * z[j]


@inlined
def affine(x, keep, shift, acc):
    """Return ``keep x + (shift x + acc)``; a weight without decay is not multiplied at all."""
    if shift == 0 and keep == 1:
        return x + acc
    return keep * x + (shift * x + acc)


@compiled
def store_nearest(x, code, keep, shift, acc):
    """Store the affine update of weights (bfloat16 and float16 as uint16), rounded to nearest."""
    if code == BFLOAT16:
        for j in range(acc.size):
            x[j] = to_bfloat16(affine(from_bfloat16(x[j]), keep, shift, acc[j]))
    else:
        for j in range(acc.size):
            x[j] = to_float16(affine(from_float16(x[j]), keep, shift, acc[j]))


@compiled
def store_float(x, keep, shift, acc):
    """Store the affine update of float32 or float64 weights."""
    for j in range(acc.size):
        x[j] = affine(x[j], keep, shift, acc[j])


@compiled
def store_stochastic(x, half, code, keep, shift, acc, random):
    """Store the affine update, rounded stochastically: float32 weights are ``x``, 16-bit ones ``half``."""
    if code == FLOAT32:
        for j in range(acc.size):
            y = affine(np.float64(x[j]), keep, shift, acc[j])
            x[j] = np.float32(stochastic_bits(y, random[j], 29))
    elif code == BFLOAT16:
        for j in range(acc.size):
            y = affine(np.float64(from_bfloat16(half[j])), keep, shift, acc[j])
            half[j] = to_bfloat16(np.float32(stochastic_bits(y, random[j], 45)))
    else:
        for j in range(acc.size):
            y = affine(np.float64(from_float16(half[j])), keep, shift, acc[j])
            # Below 2^-14 float16 has a fixed unit of 2^-24.
            fixed = np.floor(y * 2.0**24 + np.float64(random[j]) * _TO_UNIT) * 2.0**-24
            rounded = fixed if abs(y) < 2.0**-14 else stochastic_bits(y, random[j], 42)
            half[j] = to_float16(np.float32(rounded))


@compiled
def store_grid(x, job, acc, old, random):
    """Move float32 weights along their grid; return the largest magnitude reached."""
    grid, per_grid = np.float32(job.grid), np.float32(1.0 / job.grid)
    grid64, per_grid64 = job.grid, 1.0 / job.grid  # a power of two: multiplying by the inverse is exact
    if job.rule == GRID_COMMIT:
        for j in range(acc.size):
            theta = x[j] - np.float32(np.rint(old[j] * per_grid)) * grid
            change = np.float64(theta) * job.decay_minus_one + np.float64(acc[j])
            floor = np.floor(change * per_grid64 + np.float64(random[j]) * _TO_UNIT)
            x[j] = theta + np.float32(floor * grid64)
    else:
        for j in range(acc.size):
            before = np.float32(np.rint(old[j] * per_grid)) * grid
            x[j] += np.float32(np.rint(acc[j] * per_grid)) * grid - before
    peak = np.float32(0)
    for j in range(acc.size):
        peak = max(peak, abs(x[j]))
    return peak


@compiled
def rounding_words(out, words, base, count, job):
    """Write one random word per element into ``out``, positions ``base`` to ``base + count``."""
    groups = (count + GROUP - 1) // GROUP
    fill_words(words, np.uint64(base // 4), groups * PLANE, job.step, job.index, job.key0, job.key1)
    for g in range(groups):
        for k in range(4):
            begin = g * GROUP + k * PLANE
            copy(out[begin : begin + PLANE], words[k][g * PLANE : (g + 1) * PLANE])


@compiled
def move(scratch, address, width, n, stride, way):
    """Copy ``n`` strided elements of ``width`` bytes to contiguous scratch memory (GATHER), or back (SCATTER)."""
    if width == 2:
        half, half_scratch = carray(pointer_to(address, np.uint16), 1 + (n - 1) * stride), scratch.view(np.uint16)
        _exchange(half, half_scratch, n, stride, way)
    elif width == 4:
        single, single_scratch = carray(pointer_to(address, np.uint32), 1 + (n - 1) * stride), scratch.view(np.uint32)
        _exchange(single, single_scratch, n, stride, way)
    else:
        _exchange(carray(pointer_to(address, np.uint64), 1 + (n - 1) * stride), scratch, n, stride, way)


@compiled
def _exchange(memory, scratch, n, stride, way):
    for j in range(n):
        if way == SCATTER:
            memory[j * stride] = scratch[j]
        else:
            scratch[j] = memory[j * stride]


@compiled
def run_segments(segments, chosen, jobs, terms, peaks):
    """Carry out the chosen segments of a sweep: any dtype, distribution, kind of term and rule."""
    words = np.empty((4, BLOCKS), np.uint32)
    z, acc, old = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    wide, random, scratch = np.empty(TILE, np.float64), np.empty(TILE, np.uint32), np.empty(TILE, np.uint64)
    for number in chosen:
        segment = segments[number]
        job = jobs[segment.job]
        code, rule, width = job.dtype, job.rule, 4 if job.dtype == FLOAT32 else 8 if job.dtype == FLOAT64 else 2
        double = code == FLOAT64 or rule == STOCHASTIC
        start, end = segment.position, segment.position + segment.length
        base = start - start % GROUP
        while base < end:
            low, high = max(start, base), min(end, base + TILE)
            shift, n = low - base, high - low
            sum32, sum64, sum_old, bits = acc[:n], wide[:n], old[:n], random[shift : shift + n]
            sum32[:] = np.float32(0)
            if double:
                sum64[:] = 0.0
            if rule >= GRID_MOVE:
                sum_old[:] = np.float32(0)
            for t in range(job.first, job.last):
                term = terms[t]
                fill_term(z, words, term, base, low, high, segment.local + low - start)
                if double:
                    accumulate(sum64, z[shift : shift + n], term.scale)
                else:
                    accumulate(sum32, z[shift : shift + n], np.float32(term.scale))
                if rule >= GRID_MOVE:
                    accumulate(sum_old, z[shift : shift + n], np.float32(term.old_scale))
            if (rule == STOCHASTIC and code != FLOAT64) or rule == GRID_COMMIT:
                rounding_words(random, words, base, high - base, job)

            address = segment.address + np.uint64((low - start) * segment.stride * width)
            place = address
            if segment.stride != 1:
                move(scratch, address, width, n, segment.stride, GATHER)
                place = np.uint64(scratch.ctypes.data)
            x, half = carray(pointer_to(place, np.float32), n), carray(pointer_to(place, np.uint16), n)
            if code == FLOAT64:
                store_float(carray(pointer_to(place, np.float64), n), job.keep, job.shift, sum64)
            elif rule == STOCHASTIC:
                store_stochastic(x, half, code, job.keep, job.shift, sum64, bits)
            elif rule >= GRID_MOVE:
                peaks[number] = max(peaks[number], store_grid(x, job, sum32, sum_old, bits))
            elif code == FLOAT32:
                store_float(x, np.float32(job.keep), np.float32(job.shift), sum32)
            else:
                store_nearest(half, code, np.float32(job.keep), np.float32(job.shift), sum32)
            if segment.stride != 1:
                move(scratch, address, width, n, segment.stride, SCATTER)
            base += TILE


def run_segments_loop(address):
    """Call :func:`run_segments` for shares of an order until none is left."""
    order = table(address, ORDER, 1)[0]
    segments, jobs = table(order.segments, SEGMENT, order.num_rows), table(order.jobs, JOB, order.num_rows)
    terms, peaks = table(order.terms, TERM, order.num_rows), table(order.results, np.float32, order.num_rows)
    share = take_share(address)
    while share < order.num_shares:
        run_segments(segments, rows_of(order, share), jobs, terms, peaks)
        share = take_share(address)


@compiled
def squared_norms(segments, chosen, terms, norms):
    """Write into ``norms`` the squared norm of the noise on each chosen segment."""
    words, z = np.empty((4, BLOCKS), np.uint32), np.empty(TILE, np.float32)
    lanes = np.empty(PLANE)
    for number in chosen:
        segment = segments[number]
        term = terms[segment.job]
        base, end = segment.position, segment.position + segment.length
        lanes[:] = 0.0
        while base < end:
            count = min(TILE, end - base)
            fill_noise(z, words, term.distribution, base, count, term.step, term.index, term.key0, term.key1)
            z[count:] = np.float32(0)
            for g in range(TILE // PLANE):
                for j in range(PLANE):
                    lanes[j] += np.float64(z[g * PLANE + j]) * np.float64(z[g * PLANE + j])
            base += TILE
        norms[number] = lanes.sum()


def squared_norms_loop(address):
    """Call :func:`squared_norms` for shares of an order until none is left."""
    order = table(address, ORDER, 1)[0]
    segments, terms = table(order.segments, SEGMENT, order.num_rows), table(order.terms, TERM, order.num_rows)
    norms = table(order.results, np.float64, order.num_rows)
    share = take_share(address)
    while share < order.num_shares:
        squared_norms(segments, rows_of(order, share), terms, norms)
        share = take_share(address)
