"""Base of the low-rank families: factors for matrices, dense noise for vectors, and the settings they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from zokernel.directions.base import Directions
from zokernel.directions.families.factors import Draw, draw_matrices
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Factors, Noise, Term
from zokernel.distributions import Distribution, direction_distribution
from zokernel.errors import UsageError
from zokernel.values import check_switches, is_whole, plain_number


class Factored(Directions):
    """Directions that are a product of thin factors on every matrix; subclasses implement :meth:`factors`.

    Args:
        rank: Rank of a direction; at most the smaller side of a matrix is used.
        distribution: Distribution of the entries and of the vectors, with independent coordinates.
        refresh: Steps between redraws of what stays for several steps.
        most_square: Refold thin matrices (adapters) into the most square ones.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If the rank or refresh interval is not positive, or coordinates depend on each other.
    """

    def __init__(self, rank: int, distribution: str | Distribution, refresh: int, most_square: bool, backend: str):
        super().__init__(backend)
        self.distribution = direction_distribution(distribution)
        rank, refresh = plain_number("rank", rank), plain_number("refresh", refresh)
        if not (is_whole(rank) and is_whole(refresh)):
            raise UsageError(f"Rank {rank!r} and refresh interval {refresh!r} must be whole numbers of at least 1.")
        most_square = plain_number("most_square", most_square)
        check_switches(most_square=most_square)
        if not self.distribution.independent:
            raise UsageError(
                f"Low-rank directions need independent entries, unlike {self.distribution.name!r}: use gaussian."
            )
        self.rank, self.refresh, self.most_square = rank, refresh, most_square

    def __repr__(self) -> str:
        square = ", most_square=True" if self.most_square else ""
        rest = f"distribution={self.distribution.name!r}, refresh={self.refresh}{square}"
        return f"{type(self).__name__}(rank={self.rank}, {rest})"

    @abstractmethod
    def factors(self, place: Placement, *, seed: int, step: int, index: int) -> Factors:
        """Return one direction on a tensor of two or more dimensions.

        Args:
            place: The tensor.
            seed: Seed of the run.
            step: Step of the run.
            index: Which direction of that step.

        Returns:
            Its factors.
        """

    def draw(self, draws: Sequence[Draw]) -> list[Tensor]:
        """Draw matrices by this family's backend, in one sweep."""
        return draw_matrices(draws, self.backend)

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return factors for matrices and noise for vectors; see :meth:`Directions.terms`."""
        return [self._term(place, seed, step, index) for place in places]

    def _term(self, place: Placement, seed: int, step: int, index: int) -> Term | None:
        if place.numel == 0:
            return None
        if len(place.shape) < 2:
            return Noise(self.distribution.name, stream_key(seed, place.name), step, index)
        return self.factors(place, seed=seed, step=step, index=index)
