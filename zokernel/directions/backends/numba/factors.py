"""Compiled sweeps of one low-rank direction over float32 weights, in place or into a copy.

Two passes over a strip that stays in cache: the product of the factors, then the weights.  The loop in ``kernels``,
which serves all kinds of terms, gives the same bits.
"""

from __future__ import annotations

import numpy as np

from zokernel.directions.backends.numba.kernels import affine
from zokernel.directions.backends.numba.math import carray, compiled, inlined, pointer_to, to_bfloat16
from zokernel.directions.backends.numba.threads import ORDER, rows_of, table, take_share
from zokernel.directions.backends.tables import JOB, SEGMENT, TERM

STRIP = 2048
_ZERO, _ONE = np.float32(0), np.float32(1)


@inlined
def floats(address, first, count):
    """Return ``count`` float32 numbers from the ``first`` after an address on."""
    return carray(pointer_to(address + np.uint64(4 * first), np.float32), count)


@compiled
def write_product(z, left, right, columns, column):
    """Write one row of left @ right, from ``column`` on, two ranks per pass, added up in the order of the ranks."""
    rank, n = left.size, z.size
    for k in range(0, rank, 2):
        a, row = left[k], right[k * columns + column : k * columns + column + n]
        if k + 1 == rank:
            for j in range(n):
                z[j] = (z[j] if k else _ZERO) + a * row[j]
            continue
        b, next_row = left[k + 1], right[(k + 1) * columns + column : (k + 1) * columns + column + n]
        if k:
            for j in range(n):
                z[j] = (z[j] + a * row[j]) + b * next_row[j]
        else:
            for j in range(n):
                z[j] = (_ZERO + a * row[j]) + b * next_row[j]


@compiled
def move_factors(segments, chosen, jobs, terms, targets, half):
    """Write contiguous float32 weights plus one low-rank direction to the addresses in ``targets``, maybe their own."""
    scratch = np.empty(STRIP, np.float32)
    for number in chosen:
        segment = segments[number]
        job = jobs[segment.job]
        term, shift = terms[job.first], np.float32(job.shift)
        scale, gain = np.float32(term.scale), np.float32(term.gain)
        rank, columns = term.rank, term.columns
        right = floats(term.second, 0, rank * columns)
        done = 0
        while done < segment.length:
            row, column = (segment.position + done) // columns, (segment.position + done) % columns
            n = min(columns - column, segment.length - done, STRIP)
            z, x = scratch[:n], floats(segment.address, done, n)
            write_product(z, floats(term.first, row * rank, rank), right, columns, column)
            if half:
                y = carray(pointer_to(targets[number] + np.uint64(2 * done), np.uint16), n)
                for j in range(n):
                    y[j] = to_bfloat16(affine(x[j], _ONE, shift, _ZERO + scale * (z[j] * gain)))
            else:
                out = floats(targets[number], done, n)
                for j in range(n):
                    out[j] = affine(x[j], _ONE, shift, _ZERO + scale * (z[j] * gain))
            done += n


def move_factors_loop(address):
    """Call :func:`move_factors` for shares of an order until none is left."""
    order = table(address, ORDER, 1)[0]
    segments, jobs = table(order.segments, SEGMENT, order.num_rows), table(order.jobs, JOB, order.num_rows)
    terms, targets = table(order.terms, TERM, order.num_rows), table(order.targets, np.uint64, order.num_rows)
    half, share = order.half != np.uint64(0), take_share(address)
    while share < order.num_shares:
        move_factors(segments, rows_of(order, share), jobs, terms, targets, half)
        share = take_share(address)
