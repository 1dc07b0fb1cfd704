r"""Subspace directions: each matrix moves inside a random r-dimensional row and column space (SubZero)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zokernel.directions.families.factored import Factored
from zokernel.directions.families.factors import Draw, Recent, matrix_shape
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Factors
from zokernel.distributions import Distribution


class Subspace(Factored):
    r"""Directions :math:`z = U Z V^T \sqrt{m n} / r` for every m x n matrix; dense for vectors and scalars.

    :math:`U` (m x r) and :math:`V` (n x r) have orthonormal columns, uniformly distributed, and are redrawn every
    ``refresh`` steps; :math:`Z` (r x r) has independent entries of variance one, new in every direction.  The factor
    makes :math:`E|z|^2 = m n` and, over the draws of U and V, :math:`E[(g \cdot z) z] = g`.

    Args:
        rank: r; at most the smaller side of a matrix is used.
        distribution: Distribution of Z and of the vectors: ``gaussian``, ``rademacher`` or ``uniform``.
        refresh: Steps for which U and V stay.
        most_square: Refold thin matrices (adapters) into the most square ones.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If the rank or refresh interval is not positive, or the coordinates depend on each other.

    Example:
        >>> z = Subspace(2)({"w": torch.zeros(30, 20)}, seed=0, step=0, index=0)["w"]
        >>> int(torch.linalg.matrix_rank(z))
        2

    References:
        Yu et al. (2024), SubZero: Zeroth-Order Fine-Tuning of LLMs in Random Subspaces, arXiv:2410.08989.
    """

    def __init__(
        self,
        rank: int = 8,
        *,
        distribution: str | Distribution = "gaussian",
        refresh: int = 1000,
        most_square: bool = False,
        backend: str = "auto",
    ):
        super().__init__(rank, distribution, refresh, most_square, backend)
        self._bases: Recent[tuple[object, ...], Tensor] = Recent(4096)
        self._cores: Recent[Draw, Tensor] = Recent(4096)

    def basis(self, name: str, side: str, size: int, rank: int, seed: int, epoch: int, device: torch.device) -> Tensor:
        """Return U (``side="left"``) or V (``"right"``) of one epoch of ``refresh`` steps.

        Args:
            name: The tensor's name.
            side: ``left`` or ``right``.
            size: Rows or columns of the matrix.
            rank: Columns of the basis.
            seed: Seed of the run.
            epoch: ``step // refresh``.
            device: Where to put it.

        Returns:
            (size, rank) float32 with orthonormal columns.
        """

        def make() -> Tensor:
            key = stream_key(seed, name, f"subspace-{side}")
            (gaussian,) = self.draw([Draw(size, rank, "gaussian", key, epoch, 0, device)])
            q, r = torch.linalg.qr(gaussian.double())
            # The sign makes Q unique, hence uniformly distributed and the same with every LAPACK.
            return (q * torch.sign(torch.diagonal(r))).float().contiguous()

        return self._bases.get((name, side, size, rank, seed, epoch, device), make)

    def factors(self, place: Placement, *, seed: int, step: int, index: int) -> Factors:
        """Return U Z, V and the scale of one direction; see :meth:`Factored.factors`."""
        rows, columns = matrix_shape(place.shape, self.most_square)
        rank, epoch, device = min(self.rank, rows, columns), step // self.refresh, place.local.device
        left = self.basis(place.name, "left", rows, rank, seed, epoch, device)
        right = self.basis(place.name, "right", columns, rank, seed, epoch, device)
        core = self._cores.get_all([self._core(place, rank, seed, step, index)], self.draw)[0]
        moved = (left.double() @ core.double()).float()
        return Factors(moved, right.T.contiguous(), math.sqrt(rows * columns) / rank)

    def _core(self, place: Placement, rank: int, seed: int, step: int, index: int) -> Draw:
        key = stream_key(seed, place.name, "subspace-core")
        return Draw(rank, rank, self.distribution.name, key, step, index, place.local.device)
