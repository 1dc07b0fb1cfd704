r"""The three tables that describe a sweep to compiled code, on the CPU and on GPUs.

*Jobs*: one per tensor; *terms*: what is added; *segments*: stretches of memory, of which each thread or program takes
some.  Every field has eight bytes, so a GPU kernel may read a table as int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from zokernel.directions.placement import Placement, Runs, find_runs
from zokernel.directions.terms import Factors, Job, Noise, Values, affine

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
        **dict.fromkeys(("kind", "distribution"), _I8),
        **dict.fromkeys(("key0", "key1", "step", "index", "first", "second"), _U8),
        **dict.fromkeys(("rank", "columns"), _I8),
        **dict.fromkeys(("gain", "scale", "old_scale"), _F8),
    }
)
SEGMENT = _table({"job": _I8, "address": _U8, **dict.fromkeys(("position", "length", "stride", "local"), _I8)})

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)
DTYPE_CODES = {torch.float32: FLOAT32, torch.float64: FLOAT64, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
DISTRIBUTION_CODES = {"rademacher": 0, "gaussian": 1, "uniform": 2}
NOISE, FACTORS, VALUES = range(3)


def columns_of(table: np.dtype) -> dict[str, int]:
    """Return the number of each field of a table, by name."""
    return {name: number for number, name in enumerate(table.names or ())}


def job_tables(jobs: Sequence[Job]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tables of jobs and of their terms.

    Args:
        jobs: One per tensor; tensors that their terms refer to must outlive the tables.

    Returns:
        (jobs,) of JOB and (terms,) of TERM.
    """
    job_rows: list[tuple] = []
    term_rows: list[tuple] = []
    for job in jobs:
        first = len(term_rows)
        old_scales = job.old_scales or (0.0,) * len(job.terms)
        for term, scale, old in zip(job.terms, job.scales, old_scales, strict=True):
            term_rows.append((*_describe(term), scale, old))
        codes = (DTYPE_CODES[job.place.local.dtype], int(job.rule), first, len(term_rows))
        job_rows.append((*codes, *affine(job.decay), job.decay - 1.0, job.grid, *job.rounding))
    return np.array(job_rows, JOB), np.array(term_rows, TERM)


Geometry = tuple[int, int, torch.Size, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def geometry(place: Placement) -> Geometry:
    """Return all that a tensor's segments depend on; it holds no reference to the tensor."""
    local = place.local
    return local.data_ptr(), local.element_size(), local.shape, local.stride(), place.shape, place.offset


@lru_cache(maxsize=256)
def segment_table(geometries: tuple[Geometry, ...], limit: int) -> np.ndarray:
    """Return the segments of some tensors; the same weights are swept over again and again, so they are remembered.

    Args:
        geometries: :func:`geometry` of each tensor, whose number is the job of its segments.
        limit: Segments are cut at positions that are multiples of it; a multiple of every distribution's block.

    Returns:
        (segments,) of SEGMENT, not to be changed.
    """
    tables = [np.zeros(0, SEGMENT)]
    for number, (address, width, size, stride, whole, offset) in enumerate(geometries):
        runs = find_runs(size, stride, whole, offset)
        position, memory, local, length = _split(runs, limit)
        table = np.empty(len(position), SEGMENT)
        table["job"], table["stride"] = number, runs.stride
        table["address"] = (memory * width + address).astype(np.uint64)
        table["position"], table["local"], table["length"] = position, local, length
        tables.append(table)
    return np.concatenate(tables)


def adds_plain_noise(term: Noise | Factors | Values) -> bool:
    """Return whether a term is noise without mask or gain."""
    return isinstance(term, Noise) and term.mask is None and term.gain == 1.0


def _describe(term: Noise | Factors | Values) -> tuple[int | float, ...]:
    match term:
        case Noise():
            code, mask = DISTRIBUTION_CODES[term.distribution], 0 if term.mask is None else term.mask.data_ptr()
            return (NOISE, code, *term.key, term.step, term.index, mask, 0, 0, 0, term.gain)
        case Factors():
            left, right = term.left, term.right
            return (FACTORS, 0, 0, 0, 0, 0, left.data_ptr(), right.data_ptr(), *right.shape, term.gain)
        case Values():
            return (VALUES, 0, 0, 0, 0, 0, term.values.data_ptr(), 0, 0, 0, 1.0)


def _split(runs: Runs, limit: int) -> tuple[np.ndarray, ...]:
    """Cut runs at positions that are multiples of ``limit``."""
    if runs.length <= limit:
        return runs.position, runs.memory, runs.local, np.full(len(runs.position), runs.length)
    pieces = []
    for first, memory, local in zip(runs.position, runs.memory, runs.local):
        cuts = np.arange(first // limit + 1, (first + runs.length - 1) // limit + 1) * limit
        begin = np.concatenate([[0], cuts - first]).astype(np.int64)
        end = np.concatenate([begin[1:], [runs.length]])
        pieces.append((begin + first, memory + begin * runs.stride, local + begin, end - begin))
    return tuple(np.concatenate(column) for column in zip(*pieces))
