r"""Dispatch: hand each tensor of a sweep to the backend that is fastest where it lives.

* CPU: ``numba``, compiled and fused; NVIDIA and AMD GPUs: ``triton``, the same in Triton;
* anything else: ``torch``, the reference.

Rademacher, Gaussian and uniform directions have the same bits on all of them.
"""

from __future__ import annotations

import importlib
import logging
from collections import defaultdict
from collections.abc import Sequence, Set
from functools import lru_cache
from types import ModuleType

import torch

from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job, Noise, Rule
from zokernel.errors import UsageError

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "numba", "triton", "torch")
_MODULES = {"numba": "numba.backend", "triton": "triton.backend", "torch": "reference"}


def sweep(jobs: Sequence[Job], backend: str = "auto") -> list[float]:
    """Add every job's terms to its tensor in place, in one read and one write of the weights.

    Args:
        jobs: What to do, one per tensor.
        backend: ``auto``, or the backend to use for every tensor.

    Returns:
        One number per job: for grid rules the largest magnitude reached, else zero.

    Raises:
        UsageError: If there is no such backend, or it cannot work where a tensor lives.
    """
    by_backend: dict[str, list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        if job.place.local.numel():
            by_backend[choose_backend(job.place.local.device, backend)].append(number)
    peaks = [0.0] * len(jobs)
    with torch.no_grad():
        for name, numbers in by_backend.items():
            job_peaks = _load(name).sweep([jobs[n] for n in numbers])
            for number, peak in zip(numbers, job_peaks):
                peaks[number] = peak
    # Compiled backends write behind torch's back: let autograd notice that saved weights have changed.
    torch.autograd.graph.increment_version([job.place.local for job in jobs if not job.place.local.is_inference()])
    return peaks


def squared_norm(places: Sequence[Placement], noises: Sequence[Noise], backend: str = "auto") -> float:
    """Return the squared norm of noise over whole tensors, shards held elsewhere included.

    Args:
        places: The tensors.
        noises: One per tensor; gain and mask are ignored.
        backend: As for :func:`sweep`.

    Returns:
        The sum of squares, in float64.
    """
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for number, place in enumerate(places):
        by_device[place.local.device].append(number)
    sums = [0.0] * len(places)
    for device, numbers in by_device.items():
        module = _load(choose_backend(device, backend))
        sizes = [places[number].numel for number in numbers]
        for number, total in zip(numbers, module.sums_of_squares([noises[n] for n in numbers], sizes, device)):
            sums[number] = total
    return sum(sums)


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist.

    Raises:
        UsageError: If it does not.
    """
    if backend not in BACKENDS:
        raise UsageError(f"There is no directions backend {backend!r}: choose one of {', '.join(BACKENDS)}.")


@lru_cache(maxsize=64)
def choose_backend(device: torch.device, backend: str = "auto") -> str:
    """Return the name of the backend that serves a device.

    Args:
        device: Where the tensor lives.
        backend: ``auto`` or a fixed choice.

    Returns:
        ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If the choice does not exist or does not work on that device.

    Example:
        >>> choose_backend(torch.device("cpu"))
        'numba'
    """
    check_backend(backend)
    if backend == "auto":
        return {"cpu": "numba", "cuda": "triton", "xpu": "triton"}.get(device.type, "torch")
    if backend == "numba" and device.type != "cpu":
        raise UsageError(f"The numba backend works on CPU tensors, not on {device}: use backend='auto'.")
    return backend


def preparing(
    distribution: str, dtypes: Set[torch.dtype], devices: Set[torch.device], backend: str, rule: Rule = Rule.NEAREST
) -> ModuleType | None:
    """Return the backend whose ``PreparedSweep`` and ``PreparedCopies`` serve noise on some weights, or None.

    Args:
        distribution: ``rademacher``, ``gaussian`` or ``uniform``.
        dtypes: Dtypes of the weights.
        devices: Devices of the weights.
        backend: As for :func:`sweep`.
        rule: How results are stored.

    Returns:
        A backend's module; None if they must be swept over job by job.
    """
    if len(devices) != 1:
        return None
    name = choose_backend(next(iter(devices)), backend)
    signs = distribution == "rademacher" and rule == Rule.NEAREST and dtypes == {torch.float32}
    return _load(name) if name == "triton" or (name == "numba" and signs) else None


def _load(name: str) -> ModuleType:
    # Imported on first use: numba and triton take a second each, and most commands need neither.
    return importlib.import_module(f"zokernel.directions.backends.{_MODULES[name]}")
