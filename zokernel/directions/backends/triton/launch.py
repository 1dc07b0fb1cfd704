r"""One Triton launch over many tensors: the tables it reads, kept on the GPU, and the constants of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zokernel.directions.backends.tables import (
    DISTRIBUTION_CODES,
    SEGMENT,
    Geometry,
    columns_of,
    geometry,
    job_tables,
    segment_table,
)
from zokernel.directions.terms import Factors, Job, Noise, Rule, Term, Values
from zokernel.errors import RunError, UsageError

try:
    import triton.language as tl

    from zokernel.directions.backends.triton.kernels import SIGN_COLUMNS, WORD_COLUMNS, squares_kernel, sweep_kernel
except ModuleNotFoundError as error:
    raise RunError(
        "Directions on GPU tensors need triton, which comes with torch's CUDA and ROCm builds on Linux: install it, or "
        "make the directions with backend='torch'."
    ) from error

SEGMENT_LENGTH = 1 << 13
TILE = 1 << 11
DROPPED_BITS = {torch.float32: 29, torch.float64: 0, torch.bfloat16: 45, torch.float16: 42}
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FIELD = columns_of(SEGMENT)
GRID_RULES = (Rule.GRID_MOVE, Rule.GRID_COMMIT)


__all__ = ["FIELD", "SEGMENT_LENGTH", "Kind", "Launch", "current", "kind_of", "planes", "segments_on", "send"]
__all__ += ["squares_kernel"]  # imported here, where a missing triton is explained


class Kind(NamedTuple):
    """What jobs of one launch have in common: constants of the kernel."""

    device: torch.device
    dtype: torch.dtype
    target: torch.dtype | None
    term: type[Term]
    distribution: int
    masked: bool
    rule: Rule
    decayed: bool
    whole: bool


class Launch:
    """One launch of the kernel, to be repeated: jobs and terms may change between calls, the weights' places may not.

    Args:
        jobs: Jobs of one kind.
        target: Dtype of the tensors that take the results; None if the weights themselves do.
        segments: (n, fields) int64 on the device, in place of those that cover the tensors.

    Attributes:
        jobs: Table of jobs, on the host.
        terms: Table of terms, on the host.
    """

    def __init__(self, jobs: Sequence[Job], target: torch.dtype | None = None, *, segments: Tensor | None = None):
        self.kind = kind_of(jobs[0], target)
        self.jobs, self.terms = job_tables(jobs)
        # The tables hold addresses of what the terms refer to; the weights may be freed, and then are not swept again.
        self._terms_alive = [job.terms for job in jobs]
        self._geometries = tuple(geometry(job.place) for job in jobs)
        self._whole = self.kind.whole and segments is None
        self._segments = segments_on(self.kind.device, self._geometries) if segments is None else segments
        self._uploaded = [np.zeros(0, np.int64)] * 2
        self._tables = [torch.empty(0, dtype=torch.int64, device=self.kind.device)] * 2
        self._start: list[int] = []
        self._where: Tensor | None = None
        dtype, rule = self.kind.dtype, self.kind.rule
        self._constants: dict[str, Any] = {
            "TYPE": TYPES[dtype],
            "TARGET": None if target is None else TYPES[target],
            "KIND": (Noise, Factors, Values).index(self.kind.term),
            "DISTRIBUTION": self.kind.distribution,
            "MASKED": self.kind.masked,
            "RULE": int(rule),
            "WIDE": dtype == torch.float64 or rule == Rule.STOCHASTIC,
            "DROP": DROPPED_BITS[dtype],
            "HALF": dtype == torch.float16,
            **planes(self.kind.distribution if self.kind.term is Noise else -1),
        }

    def __call__(self, targets: Sequence[Tensor] = ()) -> list[float]:
        """Carry it out.

        Args:
            targets: Where the results go, one per job, if not to the weights.

        Returns:
            For grid rules, the largest magnitude that each tensor reached; zeros otherwise.
        """
        if not targets:
            return self.run(None, self._whole)
        start = [target.data_ptr() for target in targets]
        if start != self._start:
            segments = segment_table(self._geometries, SEGMENT_LENGTH)
            first = np.array(start, np.int64)[segments["job"]]
            (self._where,) = send([first + segments["local"] * targets[0].element_size()], self.kind.device)
            self._start = start
        return self.run(self._where, self._whole and not any(address % 16 for address in start))

    def run(self, addresses: Tensor | None, whole: bool = False) -> list[float]:
        """Carry it out, given where the results of each segment go; ``whole`` promises that 16 bytes fit at once."""
        count, device = len(self._segments), self.kind.device
        if not count:
            return [0.0] * len(self.jobs)
        jobs, terms = self._upload()
        grid_rule = self.kind.rule in GRID_RULES
        peaks = torch.zeros(count, dtype=torch.float32, device=device) if grid_rule else jobs
        where = jobs if addresses is None else addresses
        decayed = self.kind.decayed or bool(self.jobs["shift"].any())
        with current(device):
            sweep_kernel[(count,)](
                self._segments, jobs, terms, where, peaks, WHOLE=whole, DECAYED=decayed, **self._constants
            )
        if not grid_rule:
            return [0.0] * len(self.jobs)
        job_peaks = torch.zeros(len(self.jobs), dtype=torch.float32, device=device)
        return job_peaks.scatter_reduce_(0, self._segments[:, FIELD["job"]], peaks, "amax").tolist()

    def _upload(self) -> list[Tensor]:
        """Return the tables of jobs and terms on the device; what has changed is sent, in tensors of its own."""
        tables = [self.jobs.view(np.int64), self.terms.view(np.int64)]
        changed = [n for n, table in enumerate(tables) if not np.array_equal(table, self._uploaded[n])]
        if changed:
            for number, tensor in zip(changed, send([tables[n] for n in changed], self.kind.device)):
                self._uploaded[number], self._tables[number] = tables[number].copy(), tensor
        return self._tables


def kind_of(job: Job, target: torch.dtype | None) -> Kind:
    """Return what a job has in common with others of its launch.

    Args:
        job: The job.
        target: Dtype of the tensor that takes the result; None if the weights do.

    Raises:
        UsageError: If its terms are of several kinds or distributions.
    """
    kinds = {type(term) for term in job.terms} or {Noise}
    if len(kinds) > 1:
        raise UsageError("The Triton backend adds terms of one kind to a tensor at a time: use backend='torch'.")
    noises = [term for term in job.terms if isinstance(term, Noise)]
    distributions = {term.distribution for term in noises} or {"rademacher"}
    masked = {term.mask is not None for term in noises}
    if len(distributions) > 1 or len(masked) > 1:
        raise UsageError(
            "The Triton backend adds terms of one distribution to a tensor, all masked or none: use backend='torch'."
        )
    local = job.place.local
    # Whole tensors in memory order are cut where blocks begin, and stretches of 16 elements are whole or left out.
    aligned = local.data_ptr() % 16 == 0 and local.numel() % 16 == 0
    whole = aligned and local.is_contiguous() and tuple(local.shape) == job.place.shape
    common = (DISTRIBUTION_CODES[distributions.pop()], any(masked), job.rule, job.decay != 1.0, whole)
    return Kind(local.device, local.dtype, target, kinds.pop(), *common)


def send(tables: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy tables of eight-byte fields to a device, in one transfer that the host does not wait for."""
    flat = [table.view(np.int64).reshape(-1) for table in tables]
    host = torch.from_numpy(np.concatenate(flat))
    if device.type == "cuda":
        host = host.pin_memory()
    return list(host.to(device, non_blocking=True).split([len(part) for part in flat]))


def planes(distribution: int) -> dict[str, Any]:
    """Constants of the layout of a tile, and of exact arithmetic."""
    columns = SIGN_COLUMNS if distribution == DISTRIBUTION_CODES["rademacher"] else WORD_COLUMNS
    return {"ROWS": TILE // (4 * columns), "COLUMNS": columns, "enable_fp_fusion": False}


@lru_cache(maxsize=64)
def segments_on(device: torch.device, geometries: tuple[Geometry, ...]) -> Tensor:
    """Return the segments of some tensors as (n, fields) int64 on their device, remembered."""
    table = segment_table(geometries, SEGMENT_LENGTH)
    return torch.from_numpy(table.view(np.int64).reshape(-1, len(FIELD)).copy()).to(device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which a device is the current one, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
