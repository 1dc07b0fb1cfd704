r"""What a backend adds to one tensor: a few terms :math:`scale_i z_i` and the rule for storing the result.

Families (dense, sparse, subspace, ...) say *what* a direction is by building terms; backends know *how* to generate
each kind of term a tile at a time and add it without storing it.

These records are not frozen only because frozen ones take three times as long to make, hundreds per sweep.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor

from zokernel.directions.placement import Placement


@dataclass(slots=True)
class Noise:
    """Independent coordinates: the generator evaluated at each element's position.

    Attributes:
        distribution: ``rademacher``, ``gaussian`` or ``uniform``.
        key: Philox key of the tensor's stream.
        step: Third counter word.
        index: Fourth counter word.
        gain: Factor on every coordinate (the sphere's radius over norm).
        mask: Packed bits (uint8, least significant first) over the elements held here; zero bits silence a coordinate.
    """

    distribution: str
    key: tuple[int, int]
    step: int
    index: int
    gain: float = 1.0
    mask: Tensor | None = None


@dataclass(slots=True)
class Factors:
    """A matrix ``gain * left @ right``, evaluated entry by entry.

    Attributes:
        left: (m, r) float32, contiguous.
        right: (r, n) float32, contiguous; the tensor has m n elements in row-major order.
        gain: Factor on every entry.
    """

    left: Tensor
    right: Tensor
    gain: float = 1.0


@dataclass(slots=True)
class Values:
    """Coordinates given outright: float32, contiguous, over the whole (unsharded) tensor."""

    values: Tensor


Term = Noise | Factors | Values


class Rule(enum.IntEnum):
    """How the new weight is computed from the old one x and the sum of terms s (s_old: with the old scales)."""

    NEAREST = 0
    r"""Round :math:`decay\,x + s` to nearest."""
    STOCHASTIC = 1
    r"""Round :math:`decay\,x + s` stochastically (float64 weights: to nearest)."""
    GRID_MOVE = 2
    r""":math:`x + q\,rint(s / q) - q\,rint(s_{old} / q)`, exact on the grid of step q."""
    GRID_COMMIT = 3
    r""":math:`t + q \lfloor ((decay - 1) t + s) / q + u \rfloor` with :math:`t = x - q\,rint(s_{old} / q)`."""


@dataclass(slots=True)
class Job:
    """Everything a sweep does to one tensor.

    Attributes:
        place: The tensor and where its elements sit in the whole.
        terms: The directions.
        scales: One per term.
        rule: How the result is stored.
        decay: Factor on the old weight.
        old_scales: One per term; the offsets that the weights carry now (grid rules).
        grid: Grid step, a power of two (grid rules).
        rounding: Philox key, step and index of the random bits that round (stochastic rules).
    """

    place: Placement
    terms: tuple[Term, ...]
    scales: tuple[float, ...]
    rule: Rule = Rule.NEAREST
    decay: float = 1.0
    old_scales: tuple[float, ...] = ()
    grid: float = 1.0
    rounding: tuple[int, int, int, int] = (0, 0, 0, 0)


NEAR_ONE = (0.5, 2.0)
"""The decays d for which :math:`d\\,x + s` is computed as :math:`x + ((d - 1) x + s)`."""


def affine(decay: float) -> tuple[float, float]:
    r"""Split :math:`decay\,x + s` into :math:`a x + (b x + s)`, the form every backend computes.

    With a = 1 and b = decay - 1 the two small terms are added first, so a decay of :math:`1 - 10^{-9}` is not lost in
    the rounding of the factor itself.

    Args:
        decay: Factor on the old weight.

    Returns:
        The pair (a, b).
    """
    low, high = NEAR_ONE
    return (1.0, decay - 1.0) if low <= decay <= high else (0.0, decay)
