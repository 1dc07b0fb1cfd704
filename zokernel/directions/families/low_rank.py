r"""Low-rank directions with a lazily redrawn factor (LOZO)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zokernel.directions.base import Sweep, scales_of
from zokernel.directions.families.factor_blocks import Blocks, FactorBlocks, SummedTerms, adds_in_float32
from zokernel.directions.families.factored import Factored
from zokernel.directions.families.factors import Draw, Recent, matrix_shape
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Factors, Term
from zokernel.distributions import Distribution
from zokernel.values import is_whole, plain_number

# With refresh=0, so many consecutive directions of a step are consecutive rows of one stream.
SHARED = 1 << 16


class LowRank(Factored):
    r"""Directions :math:`z = U V^T / \sqrt r` for every m x n matrix; dense for vectors and scalars.

    The entries of :math:`U` (m x r) and :math:`V` (n x r) are independent with variance one.  U is new in every
    direction; V has its own seed and stays for ``refresh`` steps, so either can be drawn without the other.  With
    ``refresh=0`` V is new in every direction, too, as many directions of one step that are added need it.  The factor
    makes :math:`E|z|^2 = m n` and :math:`E[(g \cdot z) z] = g`; the published :math:`U V^T` is larger by
    :math:`\sqrt r` and its estimate by r.

    Args:
        rank: r; at most the smaller side of a matrix is used.
        distribution: Distribution of the entries and of the vectors: ``gaussian``, ``rademacher`` or ``uniform``.
        refresh: Steps for which V stays; 0 if it is new in every direction.
        most_square: Refold thin matrices (adapters) into the most square ones.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If the rank or refresh interval is not positive, or the coordinates depend on each other.

    Example:
        >>> z = LowRank(2)({"w": torch.zeros(30, 20)}, seed=0, step=0, index=0)["w"]
        >>> int(torch.linalg.matrix_rank(z))
        2

    References:
        Chen et al. (2024), Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures,
        arXiv:2410.07698.
    """

    def __init__(
        self,
        rank: int = 2,
        *,
        distribution: str | Distribution = "gaussian",
        refresh: int = 50,
        most_square: bool = False,
        backend: str = "auto",
    ):
        refresh = plain_number("refresh", refresh)
        stays = 1 if is_whole(refresh, 0) and refresh == 0 else refresh
        super().__init__(rank, distribution, stays, most_square, backend)
        self.refresh = refresh
        self._lefts: Recent[Draw, Tensor] = Recent(1024)
        self._rights: Recent[Draw, Tensor] = Recent(4096)
        self._blocks = FactorBlocks(self._sides)

    def shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the rows, columns and rank that a tensor of this shape is given.

        Args:
            shape: Shape of a tensor of at least two dimensions.

        Returns:
            m, n and r.
        """
        rows, columns = matrix_shape(shape, self.most_square)
        return rows, columns, min(self.rank, rows, columns)

    def left(
        self, name: str, shape: Sequence[int], *, seed: int, step: int, index: int, device: torch.device | None = None
    ) -> Tensor:
        """Return U of one direction.

        Args:
            name: The tensor's name.
            shape: Its shape.
            seed: Seed of the run.
            step: Step of the run.
            index: Which direction of that step.
            device: Where to put it; the CPU when not given.

        Returns:
            (m, r) float32.
        """
        draw = self._left(name, shape, seed, step, index, device or torch.device("cpu"))
        return self._lefts.get_all([draw], self.draw)[0]

    def right(
        self,
        name: str,
        shape: Sequence[int],
        *,
        seed: int,
        step: int,
        index: int = 0,
        device: torch.device | None = None,
    ) -> Tensor:
        """Return the transpose of the V that serves a direction.

        Args:
            name: The tensor's name.
            shape: Its shape.
            seed: Seed of the run.
            step: Any step of the epoch.
            index: Which direction of that step; any, where V stays for several steps.
            device: Where to put it; the CPU when not given.

        Returns:
            (r, n) float32.
        """
        draw = self._right(name, shape, seed, step, index, device or torch.device("cpu"))
        return self._rights.get_all([draw], self.draw)[0]

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return factors for matrices, drawn together, and noise for vectors.

        See :meth:`zokernel.directions.Directions.terms`.
        """
        matrices = [(p.name, p.shape, p.local.device) for p in places if len(p.shape) >= 2 and p.numel]
        lefts = [self._left(name, shape, seed, step, index, device) for name, shape, device in matrices]
        self._lefts.get_all(lefts, self.draw)
        rights = [self._right(name, shape, seed, step, index, device) for name, shape, device in matrices]
        self._rights.get_all(rights, self.draw)
        return super().terms(places, seed=seed, step=step, index=index)

    def blocks(
        self,
        places: Sequence[Placement],
        *,
        seed: int,
        step: int,
        indices: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Blocks]:
        r"""Return the factors of several directions of a step on some matrices; only with ``refresh=0``.

        Args:
            places: The matrices, all on one device.
            seed: Seed of the run.
            step: Step of the run.
            indices: Which directions of that step, K of them.
            dtype: Type of the factors.

        Returns:
            By name, U (K, m, r) and the transpose of V (K, r, n), without the factor :math:`1/\sqrt r`.  They stay as
            they are until those of another step, or of other directions, are requested.
        """
        return self._blocks(places, self.backend, seed=seed, step=step, indices=indices, dtype=dtype)

    def _sweep_places(self, places: Sequence[Placement], sweep: Sweep) -> dict[str, float]:
        """Add many directions of one step as a product of wide factors; see :class:`zokernel.directions.Directions`."""
        matrices = [p for p in places if len(p.shape) >= 2 and p.numel]
        if self.refresh or not adds_in_float32(matrices, sweep):
            return super()._sweep_places(places, sweep)
        (step,) = {step for step, _ in sweep.draws}
        blocks = self.blocks(matrices, seed=sweep.seed, step=step, indices=[index for _, index in sweep.draws])
        sums: dict[str, Term] = {}
        for place in matrices:
            left, right = blocks[place.name]
            scales = torch.tensor(scales_of(sweep.scale, place.name, len(sweep.draws)), device=left.device)
            weighted = left * (scales / math.sqrt(left.shape[2]))[:, None, None]
            wide = weighted.permute(1, 0, 2).reshape(left.shape[1], -1).contiguous()
            sums[place.name] = Factors(wide, right.reshape(-1, right.shape[2]))
        peaks = SummedTerms(sums, self.backend).sweep_once(matrices, sweep)
        vectors = [p for p in places if len(p.shape) < 2 or not p.numel]
        return peaks | (super()._sweep_places(vectors, sweep) if vectors else {})

    def _sides(self, place: Placement, seed: int, step: int, index: int) -> tuple[Draw, Draw]:
        device = place.local.device
        left = self._left(place.name, place.shape, seed, step, index, device)
        return left, self._right(place.name, place.shape, seed, step, index, device)

    def factors(self, place: Placement, *, seed: int, step: int, index: int) -> Factors:
        """Return U, V and the scale of one direction; see :meth:`Factored.factors`."""
        device = place.local.device
        left = self.left(place.name, place.shape, seed=seed, step=step, index=index, device=device)
        right = self.right(place.name, place.shape, seed=seed, step=step, index=index, device=device)
        return Factors(left, right, 1.0 / math.sqrt(right.shape[0]))

    def _left(self, name: str, shape: Sequence[int], seed: int, step: int, index: int, device: torch.device) -> Draw:
        rows, _, rank = self.shape(shape)
        key = stream_key(seed, name, "lowrank-left")
        if self.refresh == 0:
            return Draw(rows, rank, self.distribution.name, key, step, index // SHARED, device, index % SHARED * rows)
        return Draw(rows, rank, self.distribution.name, key, step, index, device)

    def _right(self, name: str, shape: Sequence[int], seed: int, step: int, index: int, device: torch.device) -> Draw:
        _, columns, rank = self.shape(shape)
        key = stream_key(seed, name, "lowrank-right")
        if self.refresh == 0:
            return Draw(
                rank, columns, self.distribution.name, key, step, index // SHARED, device, index % SHARED * rank
            )
        return Draw(rank, columns, self.distribution.name, key, step // self.refresh, 0, device)
