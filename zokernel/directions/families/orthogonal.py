r"""Orthogonal directions: those of one step are exactly orthogonal to each other; for small dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zokernel.directions.base import Directions
from zokernel.directions.families.factors import Draw, Recent, draw_matrices
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Term, Values
from zokernel.errors import UsageError
from zokernel.values import is_whole, plain_number

MAX_ELEMENTS = 1 << 27


class Orthogonal(Directions):
    r"""Directions :math:`z_i = \sqrt d\, q_i` with orthonormal :math:`q_0, \dots, q_{k-1}`, uniformly distributed.

    Each is uniform on the sphere, so :math:`E|z|^2 = d` and :math:`E[(g \cdot z) z] = g`; with k = d directions the
    average :math:`\frac1d \sum_i (g \cdot z_i) z_i = g` holds exactly.  Index i belongs to frame ``i // size``.
    A frame is stored (d x size float64 while it is made), so this is for small d.

    Args:
        size: k, the directions of a frame; at most d.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If the size is not positive.

    Example:
        >>> weights = {"w": torch.zeros(2, 3)}
        >>> family = Orthogonal(size=6)
        >>> z = torch.stack([family(weights, seed=0, step=0, index=i)["w"].flatten() for i in range(6)])
        >>> torch.allclose(z @ z.T, 6 * torch.eye(6), atol=1e-5)
        True
    """

    def __init__(self, size: int, *, backend: str = "auto"):
        super().__init__(backend)
        size = plain_number("size", size)
        if not is_whole(size):
            raise UsageError(f"A frame must hold a whole number of directions, at least 1, not {size!r}.")
        self.size = size
        self._frames: Recent[tuple[object, ...], dict[str, Tensor]] = Recent(2)

    def __repr__(self) -> str:
        return f"Orthogonal(size={self.size})"

    @property
    def couples_tensors(self) -> bool:
        """Always: the directions are orthogonal over all tensors together."""
        return True

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return each tensor's part of one column of the frame; see :meth:`Directions.terms`."""
        dim = sum(place.numel for place in places)
        if dim == 0:
            return [None] * len(places)
        if self.size > dim or self.size * dim > MAX_ELEMENTS:
            raise UsageError(
                f"A frame of {self.size} directions in dimension {dim} is impossible or too large to store: lower size "
                "or use Dense('sphere'), whose directions are nearly orthogonal when the dimension is large."
            )
        number, column = divmod(index, self.size)
        key = (seed, step, number, tuple((p.name, p.shape, p.local.device) for p in places))
        frame = self._frames.get(key, lambda: self._make(places, seed, step, number))
        return [Values(frame[place.name][column]) if place.numel else None for place in places]

    def _make(self, places: Sequence[Placement], seed: int, step: int, number: int) -> dict[str, Tensor]:
        # Drawn by name and stacked by sorted name, so the frame does not depend on the order of the call.
        ordered = sorted((place for place in places if place.numel), key=lambda place: place.name)
        draws = [
            Draw(p.numel, self.size, "gaussian", stream_key(seed, p.name, "frame"), step, number, p.local.device)
            for p in ordered
        ]
        gaussians = [gaussian.double() for gaussian in draw_matrices(draws, self.backend)]
        home = gaussians[0].device
        q, r = torch.linalg.qr(torch.cat([block.to(home) for block in gaussians]))
        dim = q.shape[0]
        columns = (q * (torch.sign(torch.diagonal(r)) * math.sqrt(dim))).T.float()
        parts = columns.split([place.numel for place in ordered], dim=1)
        return {place.name: part.to(place.local.device).contiguous() for place, part in zip(ordered, parts)}
