r"""Flipout: the directions of a step share one dense matrix, whose rows and columns each flips by signs of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zokernel.directions.base import Directions, Sweep, scales_of
from zokernel.directions.families.factor_blocks import Blocks, SummedTerms, adds_in_float32
from zokernel.directions.families.factors import Draw, draw_matrices
from zokernel.directions.families.low_rank import LowRank
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Noise, Term, Values
from zokernel.distributions import Distribution, direction_distribution
from zokernel.errors import UsageError


class Flipout(Directions):
    r"""Directions :math:`z_i = U \circ (r_i s_i^T)` for every m x n matrix; dense and independent for vectors.

    :math:`U` has independent entries of variance one and is new in every step; the signs :math:`r_i, s_i` are new in
    every direction.  So :math:`E[(g \cdot z) z] = g`, and two directions of a step are uncorrelated, though not
    independent.  A sum over many directions is one product: :math:`\sum_i c_i z_i = U \circ (R\, diag(c)\, S^T)`.

    Args:
        distribution: Distribution of U and of the vectors: ``gaussian``, ``rademacher`` or ``uniform``.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If the coordinates depend on each other.

    Example:
        >>> weights = {"w": torch.zeros(3, 2)}
        >>> one, two = (Flipout()(weights, seed=0, step=0, index=i)["w"] for i in (0, 1))
        >>> torch.equal(one.abs(), two.abs()), torch.equal(one, two)
        (True, False)

    References:
        Wen et al. (2018), Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches, arXiv:1803.04386;
        GRZO (2026), arXiv:2606.02857.
    """

    def __init__(self, distribution: str | Distribution = "gaussian", *, backend: str = "auto"):
        super().__init__(backend)
        self.distribution = direction_distribution(distribution)
        if not self.distribution.independent:
            raise UsageError(f"Flipout needs independent entries, unlike {self.distribution.name!r}: use gaussian.")
        self.signs = LowRank(1, distribution="rademacher", refresh=0, backend=backend)

    def __repr__(self) -> str:
        return f"Flipout({self.distribution.name!r})"

    def shared(self, place: Placement, *, seed: int, step: int) -> Tensor:
        """Return U of one step for a tensor of two or more dimensions: (m, n) float32."""
        rows, columns = place.shape[0], math.prod(place.shape[1:])
        key = stream_key(seed, place.name, "flipout")
        return draw_matrices(
            [Draw(rows, columns, self.distribution.name, key, step, 0, place.local.device)], self.backend
        )[0]

    def flips(
        self,
        places: Sequence[Placement],
        *,
        seed: int,
        step: int,
        indices: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Blocks]:
        """Return by name the signs of some directions: of rows, (K, m, 1), and of columns, (K, 1, n)."""
        return self.signs.blocks(places, seed=seed, step=step, indices=indices, dtype=dtype)

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return whole matrices, and noise for vectors; see :meth:`Directions.terms`."""
        return [self._term(place, seed, step, index) for place in places]

    def _term(self, place: Placement, seed: int, step: int, index: int) -> Term | None:
        if place.numel == 0:
            return None
        if len(place.shape) < 2:
            return Noise(self.distribution.name, stream_key(seed, place.name), step, index)
        signs = self.signs.factors(place, seed=seed, step=step, index=index)
        return Values((self.shared(place, seed=seed, step=step) * signs.left * signs.right).flatten())

    def _sweep_places(self, places: Sequence[Placement], sweep: Sweep) -> dict[str, float]:
        """Add many directions of one step to one matrix after the other; see :meth:`Directions.sweep_`."""
        matrices = [place for place in places if len(place.shape) >= 2 and place.numel]
        if not adds_in_float32(matrices, sweep):
            return super()._sweep_places(places, sweep)
        (step,) = {step for step, _ in sweep.draws}
        peaks: dict[str, float] = {}
        for place in matrices:
            peaks |= SummedTerms({place.name: self._sum(place, sweep, step)}, self.backend).sweep_once([place], sweep)
        vectors = [place for place in places if len(place.shape) < 2 or not place.numel]
        return peaks | (super()._sweep_places(vectors, sweep) if vectors else {})

    def _sum(self, place: Placement, sweep: Sweep, step: int) -> Values:
        """Return the sum of all directions of a sweep on one matrix."""
        rows, columns = self.flips([place], seed=sweep.seed, step=step, indices=[i for _, i in sweep.draws])[place.name]
        scales = torch.tensor(scales_of(sweep.scale, place.name, len(sweep.draws)), device=rows.device)
        weighted = (rows[:, :, 0] * scales[:, None]).T @ columns[:, 0]
        return Values((self.shared(place, seed=sweep.seed, step=step) * weighted).flatten())
