"""Sweeps of Rademacher directions over float32 weights, compiled: bound by memory, or nearly so.

The sweeps of a MeZO step end here: :class:`PreparedSweep` keeps the tables of a sweep, which :func:`add_signs` reads.
A block of Philox gives the signs of BITS_PER_BLOCK positions, and each of its four words those of SIGNS.  The loop in
``kernels``, which serves all distributions, gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zokernel.directions.backends.gaussian_math import BITS_PER_BLOCK
from zokernel.directions.backends.numba.kernels import affine, run_segments_loop, store_float
from zokernel.directions.backends.numba.math import (
    SIGNS,
    add_signs_to,
    carray,
    compiled,
    copy_signs_to,
    copy_signs_to_bfloat16,
    fill_words,
    inlined,
    pointer_to,
    store_signs,
    to_bfloat16,
)
from zokernel.directions.backends.numba.threads import ORDER, carry_out, rows_of, table, take_share
from zokernel.directions.backends.tables import JOB, SEGMENT, TERM, geometry, job_tables, segment_table
from zokernel.directions.terms import Job

SEGMENT_LENGTH = 1 << 18
"""Elements of one stretch of memory that a thread works on."""
_ONE = np.float32(1)
_BYTES = np.uint64(4 * SIGNS)
BATCH = 16
"""Blocks of Philox that are computed side by side."""


class PreparedSweep:
    """A sweep of Rademacher directions over float32 weights, to be repeated with other directions and scales.

    The number of directions stays the same, and so does the place of the weights in memory.

    Args:
        jobs: One per tensor, with equally many terms; each adds nothing but plain signs.
        rows: Which row of the scales and shifts is each job's.
    """

    def __init__(self, jobs: Sequence[Job], rows: Sequence[int]):
        self._jobs, self._terms = job_tables(jobs)
        self._segments = segment_table(tuple(geometry(job.place) for job in jobs), SEGMENT_LENGTH)
        self._rows = np.array(rows, np.int64)
        contiguous = self._segments["stride"] == 1
        self._chosen = {run_segments_loop: np.flatnonzero(~contiguous), add_signs_loop: np.flatnonzero(contiguous)}

    def __call__(
        self,
        draws: Sequence[tuple[int, int]],
        scales: Sequence[Sequence[float]],
        shifts: Sequence[float],
        rounding: tuple[int, int] = (0, 0),
    ) -> None:
        r"""Compute :math:`x \leftarrow x + (shift\,x + \sum_i scale_i z_i)` for every weight.

        Args:
            draws: Step and index of each direction.
            scales: Its scales for each tensor, (tensors, directions).
            shifts: Factor on the old weights for each tensor, less one.
            rounding: Unused: signs are added to nearest.
        """
        # Copies, so that two threads can use the same tables.
        jobs, terms = self._jobs.copy(), self._terms.copy()
        jobs["shift"] = np.array(shifts)[self._rows]
        terms["scale"] = np.array(scales)[self._rows].ravel()
        terms["step"], terms["index"] = np.tile(np.array(draws, np.uint64).T, len(jobs))
        tables = {"jobs": jobs, "terms": terms, "results": np.zeros(len(self._segments), np.float32)}
        for loop, chosen in self._chosen.items():
            carry_out(loop, self._segments, chosen, tables)


@inlined
def blocks_of(segment):
    """Return the first block that a segment touches, how many it touches, and where in the first it begins."""
    lead = segment.position % BITS_PER_BLOCK
    count = (lead + segment.length + BITS_PER_BLOCK - 1) // BITS_PER_BLOCK
    return segment.position // BITS_PER_BLOCK, count, lead


@inlined
def add_word(address, word, scale, shift, first, last):
    """Add 32 signs times ``scale`` to float32 weights at ``address``, of which only ``first`` to ``last`` exist."""
    if first > 0 or last < SIGNS:
        for j in range(first, last):
            x = carray(pointer_to(address + np.uint64(4 * j), np.float32), 1)
            change = -scale if (word >> np.uint32(j)) & np.uint32(1) else scale
            x[0] = affine(x[0], _ONE, shift, change)
    elif shift == 0:
        add_signs_to(address, word, scale, None)
    else:
        add_signs_to(address, word, scale, shift)


@compiled
def add_signs(segments, chosen, jobs, terms):
    """Add Rademacher directions to contiguous float32 weights; a single one is bound by memory alone."""
    acc, words = np.empty(BATCH * BITS_PER_BLOCK, np.float32), np.empty((4, BATCH), np.uint32)
    for number in chosen:
        segment = segments[number]
        job = jobs[segment.job]
        shift = np.float32(job.shift)
        n = segment.length
        first_block, blocks, lead = blocks_of(segment)
        several = job.last - job.first > 1
        for batch in range(0, blocks, BATCH):
            count = min(BATCH, blocks - batch)
            begin = batch * BITS_PER_BLOCK - lead
            address = segment.address + np.uint64(4 * begin)
            if several:
                sum_signs(acc, words, terms, job, np.uint64(first_block + batch), count)
                first, last = max(0, -begin), min(count * BITS_PER_BLOCK, n - begin)
                x = carray(pointer_to(address + np.uint64(4 * first), np.float32), last - first)
                store_float(x, _ONE, shift, acc[first:last])
                continue
            term = terms[job.first]
            scale = np.float32(term.scale)
            fill_words(words, np.uint64(first_block + batch), count, term.step, term.index, term.key0, term.key1)
            for b in range(count):
                for k in range(4):
                    first, last = max(0, -begin), min(SIGNS, n - begin)
                    add_word(address, words[k, b], scale, shift, first, last)
                    address += _BYTES
                    begin += SIGNS


@inlined
def sum_signs(acc, words, terms, job, number, count):
    """Write into ``acc`` the sum of a job's Rademacher terms on ``count`` blocks, added up in their order."""
    for t in range(job.first, job.last):
        term = terms[t]
        scale = np.float32(term.scale)
        fill_words(words, number, count, term.step, term.index, term.key0, term.key1)
        address = np.uint64(acc.ctypes.data)
        for b in range(count):
            for k in range(4):
                if t == job.first:
                    store_signs(address, words[k, b], scale)
                else:
                    add_signs_to(address, words[k, b], scale, None)
                address += _BYTES


def add_signs_loop(address):
    """Call :func:`add_signs` for shares of an order until none is left."""
    order = table(address, ORDER, 1)[0]
    segments, jobs = table(order.segments, SEGMENT, order.num_rows), table(order.jobs, JOB, order.num_rows)
    terms = table(order.terms, TERM, order.num_rows)
    share = take_share(address)
    while share < order.num_shares:
        add_signs(segments, rows_of(order, share), jobs, terms)
        share = take_share(address)


@inlined
def copy_word(source, target, half, word, scale, first, last):
    """Write weights plus 32 signs times ``scale``, as float32 or bfloat16; only ``first`` to ``last`` exist."""
    if first == 0 and last == SIGNS:
        if half:
            copy_signs_to_bfloat16(source, target, word, scale)
        else:
            copy_signs_to(source, target, word, scale)
        return
    for j in range(first, last):
        change = -scale if (word >> np.uint32(j)) & np.uint32(1) else scale
        moved = carray(pointer_to(source + np.uint64(4 * j), np.float32), 1)[0] + change
        if half:
            carray(pointer_to(target + np.uint64(2 * j), np.uint16), 1)[0] = to_bfloat16(moved)
        else:
            carray(pointer_to(target + np.uint64(4 * j), np.float32), 1)[0] = moved


@compiled
def copy_signs(segments, chosen, targets, half, terms):
    """Write contiguous float32 weights plus one Rademacher direction to the addresses in ``targets``."""
    words = np.empty((4, BATCH), np.uint32)
    width = 2 if half else 4
    for number in chosen:
        segment = segments[number]
        term = terms[segment.job]
        scale = np.float32(term.scale)
        n = segment.length
        first_block, blocks, lead = blocks_of(segment)
        for batch in range(0, blocks, BATCH):
            count = min(BATCH, blocks - batch)
            fill_words(words, np.uint64(first_block + batch), count, term.step, term.index, term.key0, term.key1)
            begin = batch * BITS_PER_BLOCK - lead
            for b in range(count):
                for k in range(4):
                    first, last = max(0, -begin), min(SIGNS, n - begin)
                    source = segment.address + np.uint64(4 * begin)
                    target = targets[number] + np.uint64(width * begin)
                    copy_word(source, target, half, words[k, b], scale, first, last)
                    begin += SIGNS


def copy_signs_loop(address):
    """Call :func:`copy_signs` for shares of an order until none is left."""
    order = table(address, ORDER, 1)[0]
    segments, terms = table(order.segments, SEGMENT, order.num_rows), table(order.terms, TERM, order.num_rows)
    targets, half = table(order.targets, np.uint64, order.num_rows), order.half != np.uint64(0)
    share = take_share(address)
    while share < order.num_shares:
        copy_signs(segments, rows_of(order, share), targets, half, terms)
        share = take_share(address)
