r"""Dense directions: every coordinate of every tensor is random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from zokernel.directions import engine
from zokernel.directions.family import Family
from zokernel.directions.laws import Law, get_law
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Noise, Term

GAINS_KEPT = 256


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
