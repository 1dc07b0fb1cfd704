r"""GPU backend: one Triton launch per sweep, one read and one write of the weights, nothing materialised.

Random words, distributions and float32 operations (without fused multiply-add) are those of the CPU backend, and the
same three tables describe a sweep.  A launch serves all tensors whose jobs are of one kind, and a program one segment
of them, so that a model of hundreds of small tensors costs no more than its bytes.  The tables of jobs and terms go to
the GPU in one asynchronous copy.  Without a GPU the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` set
before import), which is how they are tested.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zokernel.directions.backends.tables import DISTRIBUTION_CODES, geometry, job_tables, segment_table
from zokernel.directions.backends.triton.launch import (
    FIELD,
    SEGMENT_LENGTH,
    Kind,
    Launch,
    current,
    kind_of,
    planes,
    segments_on,
    send,
    squares_kernel,
)
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job, Noise


def sweep(jobs: Sequence[Job]) -> list[float]:
    """Carry out one sweep over GPU tensors; the same contract as the other backends' ``sweep``.

    Args:
        jobs: One per tensor, on one device or several.

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
        jobs: One per tensor, to nearest.
        targets: One per job: contiguous, of the local weights' shape, in any floating-point dtype.
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
    """A sweep of noise over some weights, to be repeated with other directions and scales.

    The number of directions stays the same, and so does the place of the weights in memory.

    Args:
        jobs: One per tensor, with equally many terms: noise of one distribution, without mask or gain.
        rows: Which row of the scales and shifts is each job's.
    """

    def __init__(self, jobs: Sequence[Job], rows: Sequence[int]):
        self._launches = [
            (Launch([jobs[n] for n in numbers]), np.array([rows[n] for n in numbers], np.int64))
            for numbers in _alike(jobs).values()
        ]

    def __call__(
        self,
        draws: Sequence[tuple[int, int]],
        scales: Sequence[Sequence[float]],
        shifts: Sequence[float],
        rounding: tuple[int, int] = (0, 0),
    ) -> None:
        """Carry out a sweep.

        Args:
            draws: Step and index of each direction.
            scales: Its scales for each tensor, (tensors, directions).
            shifts: Factor on the old weights for each tensor, less one.
            rounding: Step and index of the random bits that round, if they do.
        """
        step, index = np.array(draws, np.uint64).T
        all_scales, all_shifts = np.array(scales), np.array(shifts)
        for launch, rows in self._launches:
            launch.terms["scale"] = all_scales[rows].ravel()
            launch.terms["step"], launch.terms["index"] = np.tile(step, len(rows)), np.tile(index, len(rows))
            launch.jobs["shift"] = all_shifts[rows]
            launch.jobs["step"], launch.jobs["index"] = rounding
            launch()


class PreparedCopies:
    """Writes weights plus one noise direction into other tensors again and again.

    Args:
        jobs: One per tensor: each adds one noise of one distribution, without mask or gain.
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


def sums_of_squares(noises: Sequence[Noise], sizes: Sequence[int], device: torch.device) -> list[float]:
    """Return the squared norm of the noise on each of some whole tensors.

    Args:
        noises: One per tensor; gain and mask are ignored.
        sizes: Elements of each tensor.
        device: Where to compute.

    Returns:
        The sums of squares.
    """
    shells = [torch.empty(size, dtype=torch.float32, device="meta") for size in sizes]
    places = [Placement("", shell, shell, (shell.numel(),), (0,)) for shell in shells]
    terms = job_tables([Job(place, (noise,), (1.0,)) for place, noise in zip(places, noises)])[1]
    geometries = tuple(map(geometry, places))
    segments = segments_on(device, geometries)
    parts = torch.zeros(len(segments), dtype=torch.float64, device=device)
    if len(segments):
        distribution = {DISTRIBUTION_CODES[noise.distribution] for noise in noises}.pop()
        with current(device):
            squares_kernel[(len(segments),)](
                segments, send([terms], device)[0], parts, DISTRIBUTION=distribution, **planes(distribution)
            )
    numbers = segment_table(geometries, SEGMENT_LENGTH)["job"]
    # Added one after the other on the host: the same every time.
    return np.bincount(numbers, weights=parts.cpu().numpy(), minlength=len(sizes)).tolist()


def _alike(jobs: Sequence[Job], targets: Sequence[Tensor] = ()) -> dict[Kind, list[int]]:
    """Numbers of the jobs that one launch can serve, by what they have in common."""
    numbers: dict[Kind, list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        numbers[kind_of(job, targets[number].dtype if targets else None)].append(number)
    return numbers
