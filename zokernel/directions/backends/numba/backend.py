r"""CPU backend: directions are generated and added a tile at a time, in one read and one write of the weights.

Three small tables describe a sweep: jobs (one per tensor), terms (what is added) and segments (stretches of memory).
Compiled code carries it out without the interpreter lock, on as many threads as ``torch.get_num_threads()``.  No result
depends on how elements are split into tiles, segments or threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from zokernel.directions.backends.numba.factors import move_factors_loop
from zokernel.directions.backends.numba.kernels import run_segments_loop, squared_norms_loop
from zokernel.directions.backends.numba.signs import SEGMENT_LENGTH, PreparedSweep, add_signs_loop, copy_signs_loop
from zokernel.directions.backends.numba.threads import Loop, carry_out
from zokernel.directions.backends.tables import (
    DISTRIBUTION_CODES,
    SEGMENT,
    TERM,
    adds_plain_noise,
    geometry,
    job_tables,
    segment_table,
)
from zokernel.directions.terms import NEAR_ONE, Factors, Job, Noise, Rule, Values

__all__ = ["PreparedCopies", "PreparedSweep", "can_copy", "copy_rows", "sums_of_squares", "sweep"]

LOOPS = (run_segments_loop, add_signs_loop, move_factors_loop)


def sweep(jobs: Sequence[Job]) -> list[float]:
    """Carry out one sweep over CPU tensors.

    Args:
        jobs: One per tensor.

    Returns:
        For grid rules, the largest magnitude that each tensor reached; zeros otherwise.
    """
    job_table, term_table = job_tables(jobs)
    segments = _segments(jobs)
    peaks = np.zeros(len(segments), np.float32)
    loops = np.array([LOOPS.index(_loop_of(job)) for job in jobs])[segments["job"]]
    loops[segments["stride"] != 1] = LOOPS.index(run_segments_loop)
    tables = {"jobs": job_table, "terms": term_table, "results": peaks, "targets": segments["address"].copy()}
    for number, loop in enumerate(LOOPS):
        carry_out(loop, segments, np.flatnonzero(loops == number), tables)
    by_job = np.zeros(len(jobs), np.float32)
    if any(job.rule in (Rule.GRID_MOVE, Rule.GRID_COMMIT) for job in jobs):
        np.maximum.at(by_job, segments["job"], peaks)
    return by_job.tolist()


class PreparedCopies:
    """Writes weights plus one direction into other tensors, in one read of the weights.

    Its tables can be kept for weights that are copied again and again.

    Args:
        jobs: One per tensor; each must be as :func:`can_copy` asks.
    """

    def __init__(self, jobs: Sequence[Job]):
        self._jobs, self._terms = job_tables(jobs)
        self._segments = _segments(jobs)
        self._job, self._local = self._segments["job"], self._segments["local"].astype(np.uint64)
        self._signs = np.array([_loop_of(job) is add_signs_loop for job in jobs], bool)[self._job]

    def along(self, step: int, index: int, scale: float) -> PreparedCopies:
        """Take another direction of the same streams from now on."""
        self._terms["step"], self._terms["index"], self._terms["scale"] = step, index, scale
        return self

    def __call__(self, targets: Sequence[torch.Tensor]) -> None:
        """Write the copies.

        Args:
            targets: Where to: contiguous, shaped like the local weights; all float32 or all bfloat16.
        """
        start = np.array([target.data_ptr() for target in targets], np.uint64)
        addresses = start[self._job] + self._local * np.uint64(targets[0].element_size())
        _copy(self._segments, addresses, targets[0].dtype, self._jobs, self._terms, self._signs)


def copy_rows(job: Job, rows: torch.Tensor, target: torch.Tensor) -> None:
    """Write some rows of a matrix plus one direction into another tensor.

    Args:
        job: The matrix, as :func:`can_copy` asks.
        rows: (n,) int64, which rows.
        target: (n, columns), contiguous, float32 or bfloat16.
    """
    local, columns = job.place.local, job.place.local.shape[1]
    segments = np.zeros(rows.numel(), SEGMENT)
    begin = rows.numpy() * columns
    segments["address"] = (begin * local.element_size() + local.data_ptr()).astype(np.uint64)
    segments["position"], segments["length"], segments["stride"] = begin, columns, 1
    stride = columns * target.element_size()
    addresses = (np.arange(rows.numel()) * stride + target.data_ptr()).astype(np.uint64)
    signs = np.full(len(segments), _loop_of(job) is add_signs_loop)
    _copy(segments, addresses, target.dtype, *job_tables([job]), signs)


def can_copy(job: Job) -> bool:
    """Return whether :class:`PreparedCopies` can carry a job out.

    It takes whole rows of float32 weights, and one direction: of signs, or of low rank.
    """
    return len(job.terms) == 1 and _loop_of(job) is not run_segments_loop and job.place.is_rows


def _segments(jobs: Sequence[Job]) -> np.ndarray:
    return segment_table(tuple(geometry(job.place) for job in jobs), SEGMENT_LENGTH)


def _copy(
    segments: np.ndarray,
    addresses: np.ndarray,
    dtype: torch.dtype,
    jobs: np.ndarray,
    terms: np.ndarray,
    signs: np.ndarray,
) -> None:
    tables, half = {"jobs": jobs, "terms": terms, "targets": addresses}, dtype == torch.bfloat16
    for loop, chosen in ((copy_signs_loop, signs), (move_factors_loop, ~signs)):
        carry_out(loop, segments, np.flatnonzero(chosen), tables, half=half)


def sums_of_squares(noises: Sequence[Noise], sizes: Sequence[int], device: torch.device) -> list[float]:
    """Return the squared norm of the noise on each of some whole tensors, the same for any number of threads.

    Args:
        noises: One per tensor; gain and mask are ignored.
        sizes: Elements of each tensor.
        device: The CPU.

    Returns:
        The sums of squares.
    """
    return [_sum_of_squares(noise, size) for noise, size in zip(noises, sizes)]


def _sum_of_squares(noise: Noise, numel: int) -> float:
    starts = np.arange(0, numel, SEGMENT_LENGTH)
    segments, norms = np.zeros(len(starts), SEGMENT), np.zeros(len(starts))
    segments["position"], segments["length"] = starts, np.minimum(SEGMENT_LENGTH, numel - starts)
    term = np.zeros(1, TERM)
    values = (DISTRIBUTION_CODES[noise.distribution], *noise.key, noise.step, noise.index)
    for field, value in zip(("distribution", "key0", "key1", "step", "index"), values):
        term[field] = value
    carry_out(squared_norms_loop, segments, np.arange(len(starts)), {"terms": term, "results": norms})
    return float(norms.sum())


def _loop_of(job: Job) -> Loop:
    """Return the quickest loop for a job on contiguous weights: those to nearest in float32 have loops of their own."""
    nearest = job.rule == Rule.NEAREST and job.place.local.dtype == torch.float32
    if not nearest or not NEAR_ONE[0] <= job.decay <= NEAR_ONE[1] or not job.terms:
        return run_segments_loop
    if all(map(_is_plain_signs, job.terms)):
        return add_signs_loop
    return move_factors_loop if len(job.terms) == 1 and isinstance(job.terms[0], Factors) else run_segments_loop


def _is_plain_signs(term: Noise | Factors | Values) -> bool:
    return isinstance(term, Noise) and term.distribution == "rademacher" and adds_plain_noise(term)
