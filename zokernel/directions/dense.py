r"""Dense directions: every coordinate of every tensor is random."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor

from zokernel.directions import engine
from zokernel.directions.base import Scale
from zokernel.directions.family import Family, by_name, draws_of, scales_of
from zokernel.directions.laws import Law, get_law
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Fingerprint, Placement, fingerprint, place_all
from zokernel.directions.terms import Job, Noise, Term, affine

GAINS_KEPT = 256
SWEEPS_KEPT = 8


class Dense(Family):
    r"""Directions :math:`z \in R^d` with identity covariance, over all tensors together.

    ``rademacher`` takes one random bit an element, is exact in every dtype and has the smallest kernel error (theory
    A.4.1); ``gaussian`` and ``uniform`` take one 32-bit word an element.  ``sphere`` is the Gaussian scaled to norm
    :math:`\sqrt d` over all tensors of the call, so a call must see all of them.

    Args:
        distribution: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If there is no such law.

    Example:
        >>> import torch
        >>> weights = {"w": torch.zeros(2, 3)}
        >>> directions = Dense("rademacher")
        >>> z = directions(weights, seed=0, step=1, index=0)
        >>> directions.add_(weights, 0.5, seed=0, step=1, index=0)
        >>> torch.equal(weights["w"], 0.5 * z["w"])
        True
    """

    def __init__(self, distribution: str | Law = "rademacher", *, backend: str = "auto"):
        super().__init__(backend)
        self.law = get_law(distribution)
        # Norms of recent sphere directions: each is swept over three times a step, but measured once.
        self._gains: dict[tuple[object, ...], float] = {}
        # Recent prepared sweeps, by weights, seed and number of directions.
        self._prepared: dict[tuple[object, ...], Any] = {}

    def __repr__(self) -> str:
        return f"Dense({self.law.name!r})"

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return each tensor's noise; see :meth:`Family.terms`."""
        if self.law.name != "sphere":
            return [Noise(self.law.name, stream_key(seed, p.name), step, index) for p in places]
        noises = [Noise("gaussian", stream_key(seed, p.name), step, index) for p in places]
        gain = self._sphere_gain(places, noises, (seed, step, index))
        return [replace(noise, gain=gain) for noise in noises]

    def _sphere_gain(self, places: Sequence[Placement], noises: Sequence[Noise], draw: tuple[int, int, int]) -> float:
        cache_key = (*draw, *((p.name, p.shape) for p in places))
        if cache_key not in self._gains:
            if len(self._gains) >= GAINS_KEPT:
                self._gains.pop(next(iter(self._gains)))
            dim = sum(place.numel for place in places)
            norm = math.sqrt(engine.squared_norm(places, noises, self.backend))
            self._gains[cache_key] = math.sqrt(dim) / norm if norm else 1.0
        return self._gains[cache_key]

    def _add_prepared(self, tensors: Mapping[str, Tensor], scale: Scale | Mapping[str, Scale], **options: Any) -> bool:
        """Add noise in a sweep that is prepared once (on the CPU signs, to float32); return whether it was added."""
        if type(self) is not Dense or self.law.name == "sphere":
            return False
        seed, step, index, decay = (options[name] for name in ("seed", "step", "index", "decay"))
        draws, weights = draws_of(step, index), fingerprint(tensors)
        if weights is None or not draws:
            return False
        backend = engine.preparing(self.law.name, weights.dtypes, weights.devices, self.backend)
        if backend is None:
            return False
        given = scale if isinstance(scale, Mapping) else dict.fromkeys(tensors, scales_of(scale, "", len(draws)))
        scales = [scales_of(given, name, len(draws)) for name in tensors]
        keep, shift = zip(*[affine(by_name(decay, name, "decay")) for name in tensors])
        if not all(map(all, scales)) or any(factor != 1.0 for factor in keep):
            return False
        self._prepare(backend, weights, tensors, seed, len(draws))(draws, scales, shift)
        engine.mark_changed(tensors.values())
        return True

    def _prepare(
        self, backend: ModuleType, weights: Fingerprint, tensors: Mapping[str, Tensor], seed: int, count: int
    ) -> Any:
        key = (weights, seed, count)
        if key not in self._prepared:
            places = place_all(tensors)
            by_index = [self.terms(places, seed=seed, step=0, index=index) for index in range(count)]
            jobs = [Job(place, terms, (1.0,) * count) for place, terms in zip(places, zip(*by_index))]
            kept = {place.name for place in places}
            rows = [number for number, name in enumerate(tensors) if name in kept]
            if len(self._prepared) >= SWEEPS_KEPT:
                self._prepared.pop(next(iter(self._prepared)))
            self._prepared[key] = backend.PreparedSweep(jobs, rows)
        return self._prepared[key]
