r"""How the loss of a run went: the change over its steps with its error, and the change that its slopes promised.

A plain step along slopes :math:`s` with the rate :math:`\eta` lowers the loss of its own batch by :math:`\eta s^2`, and
curvature takes :math:`\frac{1}{2P} \eta^2 s^2\, z^T H z` of it back.  Only the part of :math:`s^2` that batches have in
common lowers the loss of the data, so the sum of the first terms bounds what a run can reach.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zokernel.finetune.monitor.paired import CHANGE, ERROR
from zokernel.finetune.monitor.step_record import StepRecord

FEW_STEPS = 20  # a run of fewer tells nothing
FELL = 0.005  # share of the loss by which it must fall at least
IMPROVED = 0.02  # share of the held-out loss by which the best of several evaluations is better by more than chance
NOTICED = 1e-3  # share of the held-out loss that a change must have at least, however certain it is
CERTAIN = 2.0  # standard errors of one paired difference
SCORES = ("accuracy", "f1", "em")


@dataclass
class Course:
    """Collects what is needed of every step.

    Attributes:
        losses: Mean loss of each step.
        slopes: Root mean square of each step's slopes.
        rates: Rate of each step as that of plain descent; NaN where the update is none.
        directions: Directions per step.
    """

    losses: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    directions: int = 1

    def on_record(self, record: StepRecord) -> None:
        """Note a step."""
        self.losses.append(record.loss)
        self.slopes.append(math.nan if record.slope is None else record.slope)
        self.rates.append(math.nan if record.plain_rate is None else record.plain_rate)
        self.directions = record.directions

    def begin(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Begin with the steps that earlier processes of the run took, of whose slopes and rates nothing is known.

        Args:
            rows: These steps, as in ``steps.jsonl``.
        """
        self.losses = [row["loss"] for row in rows]
        self.slopes, self.rates = [math.nan] * len(rows), [math.nan] * len(rows)


@dataclass(frozen=True)
class Change:
    r"""What the loss of training batches did between the first and the last third of the steps.

    Attributes:
        steps: Steps of the run.
        first: Mean loss of the first third.
        last: Mean loss of the last third.
        error: Standard error of their difference.
        fell: Whether the loss fell, by more than two errors and half a percent.
        highest: The highest loss of a step.
        promised_fall: Sum of :math:`\eta s^2` between the middles of the thirds; None if the update is not plain
            descent.
        curvature_term: Sum of :math:`\eta^2 s^2 / 2P` likewise: times :math:`z^T H z` it is what curvature takes back.
        total: Sum of :math:`\eta s^2` over all steps.
        rate: Mean of :math:`\eta`.
        slope: Root mean square of the slopes; None without slopes.
        flat_share: Share of the steps whose losses were all equal.
    """

    steps: int
    first: float
    last: float
    error: float
    fell: bool
    highest: float = -math.inf
    promised_fall: float | None = None
    curvature_term: float | None = None
    total: float | None = None
    rate: float | None = None
    slope: float | None = None
    flat_share: float = 0.0

    @property
    def change(self) -> float:
        """The change of the loss."""
        return self.last - self.first

    @property
    def rose(self) -> bool:
        """Whether the loss rose, by more than two errors and half a percent."""
        return self.change > max(2 * self.error, FELL * abs(self.first))


def change_of(course: Course) -> Change | None:
    """Return how the loss changed; None for fewer than 20 steps.

    Example:
        >>> change = change_of(Course([0.7, 0.6, 0.5] * 3 + [0.4] * 12, [1.0] * 21, [0.01] * 21))
        >>> change.fell, round(change.first, 2), change.last, round(change.promised_fall, 2)
        (True, 0.61, 0.4, 0.14)
    """
    losses, steps = course.losses, len(course.losses)
    if steps < FEW_STEPS or not all(map(math.isfinite, losses)):
        return None
    third = steps // 3
    first, last = losses[:third], losses[-third:]
    error = _error(first, last)
    # A run that learns in its first steps and then no more has learned, too.
    early, rest = losses[: max(5, steps // 10)], losses[steps // 2 :]
    fell = any(
        statistics.fmean(a) - statistics.fmean(b) > max(2 * _error(a, b), FELL * abs(statistics.fmean(a)))
        for a, b in ((first, last), (early, rest))
    )
    change = Change(steps, statistics.fmean(first), statistics.fmean(last), error, fell, max(losses))
    slopes = [slope for slope in course.slopes if math.isfinite(slope)]
    if not slopes:
        return change
    facts = {
        "slope": math.sqrt(statistics.fmean(slope**2 for slope in slopes)),
        "flat_share": sum(slope == 0 for slope in slopes) / len(slopes),
    }
    if all(map(math.isfinite, (*course.rates, *course.slopes))):
        falls = [rate * slope**2 for rate, slope in zip(course.rates, course.slopes)]
        squares = [fall * rate / (2 * course.directions) for fall, rate in zip(falls, course.rates)]
        facts |= {
            "promised_fall": _between_thirds(falls, third),
            "curvature_term": _between_thirds(squares, third),
            "total": sum(falls),
            "rate": statistics.fmean(course.rates),
        }
    return Change(**{**vars(change), **facts})


def _error(first: Sequence[float], last: Sequence[float]) -> float:
    """Return the standard error of the difference of two means."""
    return math.sqrt(sum(statistics.variance(part) / len(part) for part in (first, last)))


def _between_thirds(parts: Sequence[float], third: int) -> float:
    """Return the mean running sum of the last third less that of the first."""
    sums, total = [], 0.0
    for part in parts:
        sums.append(total)
        total += part
    return statistics.fmean(sums[-third:]) - statistics.fmean(sums[:third])


@dataclass(frozen=True)
class HeldOut:
    """What the evaluations during training say.

    Attributes:
        start: Loss at the first evaluation.
        best: Lowest loss of the later ones.
        last: Loss at the last one.
        from_start: Whether the first one was before the first step.
        fell: Whether the loss fell, and stayed there: by two errors of the paired differences of the examples and a
            thousandth; by half a percent where these are not known.
        improved: Whether the best evaluation fell by more than the best of so many does by chance (by two percent where
            paired differences are not known), or a score rose by three errors while the loss did not double.
        largest_change: Largest relative change of the loss.
        scores_changed: Whether any score changed.
        change: Mean paired difference of the examples' losses between the start and the last evaluation; None where
            they are not known.
        error: Its standard error.
    """

    start: float
    best: float
    last: float
    from_start: bool
    fell: bool
    improved: bool
    largest_change: float
    scores_changed: bool
    change: float | None = None
    error: float = math.inf

    @property
    def possible_fall(self) -> float:
        """By how much the loss may have fallen at most: by two paired errors more than was seen; 0 where unknown."""
        return 0.0 if self.change is None else max(CERTAIN * self.error - self.change, 0.0)

    @property
    def rose(self) -> bool:
        """Whether the loss rose: by two paired errors and a thousandth, or half a percent where they are unknown."""
        if self.change is None:
            return self.last - self.start > FELL * abs(self.start)
        return beyond_chance(self.change, self.error, self.start)


def logged_evaluations(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return step, loss and scores of each evaluation that the Trainer logged, by their bare names.

    A score is one number: metrics that are lists or texts are left out.

    Example:
        >>> history = [{"step": 3, "loss": 0.7}, {"step": 4, "eval_loss": 0.6, "eval_f1": 0.5, "eval_em": [0, 1]}]
        >>> logged_evaluations(history)
        [{'step': 4, 'loss': 0.6, 'f1': 0.5}]
    """
    return [
        {"step": row["step"]}
        | {
            name.removeprefix("eval_"): value
            for name, value in row.items()
            if name.startswith("eval_") and isinstance(value, (int, float))
        }
        for row in history
        if "eval_loss" in row
    ]


def summarise_evaluations(evaluations: Sequence[Mapping[str, float]], examples: int) -> HeldOut | None:
    """Return what evaluations say together; None if there are not two.

    Args:
        evaluations: Each with ``step``, ``loss`` and scores, in the order of steps; later ones with ``loss_change`` and
            ``loss_change_error`` (see :mod:`zokernel.finetune.monitor.paired`) where they are known.
        examples: How many examples were evaluated.

    Example:
        >>> rows = [{"step": 0, "loss": 0.7}, {"step": 9, "loss": 0.5}, {"step": 18, "loss": 0.6}]
        >>> summarise_evaluations(rows, 100).improved
        True
    """
    if len(evaluations) < 2 or not all(math.isfinite(row["loss"]) for row in evaluations):
        return None
    first, *later = evaluations
    start, best = first["loss"], min(row["loss"] for row in later)
    is_paired = all(CHANGE in row for row in later)
    scores_changed = False
    if is_paired:
        # The best of k evaluations is as far down by chance as one is at a k-th of the probability.
        num_errors = -statistics.NormalDist().inv_cdf(statistics.NormalDist().cdf(-CERTAIN) / len(later))
        improved = any(beyond_chance(-row[CHANGE], row[ERROR], start, num_errors) for row in later)
    else:
        improved = start - best > IMPROVED * abs(start)
    sound_rows = [row for row in later if row["loss"] < 2 * abs(start)]
    for name in SCORES:
        if all(name in row for row in evaluations):
            share = min(max(first[name], 0.0), 1.0)
            noise = max(0.02, 3 * math.sqrt(share * (1 - share) / max(examples, 1)))
            improved |= any(row[name] > first[name] + noise for row in sound_rows)
            scores_changed |= any(row[name] != first[name] for row in later)
    largest_change = max(abs(row["loss"] - start) for row in later) / max(abs(start), 1e-12)
    last = later[-1]
    fell = beyond_chance(-last[CHANGE], last[ERROR], start) if is_paired else start - last["loss"] > FELL * abs(start)
    held_out = HeldOut(start, best, last["loss"], first["step"] == 0, fell, improved, largest_change, scores_changed)
    return replace(held_out, change=last[CHANGE], error=last[ERROR]) if is_paired else held_out


def beyond_chance(rise: float, error: float, start: float, num_errors: float = CERTAIN) -> bool:
    """Return whether a paired difference is above zero by so many errors, and by a thousandth of the loss at the start.

    Args:
        rise: By how much the loss rose; minus that asks whether it fell.
        error: Standard error of the difference.
        start: The loss at the start.
        num_errors: By how many standard errors.

    Example:
        >>> beyond_chance(0.3, 0.1, 2.0), beyond_chance(0.1, 0.1, 2.0), beyond_chance(0.001, 0.0, 2.0)
        (True, False, False)
    """
    return rise > max(num_errors * error, NOTICED * abs(start))
