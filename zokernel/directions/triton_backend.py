r"""GPU backend: one Triton launch a tensor, one read and one write of the weights, nothing materialised.

The same words, laws and float32 operations (fused multiply-add switched off) as the CPU backend.  Without a GPU it runs
in Triton's interpreter (``TRITON_INTERPRET=1`` set before import), which is how it is tested.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zokernel.directions import torch_backend
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Factors, Job, Noise, Rule, Term, Values, affine
from zokernel.errors import RunError, UsageError

try:
    from zokernel.directions.triton_kernels import SIGN_COLUMNS, TILE, WORD_COLUMNS, sweep_kernel
except ModuleNotFoundError as error:
    raise RunError(
        "Directions on GPU tensors need triton, which comes with torch's CUDA and ROCm builds on Linux: install it, or "
        "make the directions with backend='torch'."
    ) from error

logger = logging.getLogger(__name__)

LAW_CODES = {"rademacher": 0, "gaussian": 1, "uniform": 2}
DROPPED_BITS = {torch.float32: 29, torch.float64: 0, torch.bfloat16: 45, torch.float16: 42}


def sweep(jobs: Sequence[Job]) -> list[float]:
    """Carry out one sweep over GPU tensors; the same contract as the other backends' ``sweep``.

    Args:
        jobs: One a tensor.

    Returns:
        For grid rules, the largest magnitude that each tensor reached; zeros otherwise.
    """
    return [_launch(job) for job in jobs]


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
        _launch(Job(place, (Noise(law, key, step, index),), (1.0,)))
        total += values.double().square().sum()
    return float(total)


def _launch(job: Job) -> float:
    local, device = job.place.local, job.place.local.device
    runs = job.place.runs
    gaps = np.unique(np.diff(_position_runs(job.place)))
    if gaps.size > 1:
        logger.info("%s is sharded along several dimensions: using the reference backend", job.place.name)
        return torch_backend.sweep([job])[0]
    flat = local.view(-1) if local.is_contiguous() else local.contiguous().view(-1)
    aligned = gaps.size == 0
    kind, law, rank, columns, first, second = _stored(job.terms, device)
    columns_of_tile = SIGN_COLUMNS if kind == 0 and law == 0 and aligned else WORD_COLUMNS
    # Whole blocks start where positions are multiples of 256, so an aligned launch begins up to 255 elements early.
    start = int(runs.position[0])
    tiles = -(-(flat.numel() + (start % 256 if aligned else 0)) // TILE)
    old = job.old_scales or (0.0,) * len(job.terms)
    gains = [1.0 if isinstance(term, Values) else term.gain for term in job.terms]
    counters = [(*t.key, t.step, t.index) if isinstance(t, Noise) else (0, 0, 0, 0) for t in job.terms] or [(0,) * 4]
    scales = [(s, o, g) for s, o, g in zip(job.scales, old, gains)] or [(0.0, 0.0, 0.0)]
    masks = {id(term.mask): term.mask for term in job.terms if isinstance(term, Noise) and term.mask is not None}
    grid_rule = job.rule in (Rule.GRID_MOVE, Rule.GRID_COMMIT)
    peaks = torch.zeros(tiles if grid_rule else 1, device=device)
    options: dict[str, Any] = {"enable_fp_fusion": False}
    sweep_kernel[(tiles,)](
        flat,
        torch.tensor([*affine(job.decay), job.decay - 1.0, job.grid], dtype=torch.float64, device=device),
        torch.tensor(job.rounding, dtype=torch.int64, device=device),
        torch.tensor(counters, dtype=torch.int64, device=device),
        torch.tensor(scales, dtype=torch.float64, device=device),
        next(iter(masks.values()), first),
        first,
        second,
        peaks,
        len(job.terms),
        flat.numel(),
        start,
        job.place.local.numel() if aligned else _run_length(job.place),
        0 if aligned else int(gaps[0]),
        job.place.numel,
        rank,
        columns,
        KIND=kind,
        LAW=law,
        MASKED=bool(masks),
        ALIGNED=aligned,
        RULE=int(job.rule),
        DECAYED=job.decay != 1.0,
        WIDE=flat.dtype == torch.float64 or job.rule == Rule.STOCHASTIC,
        DROP=DROPPED_BITS[flat.dtype],
        HALF=flat.dtype == torch.float16,
        ROWS=TILE // (4 * columns_of_tile),
        COLUMNS=columns_of_tile,
        **options,
    )
    if not local.is_contiguous():
        local.copy_(flat.view(local.shape))
    return float(peaks.max()) if grid_rule else 0.0


def _position_runs(place: Placement) -> np.ndarray:
    """First positions of the stretches of consecutive positions, whatever the memory layout."""
    return _contiguous(place).runs.position


def _run_length(place: Placement) -> int:
    return _contiguous(place).runs.length


def _contiguous(place: Placement) -> Placement:
    if place.local.is_contiguous():
        return place
    shell = torch.empty(place.local.shape, device="meta", dtype=place.local.dtype)
    return Placement(place.name, shell, shell, place.shape, place.offset)


def _stored(terms: Sequence[Term], device: torch.device) -> tuple[int, int, int, int, Tensor, Tensor]:
    """Kind and law that all terms of a tensor share, and the factors or values of all terms in one array."""
    empty = torch.zeros(1, device=device)
    kinds = {type(term) for term in terms}
    if len(kinds) > 1:
        raise UsageError("The Triton backend adds terms of one kind to a tensor at a time: use backend='torch'.")
    if not terms or isinstance(terms[0], Noise):
        laws = {LAW_CODES[term.law] for term in terms if isinstance(term, Noise)} or {0}
        masks = {None if term.mask is None else term.mask.data_ptr() for term in terms if isinstance(term, Noise)}
        if len(laws) > 1 or len(masks) > 1:
            raise UsageError("The Triton backend adds terms of one law and mask to a tensor: use backend='torch'.")
        return 0, laws.pop(), 1, 1, empty, empty
    factors = [term for term in terms if isinstance(term, Factors)]
    if factors:
        rank, columns = factors[0].right.shape
        left, right = torch.stack([f.left for f in factors]), torch.stack([f.right for f in factors])
        return 1, 0, rank, columns, left, right
    return 2, 0, 1, 1, torch.stack([t.values.flatten() for t in terms if isinstance(t, Values)]), empty
