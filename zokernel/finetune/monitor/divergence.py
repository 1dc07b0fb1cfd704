"""Early warnings that a run diverges or stands still, from the losses and slopes it has logged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

FIRST = 3  # losses that say where a run began: the largest, since one batch may hold only what the model knows
WINDOW = 10  # steps looked at: the median of this many losses does not follow single batches
RISE = 3.0  # times the first losses
OUTLIER = 30.0  # times the first losses: what no single batch reaches by chance
SLOPE_WINDOW = 5  # steps whose slopes are looked at
VANISHED = 0.02  # of the first slopes: batches differ by more than that, as long as the weights matter to the loss
LEARNED = 0.25  # of the first losses: a model that has learned this much may have lost its slopes


def find_trouble(rows: Sequence[dict[str, float]]) -> tuple[str, str] | None:
    """Return what is wrong with a run and what to do, or None.

    A run whose weights have grown without bound can end at a loss that looks like guessing: when every option gets the
    same score the slopes are zero, and nothing moves any more.

    Args:
        rows: The steps so far, as in ``steps.jsonl``: each with ``loss`` and, for a zeroth-order method,
            ``projected_gradient``.

    Returns:
        The kind of trouble, ``standstill`` or ``rise``, and one sentence; None if the last ten steps look sound.

    Example:
        >>> find_trouble([{"loss": 0.7}] * 10 + [{"loss": 30.0}] * 10)
        ('rise', 'The loss has risen from 0.7 to 30: training diverges, so start again with a lower learning_rate.')
        >>> find_trouble([{"loss": 0.7}] * 20) is None
        True
    """
    if len(rows) < WINDOW:
        return None
    if _stands_still(rows):
        return "standstill", (
            f"All losses of a step were equal in the last {WINDOW} steps, so the weights did not move: raise eps, "
            "or, if the loss had risen before, start again with a lower learning_rate."
        )
    start = max(row["loss"] for row in rows[:FIRST])
    now = statistics.median(row["loss"] for row in rows[-WINDOW:])
    if start > 0 and now > RISE * start:
        return "rise", (
            f"The loss has risen from {start:.3g} to {now:.3g}: training diverges, so start again with a lower "
            "learning_rate."
        )
    return None


def describe_divergence(
    rows: Sequence[dict[str, float]], before: float | None = None, *, smooth: bool = True
) -> str | None:
    """Return that a run has diverged, or None: weights after that are worth nothing, whatever their loss looks like.

    The last losses do not tell: a model that has collapsed to equal scores has the loss of guessing.  But on the way
    its loss has risen far, or its slopes have vanished while the loss stayed.

    Args:
        rows: The steps so far, as in ``steps.jsonl``.
        before: Loss of other examples before training, which varies less than that of the first batches.
        smooth: Whether the loss changes with any weight: not if it counts answers.

    Returns:
        One sentence, or None.

    Example:
        >>> describe_divergence([{"loss": 0.7}, {"loss": 6e5}, {"loss": 0.69}])
        'Training diverged: the loss of its batches rose from 0.7 to 6e+05 (a lower learning_rate is needed).'
        >>> rows = [{"loss": 0.7, "projected_gradient": slope} for slope in (1.0, 2.0, 1.0, *[1e-3] * 5)]
        >>> describe_divergence(rows)
        'Training diverged: its slopes fell from 2 to 0.001 while the loss stayed, as they do when the model no longer
        depends on its input (a lower learning_rate is needed).'
        >>> describe_divergence([row | {"loss": 0.01} for row in rows[3:]], 0.7) is None
        True
    """
    if not rows:
        return None
    losses = np.array([row["loss"] for row in rows])
    usual = float(np.median(losses[:FIRST]) if before is None else max(losses[0], before))
    start = float(losses[:FIRST].max()) if before is None else usual
    if not usual > 0:
        return None
    if losses.max() > OUTLIER * max(usual, 0.1) or (_medians(losses, WINDOW) > RISE * start).any():
        return (
            f"Training diverged: the loss of its batches rose from {usual:.3g} to {losses.max():.3g} (a lower "
            "learning_rate is needed)."
        )
    slopes = np.abs([row.get("projected_gradient", math.nan) for row in rows])
    first, later = slopes[:FIRST].max(), _medians(slopes[FIRST:], SLOPE_WINDOW)
    vanished = (later < VANISHED * first) & (_medians(losses[FIRST:], SLOPE_WINDOW) > LEARNED * usual)
    if smooth and vanished.any():
        return (
            f"Training diverged: its slopes fell from {first:.2g} to {later[vanished].min():.2g} while the loss "
            "stayed, as they do when the model no longer depends on its input (a lower learning_rate is needed)."
        )
    return None


def _stands_still(rows: Sequence[dict[str, float]]) -> bool:
    """Return whether no slope of the last ten steps differs from zero."""
    return len(rows) >= WINDOW and all(row.get("projected_gradient") == 0 for row in rows[-WINDOW:])


def _medians(values_T: np.ndarray, length: int) -> np.ndarray:
    """Return the median of every ``length`` consecutive values."""
    if len(values_T) < length:
        return np.empty(0)
    return np.median(np.lib.stride_tricks.sliding_window_view(values_T, length), axis=1)


def describe_failure(rows: Sequence[dict[str, float]]) -> str | None:
    """Return that a finished run diverged or came to a standstill, or None.

    Args:
        rows: All steps, as in ``steps.jsonl``.

    Returns:
        One sentence, or None.

    Example:
        >>> rows = [{"loss": 1.4}] * 10 + [{"loss": 2e4}] * 10 + [{"loss": 1.1}] * 10
        >>> describe_failure(rows)
        'Training diverged: the loss of its batches rose from 1.4 to 2e+04 (a lower learning_rate is needed).'
        >>> describe_failure([{"loss": 1.4}] * 20 + [{"loss": 0.7}] * 10) is None
        True
    """
    divergence = describe_divergence(rows, smooth=False)
    if divergence is None and _stands_still(rows):
        return (
            f"Training came to a standstill: all losses of a step were equal in the last {WINDOW} steps, as they are "
            "when the model's scores have collapsed (lower learning_rate) or eps is too small."
        )
    return divergence
