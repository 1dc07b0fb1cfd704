"""A run that only makes the model worse is stopped: what ``--method auto`` does unless a patience is given."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from zokernel.finetune.monitor.course import beyond_chance
from zokernel.finetune.monitor.paired import CHANGE, ERROR

logger = logging.getLogger(__name__)

PATIENCE = 3  # evaluations in a row


def count_worse(history: Sequence[Mapping[str, float]]) -> int:
    """Return how many of the last evaluations were worse than the weights before training, one after the other.

    One is worse if the loss of the same examples rose by two standard errors and by a thousandth.

    Args:
        history: What the Trainer logged, with ``eval_loss_change`` and ``eval_loss_change_error``.

    Example:
        >>> rows = [{"eval_loss": 2.0, "eval_loss_change": change, "eval_loss_change_error": 0.1}
        ...     for change in (0.5, 0.1, 0.3, 0.4)]
        >>> count_worse(rows)
        2
    """
    count = 0
    for row in reversed([row for row in history if "eval_loss" in row]):
        change, error = row.get(f"eval_{CHANGE}"), row.get(f"eval_{ERROR}")
        if change is None or error is None or not beyond_chance(change, error, row["eval_loss"] - change):
            break
        count += 1
    return count


class StopWhenWorse(TrainerCallback):
    """Stops a run whose held-out loss was above that before training in :data:`PATIENCE` evaluations in a row.

    It reads what was logged, so that a resumed run stops where the run itself would have.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the last evaluations."""
        if control.should_training_stop or count_worse(state.log_history) < PATIENCE:
            return
        control.should_training_stop = True
        if state.is_world_process_zero:
            row = state.log_history[-1]
            logger.warning(
                "Step %d of %d: the held-out loss was above that before training in the last %d evaluations (now by "
                "%.3g ± %.2g), so the run stops (early_stopping_patience chooses another rule).",
                state.global_step,
                state.max_steps,
                PATIENCE,
                row[f"eval_{CHANGE}"],
                row[f"eval_{ERROR}"],
            )
