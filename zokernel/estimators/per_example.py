r"""One direction for every example of the batch.

Example i of B has directions :math:`z_{i,p}` of its own, and its own loss :math:`l_i`.  Any estimator of a single loss
then gives the coefficients :math:`c_{i,p}` of that example, and

.. math:: \hat g = \frac1B \sum_{i=1}^B \sum_p c_{i,p}\, z_{i,p}

estimates the gradient of :math:`L = \frac1B \sum_i l_i`.  It takes as many forwards of the batch as the estimator of a
single loss, and B times as many directions.  With :math:`\nu = tr\,\Sigma / \|\nabla L\|^2`, the variance of an
example's gradient relative to the mean,

.. math:: E\|\hat g\|^2 \approx d\, \|\nabla L\|^2\, \frac{1 + \nu}{B}
    \quad\text{instead of}\quad d\, \|\nabla L\|^2 \Big(1 + \frac{\nu}{B}\Big)

for one direction that all examples share: a gain of :math:`(B + \nu) / (1 + \nu)`.

Reference: GRZO (2026), arXiv:2606.02857.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate, Estimator, Offsets
from zokernel.values import check_switches, plain_fields

MAX_EXAMPLES = 1 << 16
"""Direction p of example i has index p * MAX_EXAMPLES + i."""
WHITEN_FLOOR = 1e-8  # added to the standard deviation of half the differences


def index_of(direction: int, example: int) -> int:
    """Return the index of a direction of one example.

    Args:
        direction: Which of the example's directions, as the estimator of a single loss counts them.
        example: Which example of the batch.

    Raises:
        UsageError: If there are more examples than indices.

    Example:
        >>> index_of(0, 3), index_of(1, 3)
        (3, 65539)
    """
    if not 0 <= example < MAX_EXAMPLES:
        raise UsageError(f"A batch has at most {MAX_EXAMPLES:,} examples with directions of their own.")
    return direction * MAX_EXAMPLES + example


def offsets_of(point: Offsets, example: int) -> dict[int, float]:
    """Return where one example's loss is taken: a point of the estimator of a single loss, along its own directions.

    Example:
        >>> offsets_of({0: 0.5}, example=3)
        {3: 0.5}
    """
    return {index_of(direction, example): offset for direction, offset in point.items()}


@dataclass(frozen=True)
class PerExample(Estimator):
    r"""Apply an estimator to every example's loss, along directions of its own.

    Its points are those of the inner estimator; :meth:`combine` takes the losses of all examples at the first point,
    then those at the second, and so on.

    Args:
        inner: Estimator of a single loss.
        whiten: Divide the slopes by their standard deviation over the examples, as GRZO does: the coefficients are then
            :math:`s_i / (2 B\, (\mathrm{std}_j(\epsilon s_j) + 10^{-8}))`.

    Raises:
        UsageError: If the inner estimator is none, or takes more than the losses of its points.

    Example:
        >>> from zokernel.estimators import TwoPoint
        >>> estimate = PerExample(TwoPoint(0.5)).combine([1.0, 4.0, 0.0, 0.0], seed=0, step=0)
        >>> estimate.coefficients, estimate.losses
        ({0: 0.5, 1: 2.0}, [2.5, 0.0])

    References:
        GRZO (2026), arXiv:2606.02857.
    """

    inner: Estimator
    whiten: bool = False
    numbers_per_point: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        plain_fields(self)
        check_switches(whiten=self.whiten)
        takes_losses = isinstance(self.inner, Estimator) and self.inner.numbers_per_point == 1
        if not takes_losses or getattr(self.inner, "normalize", False):
            raise UsageError(f"{self.inner!r} cannot be applied to the loss of one example: use TwoPoint or OneSided.")
        if self.whiten and self.inner.num_perturbations != 1:
            raise UsageError("Slopes are divided by their spread over examples for one direction per example only.")

    @property
    def num_perturbations(self) -> int:  # type: ignore[override]
        """Directions of one example."""
        return self.inner.num_perturbations

    @property
    def eps(self) -> float | None:  # type: ignore[override]
        """Radius of the perturbation, in units of the weights."""
        return self.inner.eps

    def points(self, *, seed: int, step: int) -> list[Offsets]:
        """Return the points of the inner estimator, by direction of one example."""
        return self.inner.points(seed=seed, step=step)

    def combine(self, losses: Sequence[float], *, seed: int, step: int) -> Estimate:
        """Return the coefficients of all examples' directions; ``losses`` holds those of all examples, per point."""
        num_points = self.forwards_at(step)
        num_examples = len(losses) // num_points
        by_example = [
            self.inner.combine(losses[example::num_examples], seed=seed, step=step) for example in range(num_examples)
        ]
        scale = 1.0 / num_examples
        if self.whiten:
            slopes = [estimate.coefficients[0] for estimate in by_example]
            spread = statistics.stdev(slopes) if num_examples > 1 else 0.0
            scale /= 2 * (self.reach * spread + WHITEN_FLOOR)
        means = [sum(losses[k * num_examples : (k + 1) * num_examples]) / num_examples for k in range(num_points)]
        coefficients = {
            index_of(direction, example): coefficient * scale
            for example, estimate in enumerate(by_example)
            for direction, coefficient in estimate.coefficients.items()
        }
        centred = by_example[0].centre is not None
        return replace(
            by_example[0],
            coefficients=coefficients,
            losses=means,
            centre=sum(estimate.centre or 0.0 for estimate in by_example) / num_examples if centred else None,
        )

    def gain_at(self, step: int, last: Estimate | None = None) -> float:
        """Return that of the inner estimator; slopes that are whitened have no gain that is known beforehand."""
        return float("nan") if self.whiten else self.inner.gain_at(step, last)
