r"""How far the noise of a run may take the weights: until the slopes that it meets have doubled.

Most of a step is noise, new in every step, so a run is first of all a random walk: slopes of rms s take every weight
:math:`R = \eta s \sqrt{T/P}` from its start in T steps.  On the way slopes grow, about as
:math:`s^2(R) = s_0^2 e^{aR^2}`, and longer steps go further still: :math:`dR^2/dt = \eta^2 s^2(R) / P` has no bound
after :math:`P / (a \eta^2 s_0^2)` steps.  Models of the loss at the start (a quadratic, the Fisher matrix) know nothing
of it.  Forward passes at random points around the start do.

Steps meet many batches, and batches differ.  So every walk takes its slopes in a batch of its own, the same at the
start and at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel import theory
from zokernel.errors import RunError
from zokernel.estimators.two_point import symmetric_differences
from zokernel.kernels.prober import Prober
from zokernel.kernels.probes import Measurement, jackknife, mean_estimate

GROWTH = 2.0  # slopes are followed until they have grown by this factor
SHARE = 0.8  # of the rate at which slopes grow without bound within the run
FIRST_STEP, FIRST_WALK = 50_000, 100_000  # indices of the first directions of slopes and walks; probes have small ones
FIRST_DISTANCE = 4.0  # in units of eps
MOST_DOUBLINGS = 10


@dataclass(frozen=True)
class Growth:
    """Slopes of the loss at the start and at some distance from it, in the batch of each walk.

    Attributes:
        start_W: Slope at the start of each of W walks.
        distance: How far every weight was moved; infinite if slopes have doubled at no distance.
        slopes_W: Slope at the end of each walk, along the same direction.
    """

    start_W: Tensor
    distance: float
    slopes_W: Tensor

    @property
    def count(self) -> int:
        """Number of walks W."""
        return len(self.slopes_W)

    @property
    def ratio(self) -> float:
        """Mean square of slopes at the distance over that at the start."""
        return (self.slopes_W.square().mean() / self.start_W.square().mean()).item()

    def keep(self, index: Tensor) -> Growth:
        """Return some of the walks."""
        return Growth(self.start_W[index], self.distance, self.slopes_W[index])


def start_slopes(prober: Prober, eps: float, num_walks: int) -> Tensor:
    """Return the slope at the start of each of W walks, along a direction of its own; two forwards each."""
    return torch.tensor([_slope(prober, walk, eps) for walk in range(num_walks)], dtype=torch.float64)


def measure_growth(prober: Prober, start_W: Tensor, eps: float) -> Growth:
    """Follow slopes away from the start until they have doubled.

    Distances double (or halve) from a few eps until slopes have grown by :data:`GROWTH`; then the middle of the last
    two is tried.

    Args:
        prober: The task; its weights are at their start.
        start_W: Slopes at the start of as many walks, from :func:`start_slopes`.
        eps: Perturbation size of the slopes.

    Returns:
        The slopes at the least distance tried where they have doubled.
    """

    def growth_at(distance: float) -> Growth:
        ends = [_slope(prober, walk, eps, distance) for walk in range(len(start_W))]
        return Growth(start_W, distance, torch.tensor(ends, dtype=torch.float64))

    growths = [growth_at(FIRST_DISTANCE * eps)]
    factor = 0.5 if _doubled(growths[0]) else 2.0
    for _ in range(MOST_DOUBLINGS):
        growths.append(growth_at(growths[-1].distance * factor))
        if _doubled(growths[-1]) != _doubled(growths[0]):
            growths.append(growth_at(growths[-1].distance / math.sqrt(factor)))
            break
    nearest = min(filter(_doubled, growths), key=lambda growth: growth.distance, default=None)
    return Growth(start_W, math.inf, growths[-1].slopes_W) if nearest is None else nearest


def walk_forwards(num_walks: int) -> tuple[int, int]:
    """Return how many forward passes both functions above take, at least and at most, where losses are finite.

    Slopes have doubled (or have not) at the second distance and a third is tried in between, or not at the last.

    Example:
        >>> walk_forwards(8)
        (64, 208)
    """
    return 2 * num_walks * 4, 2 * num_walks * (MOST_DOUBLINGS + 3)


def _doubled(growth: Growth) -> bool:
    return growth.ratio >= GROWTH**2


def _slope(prober: Prober, walk: int, eps: float, distance: float = 0.0) -> float:
    """Return the slope in the batch of a walk at weights moved by a distance; infinite where the loss is."""
    moved = ([distance], [FIRST_WALK + walk]) if distance else ([], [])
    try:
        losses = [prober.step_loss(walk, [*moved[0], sign * eps], [*moved[1], FIRST_STEP + walk]) for sign in (1, -1)]
    except RunError:
        return math.inf
    return symmetric_differences(losses, eps)[0]


def reach(growth: Growth) -> float:
    r"""Return the distance at which slopes have doubled, by :math:`s^2(R) = s_0^2 e^{aR^2}`; infinite if there is none.

    At the distance tried before, less by :math:`\sqrt 2`, they had not: it is the least that is returned.

    Example:
        >>> start = torch.tensor([2.0], dtype=torch.float64)
        >>> round(reach(Growth(start, 0.2, start * math.e)), 4)  # a = 50
        0.1665
    """
    log = math.log(growth.ratio) if growth.ratio > 0 else 0.0
    doubled = 2 * math.log(GROWTH)
    return growth.distance * math.sqrt(doubled / min(log, 2 * doubled)) if log > 0 else math.inf


def measured_reach(growth: Growth) -> Measurement:
    r"""Return :func:`reach` with its standard error over walks.

    Where slopes more than doubled twice since the distance tried before, only the two distances are known to enclose
    the reach: :math:`R / \sqrt 2` to :math:`R`, with the standard deviation of a uniform number between them.

    Example:
        >>> start = torch.tensor([1.0, 1.0], dtype=torch.float64)
        >>> measured_reach(Growth(start, 0.2, 1e9 * start))
        Measurement(value=0.1414..., error=0.0169...)
    """
    estimate = jackknife(growth, reach)
    if not growth.ratio > GROWTH**4:
        return estimate
    spacing = growth.distance * (1 - 1 / math.sqrt(2)) / math.sqrt(12)
    return Measurement(estimate.value, math.hypot(estimate.error, spacing))


def rms_slope(slopes_W: Tensor) -> Measurement:
    r"""Return the root mean square of slopes; its error is that of the mean square, to first order.

    Example:
        >>> rms_slope(torch.tensor([3.0, -4.0]))
        Measurement(value=3.535..., error=0.494...)
    """
    square = mean_estimate(slopes_W.square())
    value = math.sqrt(square.value)
    return Measurement(value, square.error / (2 * value))


def walk_rate(distance: Measurement, slope: Measurement, *, num_perturbations: int, num_steps: int) -> Measurement:
    r"""Return four fifths of the rate at which slopes grow without bound within a run.

    With :math:`s^2 = s_0^2 e^{aR^2}` they do at :math:`\eta s_0 \sqrt{T/P} = 1/\sqrt a`, and they have doubled at
    :math:`R_2 = \sqrt{\ln 4 / a}`.  At four fifths of it they have grown by 5/3 when the run ends.

    Args:
        distance: :math:`R_2`, where slopes have doubled.
        slope: :math:`s_0`, the rms slope at the start.
        num_perturbations: P.
        num_steps: T.

    Returns:
        The rate :math:`\tfrac45 R_2 \sqrt{P / (T \ln 4)} / s_0`.

    Example:
        >>> walk_rate(Measurement(0.04, 0.004), Measurement(0.5, 0.0), num_perturbations=1, num_steps=60)
        Measurement(value=0.00701..., error=0.000701...)
    """
    rate = theory.random_walk_rate(
        SHARE * distance.value / math.sqrt(2 * math.log(GROWTH)),
        gradient_norm=slope.value,
        num_perturbations=num_perturbations,
        num_steps=num_steps,
    )
    return Measurement(rate, rate * math.hypot(distance.error / distance.value, slope.error / slope.value))
