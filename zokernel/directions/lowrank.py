r"""Low-rank directions with a lazily redrawn factor (LOZO)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zokernel.directions.factored import Factored
from zokernel.directions.factors import Recent, draw_matrix, matrix_shape
from zokernel.directions.laws import Law
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Factors


class LowRank(Factored):
    r"""Directions :math:`z = U V^T / \sqrt r` for every m x n matrix; dense for vectors and scalars.

    The entries of :math:`U` (m x r) and :math:`V` (n x r) are independent with variance one.  U is new in every
    direction; V has its own seed and stays for ``refresh`` steps, so either can be drawn without the other.  The factor
    makes :math:`E|z|^2 = m n` and :math:`E[(g \cdot z) z] = g`; the published :math:`U V^T` is larger by
    :math:`\sqrt r` and its estimate by r (methods 2.5).

    Args:
        distribution: Law of the entries and of the vectors: ``gaussian``, ``rademacher`` or ``uniform``.
        rank: r; at most the smaller side of a matrix is used.
        refresh: Steps for which V stays.
        most_square: Refold thin matrices (adapters) into the most square ones.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If the rank or refresh interval is not positive, or the law has dependent coordinates.

    Example:
        >>> z = LowRank(rank=2)({"w": torch.zeros(30, 20)}, seed=0, step=0, index=0)["w"]
        >>> int(torch.linalg.matrix_rank(z))
        2
    """

    def __init__(
        self,
        distribution: str | Law = "gaussian",
        *,
        rank: int = 2,
        refresh: int = 50,
        most_square: bool = False,
        backend: str = "auto",
    ):
        super().__init__(distribution, rank, refresh, most_square, backend)
        self._lefts: Recent[Tensor] = Recent(1024)
        self._rights: Recent[Tensor] = Recent(4096)

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
        device = device or torch.device("cpu")
        rows, _, rank = self.shape(shape)
        key = stream_key(seed, name, "lowrank-left")
        return self._lefts.get(
            (name, rows, rank, seed, step, index, device),
            lambda: draw_matrix(rows, rank, self.law.name, key, step, index, device, self.backend),
        )

    def right(
        self, name: str, shape: Sequence[int], *, seed: int, step: int, device: torch.device | None = None
    ) -> Tensor:
        """Return the transpose of the V that serves ``step``.

        Args:
            name: The tensor's name.
            shape: Its shape.
            seed: Seed of the run.
            step: Any step of the epoch.
            device: Where to put it; the CPU when not given.

        Returns:
            (r, n) float32.
        """
        device = device or torch.device("cpu")
        _, columns, rank = self.shape(shape)
        key, epoch = stream_key(seed, name, "lowrank-right"), step // self.refresh
        return self._rights.get(
            (name, columns, rank, seed, epoch, device),
            lambda: draw_matrix(rank, columns, self.law.name, key, epoch, 0, device, self.backend),
        )

    def factors(self, place: Placement, *, seed: int, step: int, index: int) -> Factors:
        """Return U, V and the scale of one direction; see :meth:`Factored.factors`."""
        device = place.local.device
        left = self.left(place.name, place.shape, seed=seed, step=step, index=index, device=device)
        right = self.right(place.name, place.shape, seed=seed, step=step, device=device)
        return Factors(left, right, 1.0 / math.sqrt(right.shape[0]))
