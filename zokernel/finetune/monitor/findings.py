"""What is measured once of a run whose loss did not fall: losses around the weights, and the answers' scores."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

PROBED = 4  # directions
FARTHER = 4.0  # times eps, where slopes are taken again


@dataclass(frozen=True)
class Surroundings:
    r"""Losses of one batch at the weights and along a few directions.

    Attributes:
        eps: Radius of the run.
        centre: Loss at the weights.
        near: Losses at :math:`\pm\epsilon z_k`, for every direction k.
        far: Losses at :math:`\pm 4\epsilon z_k`.
        resolution: Relative spacing of the numbers that the model computes in.
    """

    eps: float
    centre: float
    near: Sequence[tuple[float, float]]
    far: Sequence[tuple[float, float]]
    resolution: float = 2**-23

    @property
    def forwards(self) -> int:
        """Forward passes that it took."""
        return 1 + 2 * len(self.near) + 2 * len(self.far)

    def slopes(self, *, far: bool = False) -> list[float]:
        r"""Return :math:`(L_+ - L_-) / 2\epsilon` of every direction, from the near points or the far ones."""
        radius = FARTHER * self.eps if far else self.eps
        return [(plus - minus) / (2 * radius) for plus, minus in (self.far if far else self.near)]

    def rise(self, *, far: bool = False) -> float:
        r"""Return the mean of :math:`(L_+ + L_-)/2 - L_0`: what the perturbation itself costs."""
        return statistics.fmean(sum(pair) / 2 - self.centre for pair in (self.far if far else self.near))

    def slope_difference(self) -> float:
        """Return the root mean square of the differences between slopes at eps and at 4 eps."""
        return statistics.fmean((a - b) ** 2 for a, b in zip(self.slopes(), self.slopes(far=True))) ** 0.5

    def may_be_rounding(self) -> bool:
        """Return whether these differences are small enough to come from rounding, not from the loss's own bends."""
        return 2**0.5 * self.eps * self.slope_difference() <= max(2 * self.resolution, 1e-5) * abs(self.centre)

    def curvature(self) -> tuple[float, float]:
        r"""Return the mean of :math:`z^T H z` and its standard error, from the far points, whose rounding weighs less.

        The error has a part for rounding: fp32's, or what slopes at eps and 4 eps differ by.

        Example:
            >>> Surroundings(0.5, 0.0, [(0.5, 0.5)] * 4, [(8.0, 8.0)] * 4).curvature()
            (4.0, 0.0)
        """
        radius = FARTHER * self.eps
        curvatures = [(plus + minus - 2 * self.centre) / radius**2 for plus, minus in self.far]
        rounding = max(2**0.5 * self.eps * self.slope_difference(), 2**-23 * abs(self.centre))
        error = statistics.stdev(curvatures) / len(curvatures) ** 0.5
        return statistics.fmean(curvatures), math.hypot(error, 2 * rounding / radius**2)


@dataclass(frozen=True)
class Options:
    """What is known of tasks whose examples share their options.

    Attributes:
        words: Tokens of each option.
        labels: How many training examples have each option.
        num_prompts: How many different prompts the training examples have.
        num_cut: How many training examples were cut to the longest input.
        num_scored: How many examples were scored at the weights that the run ended with; 0 if none were.
        num_right: How many of them were answered correctly.
        spread: Standard deviation over examples of the differences between options' scores, in nats.
        answers: How many of them were answered with each option.
        forwards: Forward passes that the scores took.
    """

    words: Sequence[Sequence[int]]
    labels: Sequence[int]
    num_prompts: int
    num_cut: int = 0
    num_scored: int = 0
    num_right: int = 0
    spread: float = 0.0
    answers: Sequence[int] = ()
    forwards: int = 0

    @property
    def examples(self) -> int:
        """Training examples."""
        return sum(self.labels)

    @property
    def shared_start(self) -> int:
        """How many options begin with the most frequent first token."""
        return max(Counter(word[0] for word in self.words if len(word)).values(), default=0)
