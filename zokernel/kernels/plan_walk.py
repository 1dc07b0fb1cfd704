r"""How far the noise of a run may take the weights: until the slopes that it meets have doubled.

Most of a step is noise, new in every step, so a run is first of all a random walk: slopes of rms s take every weight
:math:`R = \eta s \sqrt{T/P}` from its start in T steps.  On the way slopes grow, about as
:math:`s^2(R) = s_0^2 e^{aR^2}`, and longer steps go further still: :math:`dR^2/dt = \eta^2 s^2(R) / P` has no bound
after :math:`P / (a \eta^2 s_0^2)` steps.  Models of the loss at the start (a quadratic, the Fisher matrix) know nothing
of it.  Forward passes at random points around the start do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel import theory
from zokernel.errors import RunError
from zokernel.kernels.prober import Prober
from zokernel.kernels.probes import Measurement, jackknife

GROWTH = 2.0  # slopes are followed until they have grown by this factor
SHARE = 0.5  # of the rate at which slopes grow without bound within the run
FIRST_WALK = 100_000  # index of the first direction of a walk; probes have the small ones
FIRST_DISTANCE = 4.0  # in units of eps
MOST_DOUBLINGS = 10


@dataclass(frozen=True)
class Growth:
    """Slopes of the loss at some distance from the start, at the end of each walk along a direction of its own.

    Attributes:
        start_sq: Mean square of slopes at the start.
        distance: How far every weight was moved; infinite if slopes have doubled at no distance.
        slopes_W: Slope at the end of each of W walks.
    """

    start_sq: float
    distance: float
    slopes_W: Tensor

    @property
    def count(self) -> int:
        """Number of walks W."""
        return len(self.slopes_W)

    @property
    def ratio(self) -> float:
        """Mean square of slopes at the distance over that at the start."""
        return self.slopes_W.square().mean().item() / self.start_sq

    def keep(self, index: Tensor) -> Growth:
        """Return some of the walks."""
        return Growth(self.start_sq, self.distance, self.slopes_W[index])


def measure_growth(prober: Prober, start_sq: float, eps: float, num_walks: int) -> Growth:
    """Follow slopes away from the start until they have doubled.

    Distances double (or halve) from a few eps until slopes have grown by :data:`GROWTH`; then the middle of the last
    two is tried.

    Args:
        prober: The task; its weights are at their start.
        start_sq: Mean square of slopes at the start.
        eps: Perturbation size of the slopes.
        num_walks: Walks, in random directions.

    Returns:
        The slopes at the least distance tried where they have doubled.
    """

    def growth_at(distance: float) -> Growth:
        ends = [_slope_at(prober, distance, eps, FIRST_WALK + 2 * walk) for walk in range(num_walks)]
        return Growth(start_sq, distance, torch.tensor(ends, dtype=torch.float64))

    growths = [growth_at(FIRST_DISTANCE * eps)]
    factor = 0.5 if _doubled(growths[0]) else 2.0
    for _ in range(MOST_DOUBLINGS):
        growths.append(growth_at(growths[-1].distance * factor))
        if _doubled(growths[-1]) != _doubled(growths[0]):
            growths.append(growth_at(growths[-1].distance / math.sqrt(factor)))
            break
    nearest = min(filter(_doubled, growths), key=lambda growth: growth.distance, default=None)
    return Growth(start_sq, math.inf, growths[-1].slopes_W) if nearest is None else nearest


def walk_forwards(num_walks: int) -> tuple[int, int]:
    """Return how many forward passes :func:`measure_growth` takes, at least and at most, where losses are finite.

    Slopes have doubled (or have not) at the second distance and a third is tried in between, or not at the last.

    Example:
        >>> walk_forwards(8)
        (48, 192)
    """
    return 2 * num_walks * 3, 2 * num_walks * (MOST_DOUBLINGS + 2)


def _doubled(growth: Growth) -> bool:
    return growth.ratio >= GROWTH**2


def _slope_at(prober: Prober, distance: float, eps: float, walk: int) -> float:
    """Return the slope along a direction at weights moved along another; infinite where the loss is."""
    try:
        above, below = (prober.loss([distance, sign * eps], [walk, walk + 1]) for sign in (1, -1))
    except RunError:
        return math.inf
    return (above - below) / (2 * eps)


def reach(growth: Growth) -> float:
    r"""Return the distance at which slopes have doubled, by :math:`s^2(R) = s_0^2 e^{aR^2}`; infinite if there is none.

    At the distance tried before, less by :math:`\sqrt 2`, they had not: it is the least that is returned.

    Example:
        >>> round(reach(Growth(4.0, 0.2, 2 * torch.tensor([1.0], dtype=torch.float64).exp())), 4)  # a = 50
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
        >>> measured_reach(Growth(1.0, 0.2, torch.tensor([1e9, 2e9], dtype=torch.float64)))
        Measurement(value=0.1414..., error=0.0169...)
    """
    estimate = jackknife(growth, reach)
    if not growth.ratio > GROWTH**4:
        return estimate
    spacing = growth.distance * (1 - 1 / math.sqrt(2)) / math.sqrt(12)
    return Measurement(estimate.value, math.hypot(estimate.error, spacing))


def walk_rate(distance: Measurement, slope: Measurement, *, num_perturbations: int, num_steps: int) -> Measurement:
    r"""Return half of the rate at which slopes grow without bound within a run.

    With :math:`s^2 = s_0^2 e^{aR^2}` they do at :math:`\eta s_0 \sqrt{T/P} = 1/\sqrt a`, and they have doubled at
    :math:`R_2 = \sqrt{\ln 4 / a}`.  At half of it they have grown by :math:`\sqrt{4/3}` when the run ends.

    Args:
        distance: :math:`R_2`, where slopes have doubled.
        slope: :math:`s_0`, the rms slope at the start.
        num_perturbations: P.
        num_steps: T.

    Returns:
        The rate :math:`R_2 \sqrt{P / (4 T \ln 4)} / s_0`.

    Example:
        >>> walk_rate(Measurement(0.04, 0.004), Measurement(0.5, 0.0), num_perturbations=1, num_steps=60)
        Measurement(value=0.00438..., error=0.000438...)
    """
    rate = theory.random_walk_rate(
        SHARE * distance.value / math.sqrt(2 * math.log(GROWTH)),
        gradient_norm=slope.value,
        num_perturbations=num_perturbations,
        num_steps=num_steps,
    )
    return Measurement(rate, rate * math.hypot(distance.error / distance.value, slope.error / slope.value))
