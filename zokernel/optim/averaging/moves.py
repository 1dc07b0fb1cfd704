"""What a step of scalars times seeded directions did to the weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    r"""One step's :math:`\theta \leftarrow decay\,\theta + \sum_i scale_i z_i`, for every parameter group.

    Attributes:
        step: Step whose directions were added.
        scales: For every parameter group, the factor on each direction by index.
        decays: For every parameter group, the factor on the old weights.
    """

    step: int
    scales: tuple[dict[int, float], ...]
    decays: tuple[float, ...]

    def shrunk(self, factor: float) -> Move:
        """Return the same move with its result multiplied by ``factor``."""
        scales = tuple({i: factor * scale for i, scale in by_index.items()} for by_index in self.scales)
        return Move(self.step, scales, tuple(factor * decay for decay in self.decays))


@dataclass(frozen=True)
class AffineMove:
    r"""One step of one parameter group: :math:`\theta' = decay\,\theta + \sum_i scale_i z_i + anchor\,\theta_0`."""

    step: int
    scales: dict[int, float]
    decay: float
    anchor: float = 0.0


def split_move(move: Move, anchor: float = 0.0) -> list[AffineMove]:
    """Return a step's move of every parameter group; ``anchor`` is the weight of the initial parameters in it."""
    return [AffineMove(move.step, scales, decay, anchor) for scales, decay in zip(move.scales, move.decays)]
