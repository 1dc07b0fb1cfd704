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
        'The loss has risen from 0.7 to 30: training diverges, so start again with a lower --learning_rate.'
        >>> trouble([{"loss": 0.7}] * 20) is None
        True
    """
    if len(rows) < WINDOW:
        return None
    recent = rows[-WINDOW:]
    if all(row.get("projected_gradient") == 0 for row in recent):
        return (
            f"All losses of a step were equal in the last {WINDOW} steps, so the weights did not move: raise --eps, "
            "or, if the loss had risen before, start again with a lower --learning_rate."
        )
    start = statistics.median(row["loss"] for row in rows[:3])
    now = statistics.median(row["loss"] for row in recent)
    if start > 0 and now > RISE * start:
        return (
            f"The loss has risen from {start:.3g} to {now:.3g}: training diverges, so start again with a lower "
            "--learning_rate."
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
