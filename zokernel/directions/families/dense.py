r"""Dense directions: every coordinate of every tensor is random."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.directions.backends import dispatch
from zokernel.directions.base import Directions, Sweep, by_name, scales_by_tensor
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement, place_all
from zokernel.directions.terms import NEAR_ONE, Job, Noise, Rule, Term
from zokernel.distributions import Distribution, direction_distribution

MAX_GAINS = 256
MAX_SWEEPS = 8
PLAIN = frozenset({Tensor, nn.Parameter})
Fingerprint = tuple[list[str], list[int], list[torch.Size], list[tuple[int, ...]], list[torch.dtype]]
"""Names, addresses, shapes, strides and dtypes of some tensors: all that a prepared sweep depends on."""


class Dense(Directions):
    r"""Directions :math:`z \in R^d` with identity covariance, over all tensors together.

    ``rademacher`` takes one random bit per element, is exact in every dtype and has the smallest kernel error;
    ``gaussian`` and ``uniform`` take one 32-bit word per element.  ``sphere`` is the Gaussian scaled to norm
    :math:`\sqrt d` over all tensors of the call, so a call must name all of them.

    Args:
        distribution: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If there is no such distribution of directions.

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
        # Norms of recent sphere directions: each is needed three times per step, but measured once.
        self._gains: dict[tuple[object, ...], float] = {}
        # Recent prepared sweeps, by weights, seed and number of directions.
        self._prepared: deque[tuple[object, Fingerprint, Any]] = deque(maxlen=MAX_SWEEPS)

    def __getstate__(self) -> dict[str, Any]:
        # Prepared sweeps hold the addresses of weights, and a copy may serve others.
        return vars(self) | {"_gains": {}, "_prepared": deque(maxlen=MAX_SWEEPS)}

    def __repr__(self) -> str:
        return f"Dense({self.distribution.name!r})"

    @property
    def couples_tensors(self) -> bool:
        """Whether the direction has a fixed norm over all tensors together (``sphere``)."""
        return self.distribution.is_sphere

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
            if len(self._gains) >= MAX_GAINS:
                self._gains.pop(next(iter(self._gains)))
            dim = sum(place.numel for place in places)
            norm = math.sqrt(dispatch.squared_norm(places, noises, self.backend))
            self._gains[cache_key] = math.sqrt(dim) / norm if norm else 1.0
        return self._gains[cache_key]

    def _sweep_prepared(self, tensors: Mapping[str, Tensor], sweep: Sweep) -> bool:
        """Add noise by tables that are made once (on the CPU only signs, to float32); return whether it was added."""
        rules = set(sweep.rule.values()) if isinstance(sweep.rule, Mapping) else {sweep.rule}
        gridded = sweep.old_scale is not None or sweep.grid is not None
        if type(self) is not Dense or self.distribution.name == "sphere" or not sweep.draws:
            return False
        if gridded or len(rules) != 1:
            return False
        weights = fingerprint(tensors)
        if weights is None:
            return False
        names, count = weights[0], len(sweep.draws)
        scales = scales_by_tensor(sweep.scale, names, count)
        decays = [by_name(sweep.decay, name, "decay") for name in names]
        low, high = NEAR_ONE
        if not all(map(all, scales)) or not all(low <= decay <= high for decay in set(decays)):
            return False
        prepared = self._prepare_sweep(tensors, weights, sweep.seed, count, rules.pop())
        if prepared is None:
            return False
        prepared(sweep.draws, scales, [decay - 1.0 for decay in decays], sweep.rounding)
        # Compiled code writes behind torch's back: let autograd notice that saved weights have changed.
        torch.autograd.graph.increment_version([t for t in tensors.values() if not t.is_inference()])
        return True

    def _prepare_sweep(
        self, tensors: Mapping[str, Tensor], weights: Fingerprint, seed: int, count: int, rule: Rule
    ) -> Any:
        """Return the prepared sweep over these weights, made if need be; None if no backend has one."""
        key = (seed, count, rule)
        for sweep_key, sweep_weights, prepared in self._prepared:
            if sweep_key == key and sweep_weights == weights:
                return prepared
        places = place_all(tensors)
        devices = {place.local.device for place in places}
        backend = dispatch.preparing(self.distribution.name, set(weights[-1]), devices, self.backend, rule)
        new_sweep = None
        if backend is not None:
            by_index = [self.terms(places, seed=seed, step=0, index=index) for index in range(count)]
            ones = (1.0,) * count
            jobs = [
                Job(place, terms, ones, rule, rounding=(*stream_key(seed, place.name, "rounding"), 0, 0))
                for place, terms in zip(places, zip(*by_index))
            ]
            names = {place.name for place in places}
            rows = [number for number, name in enumerate(tensors) if name in names]
            new_sweep = backend.PreparedSweep(jobs, rows)
        self._prepared.append((key, weights, new_sweep))
        return new_sweep


def fingerprint(tensors: Mapping[str, Tensor]) -> Fingerprint | None:
    """Return what identifies some weights and where they lie; None if there are none, or not only plain tensors.

    It is taken before every sweep, so it is made of lists, which are quick to make and to compare.
    """
    values = list(tensors.values())
    if not PLAIN.issuperset(map(type, values)) or {t.layout for t in values} != {torch.strided}:
        return None
    addresses = [t.data_ptr() for t in values]
    return list(tensors), addresses, [t.shape for t in values], [t.stride() for t in values], [t.dtype for t in values]
