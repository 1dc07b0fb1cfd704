"""What a step of scalars times seeded directions did to the weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AffineMove:
    r"""One step of one parameter group: :math:`\theta' = decay\,\theta + \sum_i scale_i z_i + anchor\,\theta_0`.

    Attributes:
        step: Step whose directions were added.
        scales: Factor on each direction by index.
        decay: Factor on the old weights.
        anchor: Factor on the initial weights.
        frozen: Names of the parameters that the step left as they were.
    """

    step: int
    scales: dict[int, float]
    decay: float
    anchor: float = 0.0
    frozen: tuple[str, ...] = ()

    def shrunk(self, factor: float, anchor: float = 0.0) -> AffineMove:
        """Return the same move with its result multiplied by ``factor``, and the initial weights added to it."""
        scales = {i: factor * scale for i, scale in self.scales.items()}
        return AffineMove(self.step, scales, factor * self.decay, anchor, self.frozen)
