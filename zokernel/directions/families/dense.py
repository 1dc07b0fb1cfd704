r"""Dense directions: every coordinate of every tensor is random."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zokernel.directions.backends import dispatch
from zokernel.directions.base import Directions, Sweep, by_name, scales_by_tensor
from zokernel.directions.philox import stream_key
from zokernel.directions.terms import Job, Noise, Term, affine
from zokernel.directions.weights.placement import Fingerprint, Placement, fingerprint, place_all
from zokernel.distributions import Distribution, direction_distribution

GAINS_KEPT = 256
SWEEPS_KEPT = 8


class Dense(Directions):
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

    def __init__(self, distribution: str | Distribution = "rademacher", *, backend: str = "auto"):
        super().__init__(backend)
        self.distribution = direction_distribution(distribution)
        # Norms of recent sphere directions: each is swept over three times a step, but measured once.
        self._gains: dict[tuple[object, ...], float] = {}
        # Recent prepared sweeps, by weights, seed and number of directions.
        self._prepared: deque[tuple[object, Fingerprint, Any]] = deque(maxlen=SWEEPS_KEPT)

    def __repr__(self) -> str:
        return f"Dense({self.distribution.name!r})"

    @property
    def couples_tensors(self) -> bool:
        """Whether the radius is that of all tensors together: for the sphere."""
        return not self.distribution.independent

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return each tensor's noise; see :meth:`Directions.terms`."""
        if self.distribution.name != "sphere":
            return [Noise(self.distribution.name, stream_key(seed, p.name), step, index) for p in places]
        noises = [Noise("gaussian", stream_key(seed, p.name), step, index) for p in places]
        gain = self._sphere_gain(places, noises, (seed, step, index))
        return [replace(noise, gain=gain) for noise in noises]

    def _sphere_gain(self, places: Sequence[Placement], noises: Sequence[Noise], draw: tuple[int, int, int]) -> float:
        cache_key = (*draw, *((p.name, p.shape) for p in places))
        if cache_key not in self._gains:
            if len(self._gains) >= GAINS_KEPT:
                self._gains.pop(next(iter(self._gains)))
            dim = sum(place.numel for place in places)
            norm = math.sqrt(dispatch.squared_norm(places, noises, self.backend))
            self._gains[cache_key] = math.sqrt(dim) / norm if norm else 1.0
        return self._gains[cache_key]

    def _sweep_prepared(self, sweep: Sweep) -> bool:
        """Add noise by tables that are made once (on the CPU only signs, to float32); return whether it was added."""
        if type(self) is not Dense or self.distribution.name == "sphere" or not sweep.draws or not sweep.tensors:
            return False
        weights = fingerprint(sweep.tensors)
        if weights is None:
            return False
        names, count = weights[0], len(sweep.draws)
        scales = scales_by_tensor(sweep.scale, names, count)
        decays = [by_name(sweep.decay, name, "decay") for name in names]
        split = {decay: affine(decay) for decay in set(decays)}
        if not all(map(all, scales)) or any(keep != 1.0 for keep, _ in split.values()):
            return False
        prepared = self._prepare(weights, sweep, count)
        if prepared is None:
            return False
        prepared(sweep.draws, scales, [split[decay][1] for decay in decays], sweep.rounding)
        dispatch.mark_changed(sweep.tensors.values())
        return True

    def _prepare(self, weights: Fingerprint, sweep: Sweep, count: int) -> Any:
        """Return the prepared sweep over these weights, made if need be; None if no backend has one."""
        key = (sweep.seed, count, sweep.rule)
        for known, known_weights, prepared in self._prepared:
            if known == key and known_weights == weights:
                return prepared
        places = place_all(sweep.tensors)
        devices = {place.local.device for place in places}
        backend = dispatch.preparing(self.distribution.name, set(weights[-1]), devices, self.backend, sweep.rule)
        made = None
        if backend is not None:
            by_index = [self.terms(places, seed=sweep.seed, step=0, index=index) for index in range(count)]
            ones = (1.0,) * count
            jobs = [
                Job(place, terms, ones, sweep.rule, rounding=(*stream_key(sweep.seed, place.name, "rounding"), 0, 0))
                for place, terms in zip(places, zip(*by_index))
            ]
            kept = {place.name for place in places}
            rows = [number for number, name in enumerate(sweep.tensors) if name in kept]
            made = backend.PreparedSweep(jobs, rows)
        self._prepared.append((key, weights, made))
        return made
