"""Directions that are not random at all: what an update adds, so that it takes the way that directions take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zokernel.directions.base import Directions
from zokernel.directions.terms import Factors, Term, Values
from zokernel.directions.weights.placement import Placement


class Fixed(Directions):
    """Directions that are given outright, so that the engine can add them with its own roundings.

    Args:
        given: What to add, by name: fp32 values, or low-rank factors.
    """

    def __init__(self, given: Mapping[str, Values | Factors]):
        super().__init__()
        self.given = given

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return what was given for each tensor; see :meth:`Directions.terms`."""
        return [self.given[place.name] for place in places]
