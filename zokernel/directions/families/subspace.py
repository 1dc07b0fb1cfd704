r"""Subspace directions: each matrix moves inside random row and column spaces (SubZero), or column spaces (ZO-Muon)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zokernel.directions.families.factored import Factored
from zokernel.directions.families.factors import Draw, Recent, matrix_shape
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Factors
from zokernel.distributions import Distribution
from zokernel.errors import UsageError


class Subspace(Factored):
    r"""Directions :math:`z = U Z V^T \sqrt{m n} / r` for every m x n matrix; dense for vectors and scalars.

    :math:`U` (m x r) and :math:`V` (n x r) have orthonormal columns, uniformly distributed, and are redrawn every
    ``refresh`` steps; :math:`Z` (r x r) has independent entries of variance one, new in every direction.  The factor
    makes :math:`E|z|^2 = m n` and, over the draws of U and V, :math:`E[(g \cdot z) z] = g`.

    With ``sides="left"`` only the columns keep to a subspace: :math:`z = U Z \sqrt{m/r}` with :math:`Z` (r x n).

    Args:
        rank: r; at most the smaller side of a matrix is used, or its rows with ``sides="left"``.
        distribution: Distribution of Z and of the vectors: ``gaussian``, ``rademacher`` or ``uniform``.
        refresh: Steps for which U and V stay.
        most_square: Refold thin matrices (adapters) into the most square ones.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.
        sides: ``both``, or ``left`` for U alone.

    Raises:
        UsageError: If the rank or refresh interval is not positive, the coordinates depend on each other, or the sides
            are neither of the two.

    Example:
        >>> z = Subspace(2)({"w": torch.zeros(30, 20)}, seed=0, step=0, index=0)["w"]
        >>> int(torch.linalg.matrix_rank(z))
        2

    References:
        Yu et al. (2024), Zeroth-Order Fine-Tuning of LLMs in Random Subspaces, arXiv:2410.08989; Lang et al.
        (2026), Powering Up Zeroth-Order Training via Subspace Gradient Orthogonalization, arXiv:2602.17155.
    """

    def __init__(
        self,
        rank: int = 8,
        *,
        distribution: str | Distribution = "gaussian",
        refresh: int = 1000,
        most_square: bool = False,
        backend: str = "auto",
        sides: str = "both",
    ):
        super().__init__(rank, distribution, refresh, most_square, backend)
        if sides not in ("both", "left"):
            raise UsageError(f"sides must be 'both' or 'left', not {sides!r}.")
        self.sides, self._epoch = sides, -1
        self._bases: Recent[tuple[object, ...], Tensor] = Recent(4096)
        self._cores: Recent[Draw, Tensor] = Recent(4096)

    def __repr__(self) -> str:
        return super().__repr__()[:-1] + (", sides='left')" if self.sides == "left" else ")")

    def shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the rows, columns and rank that a tensor of this shape is given.

        Args:
            shape: Shape of a tensor of at least two dimensions.

        Returns:
            m, n and r.
        """
        rows, columns = matrix_shape(shape, self.most_square)
        return rows, columns, min(self.rank, rows) if self.sides == "left" else min(self.rank, rows, columns)

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

        if epoch != self._epoch:  # those of a past epoch would only take memory
            self._bases, self._epoch = Recent(self._bases.size), epoch
        return self._bases.get((name, side, size, rank, seed, epoch, device), make)

    def factors(self, place: Placement, *, seed: int, step: int, index: int) -> Factors:
        """Return U Z, V and the scale of one direction, or U, Z and the scale; see :meth:`Factored.factors`."""
        rows, columns, rank = self.shape(place.shape)
        epoch, device = step // self.refresh, place.local.device
        left = self.basis(place.name, "left", rows, rank, seed, epoch, device)
        draw = self._core(place.name, place.shape, seed, step, index, device)
        if self.sides == "left":
            return Factors(left, self.draw([draw])[0], math.sqrt(rows / rank))
        right = self.basis(place.name, "right", columns, rank, seed, epoch, device)
        core = self._cores.get_all([draw], self.draw)[0]
        moved = (left.double() @ core.double()).float()
        return Factors(moved, right.T.contiguous(), math.sqrt(rows * columns) / rank)

    def combine(
        self,
        name: str,
        shape: Sequence[int],
        coefficients: Mapping[int, float],
        *,
        seed: int,
        step: int,
        device: torch.device | None = None,
    ) -> Tensor:
        r"""Return :math:`\sum_i c_i Z_i`, what a sum of directions is in the coordinates of the subspace.

        Args:
            name: The tensor's name.
            shape: Its shape, of at least two dimensions.
            coefficients: :math:`c_i` by index of the direction.
            seed: Seed of the run.
            step: Step of the run.
            device: Where to put it; the CPU when not given.

        Returns:
            (r, r) float64, or (r, n) with ``sides="left"``.
        """
        device = device or torch.device("cpu")
        cores = self.draw([self._core(name, shape, seed, step, index, device) for index in coefficients])
        total = torch.zeros_like(cores[0], dtype=torch.float64)
        for core, coefficient in zip(cores, coefficients.values()):
            total.add_(core.double(), alpha=coefficient)
        return total

    def _core(self, name: str, shape: Sequence[int], seed: int, step: int, index: int, device: torch.device) -> Draw:
        _, columns, rank = self.shape(shape)
        width = columns if self.sides == "left" else rank
        return Draw(rank, width, self.distribution.name, stream_key(seed, name, "subspace-core"), step, index, device)
