r"""KerZOO's estimator: two-point differences at random radii, weighted by a smoothing kernel.

.. math:: c_p = \frac{1}{P} \frac{L(\theta + \epsilon r_p z_p) - L(\theta - \epsilon r_p z_p)}{2\epsilon} K(r_p),
    \qquad r_p \sim U[-a_t, a_t]

The paper lets the range :math:`a_t` shrink without saying how, and keeps :math:`K` as it is.  That breaks the moments
that define :math:`K`: the third no longer cancels, and the gain becomes a hidden learning-rate schedule (erratum 6 in
section C.2 of docs/theory.md).  So the schedule of the range says what happens to the kernel:

``none``
    The range stays ``radius``.
``literal``
    The range shrinks and the kernel stays, as in the paper.
``rescaled``
    The kernel shrinks with the range, :math:`K(r/a)/a`, relative to the schedule's start: gain and moments stay, and
    the noise of the losses counts :math:`1/a^2` as much.  This is the same as shrinking :math:`\epsilon`.
``lr_compensated``
    The kernel stays and the estimate is divided by its gain, so that :math:`C` is the gain at every step.

Reference: Mi et al. (2025), KerZOO, arXiv:2505.18886, eq. 14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate, Estimator, Offsets, check_radius, check_total_steps
from zokernel.estimators.two_point import symmetric_differences
from zokernel.theory.smoothing import KernelFacts, SmoothingKernel, smoothing_kernel
from zokernel.values import check_switches, is_number, plain_fields

RADIUS_SCHEDULES = ("none", "literal", "rescaled", "lr_compensated")

# Second word of the key, so that radii share no stream with anything else that uses the same seed.
_STREAM = 0x72616469_7573


@dataclass(frozen=True)
class Smoothed(Estimator):
    """Kernel-weighted two-point differences.

    Args:
        eps: Radius of the perturbation at r = 1, in units of the weights.
        num_perturbations: Directions per estimate; each costs two forward passes.
        order: Order of the smoothing kernel.
        constant: The kernel's constant C.
        paper_k5: Use the misprinted constant of the paper's kernel of order 5.
        radius: Half-width a of the range of r at the start; the kernel is built for a = 1.
        schedule: ``none``, ``literal``, ``rescaled`` or ``lr_compensated`` (see above).
        shrink_to: Share of ``radius`` that is left at the last step, when there is a schedule; the range shrinks
            linearly.
        total_steps: Length of the run, which every schedule but ``none`` needs.

    Raises:
        UsageError: If a setting is out of range, or a schedule lacks ``total_steps``.

    Example:
        >>> linear = lambda offsets: 3.0 * sum(offsets.values())
        >>> estimator = Smoothed(eps=1e-2, num_perturbations=4000, constant=1.0)
        >>> estimate = estimator(linear, seed=0, step=0)
        >>> 2.6 < sum(estimate.coefficients.values()) < 3.4
        True
    """

    eps: float = 1e-3
    num_perturbations: int = 3
    order: int = 3
    constant: float = 4.0
    paper_k5: bool = False
    radius: float = 1.0
    schedule: str = "none"
    shrink_to: float = 0.1
    total_steps: int | None = None

    def __post_init__(self):
        plain_fields(self)
        check_radius(self.eps, self.num_perturbations)
        if self.schedule not in RADIUS_SCHEDULES:
            names = ", ".join(RADIUS_SCHEDULES)
            raise UsageError(f"There is no radius schedule {self.schedule!r}: choose one of {names}.")
        schedule = None if self.schedule == "none" else f"The radius schedule {self.schedule!r}"
        check_total_steps(self.total_steps, schedule)
        check_switches(paper_k5=self.paper_k5)
        if not (is_number(self.radius) and self.radius > 0):
            raise UsageError(f"radius must be positive, not {self.radius!r}: the paper recommends 1 or 1/2.")
        if not (is_number(self.shrink_to) and 0 < self.shrink_to <= 1):
            raise UsageError(f"shrink_to must be in (0, 1], not {self.shrink_to!r}.")
        if self.constant == 0:
            raise UsageError("The kernel's constant must not be zero: the weights would never move.")
        self.kernel.facts(self.radius)

    @cached_property
    def kernel(self) -> SmoothingKernel:
        """The polynomial K, with its constant."""
        return smoothing_kernel(self.order, constant=self.constant, paper_k5=self.paper_k5)

    def range_at(self, step: int) -> float:
        """Return the half-width a of the range of r at ``step``."""
        if self.schedule == "none":
            return self.radius
        assert self.total_steps is not None
        progress = min(1.0, step / max(1, self.total_steps - 1))
        return self.radius * (1.0 - (1.0 - self.shrink_to) * progress)

    def facts_at(self, step: int) -> KernelFacts:
        """Return gain, bias, second-moment and noise ratios of the estimate of ``step``, all relative to MeZO's."""
        a = self.range_at(step)
        if self.schedule != "rescaled":
            facts = self.kernel.facts(a)
            gain = self.constant if self.schedule == "lr_compensated" else facts.gain
            return KernelFacts(gain, facts.bias_ratio, facts.second_moment_ratio, facts.noise_ratio)
        facts, shrink = self.kernel.facts(self.radius), a / self.radius
        bias, noise = facts.bias_ratio * shrink**2, facts.noise_ratio / shrink**2
        return KernelFacts(facts.gain, bias, facts.second_moment_ratio, noise)

    def weight(self, r: Any, step: int) -> Any:
        """Return the factor on the difference taken at radius ``r``: the kernel, as the schedule changes it."""
        if self.schedule == "rescaled":
            shrink = self.range_at(step) / self.radius
            return self.kernel(r / shrink) / shrink
        if self.schedule == "lr_compensated":
            return self.kernel(r) * self.constant / self._gain(self.range_at(step))
        return self.kernel(r)

    def _gain(self, a: float) -> float:
        return float(self.kernel.moment(1, a))

    def gain_at(self, step: int, last: Estimate | None = None) -> float:
        """Return the mean of r times its weight: C, or what the range's schedule has made of it."""
        return self.facts_at(step).gain

    def points(self, *, seed: int, step: int) -> list[Offsets]:
        """Return both ends of every direction, at its own radius."""
        radii = self.radii_at(seed=seed, step=step)
        return [{index: end * r} for index, r in enumerate(radii) for end in (self.eps, -self.eps)]

    def combine(self, losses: Sequence[float], *, seed: int, step: int) -> Estimate:
        """Return the differences, weighed by the kernel."""
        radii = self.radii_at(seed=seed, step=step)
        slopes = symmetric_differences(losses, self.eps)
        weights = [self.weight(r, step) / self.num_perturbations for r in radii]
        return Estimate({i: slope * w for i, (slope, w) in enumerate(zip(slopes, weights, strict=True))}, list(losses))

    def radii_at(self, *, seed: int, step: int) -> list[float]:
        """Return r of every direction of ``step``, uniform on the range."""
        a = self.range_at(step)
        return [a * signed_uniform(seed, step, index) for index in range(self.num_perturbations)]


def signed_uniform(seed: Any, step: int, index: int) -> Any:
    """Return a number uniform on [-1, 1) that depends on nothing but its arguments.

    Args:
        seed: Seed of the run; or an array of seeds, for as many numbers.
        step: Step of the run.
        index: Which direction of that step.

    Returns:
        The number, from the counter-based generator Philox4x64-10.

    Example:
        >>> signed_uniform(0, 5, 1) == signed_uniform(0, 5, 1) != signed_uniform(0, 5, 2)
        True
    """
    if isinstance(seed, np.ndarray):
        return np.array([signed_uniform(int(s), step, index) for s in seed])
    mask = (1 << 64) - 1
    philox = np.random.Philox(
        key=np.array([seed & mask, _STREAM], np.uint64), counter=np.array([0, 0, index, step], np.uint64)
    )
    return 2.0 * np.random.Generator(philox).random() - 1.0
