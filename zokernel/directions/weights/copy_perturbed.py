r"""Perturbed copies of weights: :math:`\theta + \sum_i scale_i z_i` written elsewhere, the weights left as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from zokernel.directions.backends import dispatch
from zokernel.directions.backends.tables import adds_plain_noise
from zokernel.directions.base import Directions
from zokernel.directions.families.dense import Dense
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job, Noise

# Dtypes of copies that compiled code writes while it reads the weights.
QUICK = (torch.float32, torch.bfloat16)


def copy_perturbed(
    family: Directions,
    places: Sequence[Placement],
    targets: Sequence[Tensor],
    offsets: Mapping[int, float],
    *,
    seed: int,
    step: int,
) -> None:
    r"""Write :math:`\theta + \sum_i offsets_i z_i` into other tensors, the sum rounded to the weights' precision first.

    On a GPU all directions take one read of the weights and one write of the copy, as bfloat16 if the copy is; on the
    CPU Rademacher and low-rank directions do.

    Args:
        family: Directions.
        places: Whole weights, in memory order.
        targets: Where to: one per place, of its shape, contiguous, in the weights' dtype or bfloat16.
        offsets: Coefficient of each direction by index.
        seed: Seed of the run.
        step: Step of the run.
    """
    _carry_out(_jobs(family, places, offsets, seed=seed, step=step), targets, family.backend)


def _carry_out(jobs: Sequence[Job], targets: Sequence[Tensor], backend: str) -> None:
    if jobs and on_gpu(backend, jobs[0].place.local):
        from zokernel.directions.backends.triton import backend as triton_backend

        triton_backend.copy(jobs, targets)
        return
    if _all_are_fast(jobs, targets):
        from zokernel.directions.backends.numba import backend as numba_backend

        numba_backend.PreparedCopies(jobs)(targets)
        return
    moved = []
    for job, target in zip(jobs, targets):
        local = target if target.dtype == job.place.local.dtype else torch.empty_like(job.place.local)
        local.copy_(job.place.local)
        moved.append(replace(job, place=replace(job.place, tensor=local, local=local)))
    dispatch.sweep(moved, backend)
    for job, target in zip(moved, targets):
        if target is not job.place.local:
            target.copy_(job.place.local)


class Copier:
    """Makes perturbed copies of the same weights many times, and prepares them once.

    Args:
        places: As for :func:`copy_perturbed`.
    """

    def __init__(self, places: Sequence[Placement]):
        self.places = places
        self._prepared: Any = None
        self._streams: tuple[Directions, int] | None = None

    def __call__(
        self, family: Directions, targets: Sequence[Tensor], offsets: Mapping[int, float], *, seed: int, step: int
    ) -> None:
        """Do what :func:`copy_perturbed` does; targets must have the dtypes they had before."""
        nonzero = [(index, scale) for index, scale in offsets.items() if scale != 0.0]
        if len(nonzero) == 1 and targets[0].dtype in QUICK and self.prepare(family, seed=seed):
            self._prepared.along(step, *nonzero[0])(targets)
            return
        _carry_out(_jobs(family, self.places, offsets, seed=seed, step=step), targets, family.backend)

    def prepare(self, family: Directions, *, seed: int) -> bool:
        """Prepare all copies along single directions, if compiled code writes them in one pass; return whether it does.

        Args:
            family: Directions.
            seed: Seed of the run.

        Returns:
            Whether the copies take one read of the weights and one write.
        """
        if self._streams != (family, seed):
            # A dense direction of another step is another part of the same streams.
            jobs = _jobs(family, self.places, {0: 1.0}, seed=seed, step=0) if type(family) is Dense else []
            self._prepared, self._streams = None, (family, seed)
            if jobs and all(map(_is_plain, jobs)):
                distribution = cast(Noise, jobs[0].terms[0]).distribution
                weights = [place.local for place in self.places]
                kinds = {tensor.dtype for tensor in weights}, {tensor.device for tensor in weights}
                backend = dispatch.preparing(distribution, *kinds, family.backend)
                self._prepared = None if backend is None or len(kinds[0]) > 1 else backend.PreparedCopies(jobs)
        return self._prepared is not None


def copy_perturbed_rows(
    family: Directions,
    place: Placement,
    rows: Tensor,
    target: Tensor,
    offsets: Mapping[int, float],
    *,
    seed: int,
    step: int,
) -> None:
    """Write some rows of a perturbed matrix into another tensor, as an embedding looks them up.

    Args:
        family: Directions.
        place: The whole matrix, in memory order.
        rows: (n,) int64, which rows.
        target: (n, columns), contiguous, in the weights' dtype.
        offsets: Coefficient of each direction by index.
        seed: Seed of the run.
        step: Step of the run.
    """
    (job,) = _jobs(family, [place], offsets, seed=seed, step=step)
    if on_gpu(family.backend, target):
        from zokernel.directions.backends.triton import backend as triton_backend

        triton_backend.copy_rows(job, rows, target)
        return
    if _is_fast(job, target.dtype):
        from zokernel.directions.backends.numba import backend as numba_backend

        numba_backend.copy_rows(job, rows, target)
        return
    if any(isinstance(term, Noise) and term.mask is not None for term in job.terms):
        # A mask is laid out over the whole matrix.
        whole = torch.empty_like(place.local)
        copy_perturbed(family, [place], [whole], offsets, seed=seed, step=step)
        torch.index_select(whole, 0, rows, out=target)
        return
    torch.index_select(place.local, 0, rows, out=target)
    jobs = []
    for number, row in enumerate(rows.tolist()):
        local = target[number : number + 1]
        jobs.append(replace(job, place=Placement(place.name, local, local, place.shape, (row, *place.offset[1:]))))
    dispatch.sweep(jobs, family.backend)


def on_gpu(backend: str, tensor: Tensor) -> bool:
    """Return whether Triton makes copies of a tensor: any rows, any directions, without waiting for them."""
    return dispatch.choose_backend(tensor.device, backend) == "triton"


def _jobs(
    family: Directions, places: Sequence[Placement], offsets: Mapping[int, float], *, seed: int, step: int
) -> list[Job]:
    by_index = [family.terms(places, seed=seed, step=step, index=index) for index in offsets]
    jobs = []
    for number, place in enumerate(places):
        pairs = [(terms[number], scale) for terms, scale in zip(by_index, offsets.values())]
        live = [(term, scale) for term, scale in pairs if term is not None and scale != 0.0]
        jobs.append(Job(place, tuple(term for term, _ in live), tuple(scale for _, scale in live)))
    return jobs


def _all_are_fast(jobs: Sequence[Job], targets: Sequence[Tensor]) -> bool:
    return len({t.dtype for t in targets}) == 1 and all(_is_fast(job, targets[0].dtype) for job in jobs)


def _is_plain(job: Job) -> bool:
    """Whether a job adds one plain noise to whole rows of its tensor."""
    return job.place.is_rows and len(job.terms) == 1 and adds_plain_noise(job.terms[0])


def _is_fast(job: Job, dtype: torch.dtype) -> bool:
    if job.place.local.device.type != "cpu" or dtype not in QUICK:
        return False
    from zokernel.directions.backends.numba import backend as numba_backend

    return numba_backend.can_copy(job)
