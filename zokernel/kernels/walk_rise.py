r"""What a random walk costs: by how much the loss rises at random points at some distance from the start.

A run is first of all a random walk (see :mod:`zokernel.kernels.plan_walk`).  Three losses of a batch, at the start and
at :math:`\pm R z`, say what a walk of R along z does to it:

.. math:: E = \tfrac12 (L_+ + L_-) - L_0 \approx \tfrac{R^2}{2}\, z^T H z, \qquad
          O = \tfrac12 (L_+ - L_-) \approx R\, z^T g .

The mean of E is the rise of the loss, the root mean square of O is R times that of the slopes.

With normalised slopes (rms s) a run of T steps of P directions that walks R lowers the loss by about
:math:`R\, \sqrt{PT}\, \|g\|^2 / s` in exchange (exactly at a constant rate, 0.87 to 0.93 of it for schedules that
fall), so that the walk with the most to show for it is, where E goes like the square of R,

.. math:: R^* = \kappa\, \frac{O(R)}{E(R)}\, R, \qquad \kappa = \frac{\sqrt{PT}}{2 D} .

D is what noise takes of the slopes: :math:`\sqrt{(1 + \nu / b)(1 + \nu / B)}` with O from batches of b, where B
examples share the directions of a step: those of all its micro-batches and processes, or one if each has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rise:
    """The loss of some batches at the ends of random walks.

    Attributes:
        distance: How far every weight was moved, R.
        loss: Mean loss at the start.
        rise: Mean rise of the loss, E; infinite where a loss is not finite.
        error: Its standard error.
        slope: Root mean square of the slopes over the distance, O / R.
        forwards: Forward passes that it took.
    """

    distance: float
    loss: float
    rise: float
    error: float
    slope: float
    forwards: int


def rise_of(distance: float, losses: Sequence[tuple[float, float, float]]) -> Rise:
    """Return what random walks do to a loss.

    Args:
        distance: How far every weight was moved.
        losses: Losses at the start, and forth and back along a direction, for each of two batches or more.

    Example:
        >>> measured = rise_of(0.5, [(1.0, 1.5, 1.1), (2.0, 2.1, 2.5)])
        >>> round(measured.rise, 6), round(measured.error, 6), round(measured.slope, 6), measured.forwards
        (0.3, 0.0, 0.4, 6)
    """
    count = len(losses)
    start = sum(centre for centre, _, _ in losses) / count
    even = [(plus + minus) / 2 - centre for centre, plus, minus in losses]
    odd = [(plus - minus) / 2 for _, plus, minus in losses]
    if not all(map(math.isfinite, even)):
        return Rise(distance, start, math.inf, math.inf, math.nan, 3 * count)
    rise = sum(even) / count
    error = math.sqrt(sum((one - rise) ** 2 for one in even) / (count - 1) / count)
    slope = math.sqrt(sum(one * one for one in odd) / count) / distance
    return Rise(distance, start, rise, error, slope, 3 * count)


def walk_worth(measured: Rise, *, directions: int, noise: float) -> float:
    r"""Return the walk :math:`R^*` that lowers a loss most, where it is certain that R is too far; else R.

    Args:
        measured: The rise over R.
        directions: Directions of all steps, PT.
        noise: D, what noise takes of the slopes.

    Returns:
        A distance, at most R.  It is R unless the rise is above :math:`\kappa O` by two standard errors, and 0 if the
        loss is not finite there.

    Example:
        >>> walk_worth(Rise(0.125, 1.0, 0.5, 0.01, 1.0, 24), directions=400, noise=5.0)  # kappa = 2, O = 0.125
        0.0625
        >>> walk_worth(Rise(0.125, 1.0, 0.5, 0.15, 1.0, 24), directions=400, noise=5.0)
        0.125
    """
    if math.isinf(measured.rise):
        return 0.0
    bearable = math.sqrt(directions) / (2 * noise) * measured.slope * measured.distance
    if measured.rise - 2 * measured.error <= bearable:
        return measured.distance
    return measured.distance * bearable / measured.rise
