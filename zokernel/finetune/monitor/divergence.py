"""Early warnings that a run diverges or stands still, from the losses and slopes it has logged."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

WINDOW = 10  # steps looked at: the median of this many losses does not follow single batches
RISE = 3.0  # times the first losses
OUTLIER = 30.0  # times the first losses: what no single batch reaches by chance


def trouble(rows: Sequence[dict[str, float]]) -> str | None:
    """Return what is wrong with a run and what to do, or None.

    A run whose weights have grown without bound can end at a loss that looks like guessing: when every option gets the
    same score the slopes are zero, and nothing moves any more.

    Args:
        rows: The steps so far, as in ``steps.jsonl``: each with ``loss`` and, for a zeroth-order method,
            ``projected_gradient``.

    Returns:
        One sentence, or None if the last ten steps look sound.

    Example:
        >>> trouble([{"loss": 0.7}] * 10 + [{"loss": 30.0}] * 10)
        'The loss has risen from 0.7 to 30: training diverges, so start again with a lower learning_rate.'
        >>> trouble([{"loss": 0.7}] * 20) is None
        True
    """
    if len(rows) < WINDOW:
        return None
    recent = rows[-WINDOW:]
    if all(row.get("projected_gradient") == 0 for row in recent):
        return (
            f"All losses of a step were equal in the last {WINDOW} steps, so the weights did not move: raise eps, "
            "or, if the loss had risen before, start again with a lower learning_rate."
        )
    start = statistics.median(row["loss"] for row in rows[:3])
    now = statistics.median(row["loss"] for row in recent)
    if start > 0 and now > RISE * start:
        return (
            f"The loss has risen from {start:.3g} to {now:.3g}: training diverges, so start again with a lower "
            "learning_rate."
        )
    return None


def went_wrong(rows: Sequence[dict[str, float]]) -> str | None:
    """Return that a finished run diverged or came to a standstill, or None.

    Its last losses do not tell: a model that has collapsed to equal scores has the loss of guessing.

    Args:
        rows: All steps, as in ``steps.jsonl``.

    Returns:
        One sentence, or None.

    Example:
        >>> rows = [{"loss": 1.4}] * 10 + [{"loss": 2e4}] * 10 + [{"loss": 1.1}] * 10
        >>> went_wrong(rows)
        'Training diverged: the loss of its batches rose from 1.4 to 2e+04 (a lower learning_rate is needed).'
        >>> went_wrong([{"loss": 1.4}] * 20 + [{"loss": 0.7}] * 10) is None
        True
    """
    if len(rows) < WINDOW:
        return None
    start = statistics.median(row["loss"] for row in rows[:3])
    losses = [row["loss"] for row in rows]
    lasting = max(statistics.median(losses[n : n + WINDOW]) for n in range(len(losses) - WINDOW + 1))
    if start > 0 and (lasting > RISE * start or max(losses) > OUTLIER * max(start, 0.1)):
        return (
            f"Training diverged: the loss of its batches rose from {start:.3g} to {max(losses):.3g} (a lower "
            "learning_rate is needed)."
        )
    if all(row.get("projected_gradient") == 0 for row in rows[-WINDOW:]):
        return (
            f"Training came to a standstill: all losses of a step were equal in the last {WINDOW} steps, as they are "
            "when the model's scores have collapsed (lower learning_rate) or eps is too small."
        )
    return None


class WarnOfDivergence(TrainerCallback):
    """Logs each kind of trouble once.

    Args:
        rows: The log of steps, which grows while the run trains.
    """

    def __init__(self, rows: Sequence[dict[str, float]]):
        self._rows = rows
        self._logged: set[str] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the last steps."""
        found = trouble(self._rows)
        if found is not None and state.is_world_process_zero:
            kind = found.split()[0]
            if kind not in self._logged:
                logger.warning("Step %d: %s", state.global_step, found)
            self._logged.add(kind)
