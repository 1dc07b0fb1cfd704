"""Directions that are not random: tensors that an update adds with the roundings of random directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zokernel.directions.base import Directions
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Factors, Term, Values


class Fixed(Directions):
    """Directions that are the same for every seed, step and index.

    Args:
        values: What to add, by name: fp32 values, or low-rank factors.

    Example:
        >>> import torch
        >>> weights = {"w": torch.zeros(2)}
        >>> Fixed({"w": Values(torch.tensor([1.0, -2.0]))}).add_(weights, 0.5, seed=0, step=0, index=0)
        >>> weights["w"]
        tensor([ 0.5000, -1.0000])
    """

    seeded = False

    def __init__(self, values: Mapping[str, Values | Factors]):
        super().__init__()
        self.values = values

    def __repr__(self) -> str:
        return f"Fixed({dict(self.values)!r})"

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return what is to be added to each tensor; see :meth:`Directions.terms`."""
        return [self.values[place.name] for place in places]
