r"""GPU backend: one Triton launch a sweep, one read and one write of the weights, nothing materialised.

The same words, laws and float32 operations (fused multiply-add switched off) as the CPU backend, described by the same
three tables.  A launch serves all tensors whose jobs are of one kind, and a program one segment of them, so that a
model of hundreds of small tensors costs no more than its bytes; the tables of jobs and terms go to the GPU in one
asynchronous copy.  Without a GPU it runs in Triton's interpreter (``TRITON_INTERPRET=1`` set before import), which is
how it is tested where there is none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zokernel.directions.placement import Placement
from zokernel.directions.tables import (
    LAW_CODES,
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

    from zokernel.directions.triton_kernels import SIGN_COLUMNS, WORD_COLUMNS, sweep_kernel
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


def sweep(jobs: Sequence[Job]) -> list[float]:
    """Carry out one sweep over GPU tensors; the same contract as the other backends' ``sweep``.

    Args:
        jobs: One a tensor, on one device or several.

    Returns:
        For grid rules, the largest magnitude that each tensor reached; zeros otherwise.

    Raises:
        UsageError: If terms of different kinds are added to one tensor.
    """
    peaks = [0.0] * len(jobs)
    for numbers in _alike(jobs).values():
        for number, peak in zip(numbers, Launch([jobs[n] for n in numbers])()):
            peaks[number] = peak
    return peaks


def copy(jobs: Sequence[Job], targets: Sequence[Tensor]) -> None:
    """Write the weights that :func:`sweep` would leave into other tensors, in one read of the weights.

    Args:
        jobs: One a tensor, to nearest.
        targets: One a job: contiguous, of the local weights' shape, in any floating-point dtype.
    """
    for numbers in _alike(jobs, targets).values():
        Launch([jobs[n] for n in numbers], targets[numbers[0]].dtype)([targets[n] for n in numbers])


def copy_rows(job: Job, rows: Tensor, target: Tensor) -> None:
    """Write some rows of what :func:`copy` makes of a matrix.

    Args:
        job: The matrix, whole rows of it, contiguous.
        rows: (n,) int64, which rows, on the matrix's device: they need not come to the host.
        target: (n, columns), contiguous.
    """
    local, columns = job.place.local, job.place.local.shape[1]
    begin = rows * columns
    fields: dict[str, Tensor | int] = {
        "job": 0,
        "address": begin * local.element_size() + local.data_ptr(),
        "position": begin + job.place.offset[0] * columns,
        "length": columns,
        "stride": 1,
        "local": begin,
    }
    segments = torch.empty(rows.numel(), len(FIELD), dtype=torch.int64, device=local.device)
    for name, values in fields.items():
        segments[:, FIELD[name]] = values
    addresses = torch.arange(rows.numel(), device=local.device) * (columns * target.element_size()) + target.data_ptr()
    Launch([job], target.dtype, segments=segments).run(addresses)


class PreparedSweep:
    """Adds as many noise directions to the same weights again and again; the weights stay where they are.

    Args:
        jobs: One a tensor, with equally many terms; each adds nothing but noise of one law, without mask or gain.
        rows: Which row of the scales and shifts is each job's.
    """

    def __init__(self, jobs: Sequence[Job], rows: Sequence[int]):
        self._launches = [
            (Launch([jobs[n] for n in numbers]), np.array([rows[n] for n in numbers], np.int64))
            for numbers in _alike(jobs).values()
        ]

    def __call__(
        self, draws: Sequence[tuple[int, int]], scales: Sequence[Sequence[float]], shifts: Sequence[float]
    ) -> None:
        """Carry out a sweep.

        Args:
            draws: Step and index of each direction.
            scales: Its scales for each tensor, (tensors, directions).
            shifts: Factor on the old weights for each tensor, less one.
        """
        step, index = np.array(draws, np.uint64).T
        all_scales, all_shifts = np.array(scales), np.array(shifts)
        for launch, rows in self._launches:
            launch.terms["scale"] = all_scales[rows].ravel()
            launch.terms["step"], launch.terms["index"] = np.tile(step, len(rows)), np.tile(index, len(rows))
            launch.jobs["shift"] = all_shifts[rows]
            launch()


class PreparedCopies:
    """Writes weights plus one noise direction into other tensors again and again.

    Args:
        jobs: One a tensor: each adds one noise of one law, without mask or gain.
    """

    def __init__(self, jobs: Sequence[Job]):
        self._jobs, self._alike = jobs, list(_alike(jobs).values())
        self._launches: dict[torch.dtype, list[Launch]] = {}
        self._draw: dict[str, float] = {}

    def along(self, step: int, index: int, scale: float) -> PreparedCopies:
        """Take another direction of the same streams from now on."""
        self._draw = {"step": step, "index": index, "scale": scale}
        return self

    def __call__(self, targets: Sequence[Tensor]) -> None:
        """Write the copies.

        Args:
            targets: Where to: contiguous, shaped like the local weights, all of one dtype.
        """
        dtype = targets[0].dtype
        if dtype not in self._launches:
            self._launches[dtype] = [Launch([self._jobs[n] for n in numbers], dtype) for numbers in self._alike]
        for launch, numbers in zip(self._launches[dtype], self._alike):
            for field, value in self._draw.items():
                launch.terms[field] = value
            launch([targets[n] for n in numbers])


def sum_of_squares(law: str, key: tuple[int, int], step: int, index: int, numel: int, device: torch.device) -> float:
    """Return the squared norm of one tensor's noise.

    Args:
        law: Its law.
        key: Philox key.
        step: Third counter word.
        index: Fourth counter word.
        numel: Elements of the whole tensor.
        device: Where to compute.

    Returns:
        The sum of squares.
    """
    total, chunk = torch.zeros((), dtype=torch.float64, device=device), 1 << 22
    for begin in range(0, numel, chunk):
        values = torch.zeros(min(chunk, numel - begin), device=device)
        place = Placement("", values, values, (numel,), (begin,))
        Launch([Job(place, (Noise(law, key, step, index),), (1.0,))])()
        total += values.double().square().sum()
    return float(total)


class Kind(NamedTuple):
    """What jobs of one launch have in common: constants of the kernel."""

    device: torch.device
    dtype: torch.dtype
    target: torch.dtype | None
    term: type[Term]
    law: int
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
        self.kind = _kind(jobs[0], target)
        self.jobs, self.terms = job_tables(jobs)
        self._held = jobs  # the tables hold addresses of what their terms refer to
        self._geometries = tuple(geometry(job.place) for job in jobs)
        self._whole = self.kind.whole and segments is None
        self._segments = _segments_on(self.kind.device, self._geometries) if segments is None else segments
        dtype, rule = self.kind.dtype, self.kind.rule
        columns = SIGN_COLUMNS if self.kind.term is Noise and self.kind.law == 0 else WORD_COLUMNS
        self._constants: dict[str, Any] = {
            "TYPE": TYPES[dtype],
            "TARGET": None if target is None else TYPES[target],
            "KIND": (Noise, Factors, Values).index(self.kind.term),
            "LAW": self.kind.law,
            "MASKED": self.kind.masked,
            "RULE": int(rule),
            "WIDE": dtype == torch.float64 or rule == Rule.STOCHASTIC,
            "DROP": DROPPED_BITS[dtype],
            "HALF": dtype == torch.float16,
            "ROWS": TILE // (4 * columns),
            "COLUMNS": columns,
            "enable_fp_fusion": False,
        }

    def __call__(self, targets: Sequence[Tensor] = ()) -> list[float]:
        """Carry it out.

        Args:
            targets: Where the results go, one a job, if not to the weights.

        Returns:
            For grid rules, the largest magnitude that each tensor reached; zeros otherwise.
        """
        if not targets:
            return self.run(None, self._whole)
        start = np.array([target.data_ptr() for target in targets], np.int64)
        segments = segment_table(self._geometries, SEGMENT_LENGTH)
        addresses = start[segments["job"]] + segments["local"] * targets[0].element_size()
        return self.run(addresses, self._whole and not (start % 16).any())

    def run(self, addresses: Tensor | np.ndarray | None, whole: bool = False) -> list[float]:
        """Carry it out, given where the results of each segment go; ``whole`` promises that 16 bytes fit at once."""
        count, device = len(self._segments), self.kind.device
        if not count:
            return [0.0] * len(self.jobs)
        tables = [self.jobs, self.terms, *([addresses] if isinstance(addresses, np.ndarray) else [])]
        jobs, terms, *sent = _send(tables, device)
        where = addresses if isinstance(addresses, Tensor) else sent[0] if sent else jobs
        grid_rule = self.kind.rule in GRID_RULES
        peaks = torch.zeros(count, device=device) if grid_rule else jobs
        decayed = self.kind.decayed or bool(self.jobs["shift"].any())
        with _current(device):
            sweep_kernel[(count,)](
                self._segments, jobs, terms, where, peaks, WHOLE=whole, DECAYED=decayed, **self._constants
            )
        if not grid_rule:
            return [0.0] * len(self.jobs)
        found = torch.zeros(len(self.jobs), device=device)
        return found.scatter_reduce_(0, self._segments[:, FIELD["job"]], peaks, "amax").tolist()


def _alike(jobs: Sequence[Job], targets: Sequence[Tensor] = ()) -> dict[Kind, list[int]]:
    """Numbers of the jobs that one launch can serve, by what they have in common."""
    found: dict[Kind, list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        found[_kind(job, targets[number].dtype if targets else None)].append(number)
    return found


def _kind(job: Job, target: torch.dtype | None) -> Kind:
    kinds = {type(term) for term in job.terms} or {Noise}
    if len(kinds) > 1:
        raise UsageError("The Triton backend adds terms of one kind to a tensor at a time: use backend='torch'.")
    noises = [term for term in job.terms if isinstance(term, Noise)]
    laws, masked = {term.law for term in noises} or {"rademacher"}, {term.mask is not None for term in noises}
    if len(laws) > 1 or len(masked) > 1:
        raise UsageError(
            "The Triton backend adds terms of one law to a tensor, all masked or none: use backend='torch'."
        )
    local = job.place.local
    # Whole tensors in memory order are cut where blocks begin, and stretches of 16 elements are whole or left out.
    aligned = local.data_ptr() % 16 == 0 and local.numel() % 16 == 0
    whole = aligned and local.is_contiguous() and tuple(local.shape) == job.place.shape
    common = (LAW_CODES[laws.pop()], any(masked), job.rule, job.decay != 1.0, whole)
    return Kind(local.device, local.dtype, target, kinds.pop(), *common)


def _send(tables: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy tables of eight-byte fields to a device, in one transfer that the host does not wait for."""
    flat = [table.view(np.int64).reshape(-1) for table in tables]
    host = torch.from_numpy(np.concatenate(flat))
    if device.type == "cuda":
        host = host.pin_memory()
    return list(host.to(device, non_blocking=True).split([len(part) for part in flat]))


@lru_cache(maxsize=64)
def _segments_on(device: torch.device, geometries: tuple[Geometry, ...]) -> Tensor:
    table = segment_table(geometries, SEGMENT_LENGTH)
    return torch.from_numpy(table.view(np.int64).reshape(-1, len(FIELD)).copy()).to(device)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which a device is the current one, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
