"""How numbers of a run become a verdict: an interval over seeds against a bound that is stated beforehand.

A part of a claim *holds* if the whole interval is on its side of the bound, *does not hold* if the whole interval is on
the other side, and is *not resolved* if the bound lies inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float, float]
HOLDS, PARTLY, FAILS, OPEN, NOT_RUN = VERDICTS = (
    "holds",
    "holds under conditions",
    "does not hold",
    "not resolved",
    "not run here",
)


def student_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t (to 0.2% from three degrees of freedom on; scipy is not a dependency).

    Example:
        >>> [round(student_quantile(n), 2) for n in (1, 4, 11, 119)]
        [12.71, 2.78, 2.2, 1.98]
    """
    exact = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
    if degrees in exact:
        return exact[degrees]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def interval(values: np.ndarray | Sequence[float], *, logs: bool | None = None) -> Interval:
    """Return the mean of a few numbers and its 95% confidence interval (Student's t).

    Args:
        values: One number per seed.
        logs: Average logarithms, for ratios and losses; by default if all values are positive.  Differences need
            ``False``: a few differences may all be positive by chance.

    Returns:
        Mean, low and high, without ends for a single value, which resolves nothing, or if a value is not finite.

    Example:
        >>> [round(x, 3) for x in interval([1.0, 2.0, 4.0])]
        [2.0, 0.357, 11.192]
        >>> [round(x, 3) for x in interval([1.0, 2.0, 4.0], logs=False)]
        [2.333, -1.462, 6.128]
    """
    numbers = np.asarray(values, dtype=float)
    if not np.isfinite(numbers).all():
        return float(numbers.mean()), -math.inf, math.inf
    positive = bool((numbers > 0).all()) if logs is None else logs
    terms = np.log(numbers) if positive else numbers
    half = student_quantile(len(terms) - 1) * terms.std(ddof=1) / len(terms) ** 0.5 if len(terms) > 1 else math.inf
    centre = terms.mean()
    mean, low, high = (float(np.exp(b) if positive else b) for b in (centre, centre - half, centre + half))
    return mean, low, high


def jackknife(whole: float, without_each: Sequence[float]) -> Interval:
    """Return a statistic of all seeds with its interval, from the same statistic without each seed in turn.

    Example:
        >>> values = np.array([1.0, 2.0, 6.0])
        >>> found = jackknife(values.mean(), [np.delete(values, k).mean() for k in range(3)])
        >>> [round(x, 6) for x in found] == [round(x, 6) for x in interval(values, logs=False)]
        True
    """
    count = len(without_each)
    centre, low, _ = interval([count * whole - (count - 1) * one for one in without_each], logs=False)
    half = centre - low
    return float(whole), float(whole - half), float(whole + half)


def median_interval(values: np.ndarray | Sequence[float]) -> Interval:
    """Return the median and its 95% interval from order statistics, whatever the distribution.

    Up to five values have no such interval: the least and the greatest of n hold the median between them with
    probability 1 - 2^(1 - n).

    Example:
        >>> median_interval(range(1, 101))
        (50.5, 40.0, 61.0)
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    count = len(ordered)
    if count < 6:
        return float(np.median(ordered)), -math.inf, math.inf
    rank = max(0, math.floor((count - NormalDist().inv_cdf(0.975) * count**0.5) / 2))
    return float(np.median(ordered)), float(ordered[max(0, rank - 1)]), float(ordered[min(count - 1, count - rank)])


def share_interval(hits: int, count: int) -> Interval:
    """Return a share and its 95% interval (Wilson 1927).

    Example:
        >>> [round(x, 3) for x in share_interval(0, 200)], [round(x, 3) for x in share_interval(100, 200)]
        ([0.0, 0.0, 0.019], [0.5, 0.431, 0.569])
    """
    z = NormalDist().inv_cdf(0.975)
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return share, max(0.0, centre - half), centre + half


def less(first: Interval, second: Interval) -> str:
    """Return whether one quantity is less than another, by intervals that do not overlap.

    Example:
        >>> less((1.0, 0.9, 1.1), (2.0, 1.5, 2.5)), less((1.0, 0.9, 1.6), (2.0, 1.5, 2.5))
        ('holds', 'not resolved')
    """
    return HOLDS if first[2] < second[1] else FAILS if first[1] > second[2] else OPEN


def below(value: Interval, bound: float) -> str:
    """Return whether an interval lies below a bound.

    Example:
        >>> below((0.5, 0.4, 0.6), 1.0), below((0.9, 0.7, 1.1), 1.0), below((2.0, 1.5, 2.5), 1.0)
        ('holds', 'not resolved', 'does not hold')
    """
    _, low, high = value
    return HOLDS if high < bound else FAILS if math.inf > low > bound else OPEN


def above(value: Interval, bound: float) -> str:
    """Return whether an interval lies above a bound.

    Example:
        >>> above((0.5, 0.4, 0.6), 1.0), above((2.0, 1.5, 2.5), 1.0)
        ('does not hold', 'holds')
    """
    _, low, high = value
    return HOLDS if low > bound else FAILS if high < bound else OPEN


def within(value: Interval, least: float, most: float) -> str:
    """Return whether an interval lies between two bounds: equal up to a margin, which no test against zero can show.

    Example:
        >>> within((1.0, 0.9, 1.1), 0.8, 1.25), within((1.0, 0.7, 1.4), 0.8, 1.25), within((2.0, 1.5, 2.5), 0.8, 1.25)
        ('holds', 'not resolved', 'does not hold')
    """
    _, low, high = value
    return HOLDS if least < low and high < most else FAILS if low > most or high < least else OPEN


def graded(value: Interval, good: float, fair: float) -> str:
    """Return a verdict on a size that should be small: below ``good``, below ``fair``, or above it.

    Example:
        >>> graded((0.1, 0.05, 0.15), 0.2, 0.5), graded((0.2, 0.1, 0.3), 0.2, 0.5), graded((0.4, 0.2, 0.7), 0.2, 0.5)
        ('holds', 'holds under conditions', 'not resolved')
    """
    small = below(value, good)
    return small if small == HOLDS else PARTLY if below(value, fair) == HOLDS else below(value, fair)


def combined(parts: Iterable[str]) -> str:
    """Return the verdict on a claim from those on its parts, such as several tasks.

    Example:
        >>> combined(["holds", "holds"]), combined(["holds", "not resolved"])
        ('holds', 'holds under conditions')
        >>> combined(["does not hold", "not resolved"]), combined(["not resolved", "not resolved"])
        ('does not hold', 'not resolved')
    """
    verdicts = list(parts)
    if all(part == HOLDS for part in verdicts):
        return HOLDS
    if HOLDS in verdicts or PARTLY in verdicts:
        return PARTLY
    return FAILS if FAILS in verdicts else OPEN


def worst(parts: Iterable[str]) -> str:
    """Return the weakest of several verdicts, where a claim needs all of its parts.

    Example:
        >>> worst(["holds", "holds under conditions"]), worst(["not resolved", "holds"])
        ('holds under conditions', 'not resolved')
    """
    return max(parts, key=(HOLDS, PARTLY, OPEN, FAILS).index)


def largest_z_by_chance(count: int, level: float = 0.05) -> float:
    """Return what the largest of ``count`` absolute z-scores exceeds with this probability at most (Bonferroni).

    Example:
        >>> round(largest_z_by_chance(1), 2), round(largest_z_by_chance(15), 2)
        (1.96, 2.94)
    """
    return NormalDist().inv_cdf(1 - level / (2 * count))


def log_slope(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Return the slope of log y against log x.

    Example:
        >>> round(log_slope([1, 4, 16], [8.0, 4.0, 2.0]), 6)
        -0.5
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def format_interval(value: Interval, digits: int = 2) -> str:
    """Return a mean and its interval as text.

    Example:
        >>> format_interval((0.5, 0.25, 1.0))
        '0.50 [0.25, 1.00]'
    """
    mean, low, high = value
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
