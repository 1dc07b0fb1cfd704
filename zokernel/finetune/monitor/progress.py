"""What a run shows while it trains: a bar that counts forwards, or log lines where there are no bars."""

from __future__ import annotations

import logging
import sys
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from zokernel.finetune.monitor.paired import CHANGE, ERROR
from zokernel.finetune.monitor.run_log import RunLog

logger = logging.getLogger(__name__)

LOSS = "loss"  # what a step lowers, or raises: minus the loss
REWARD, PENALISED = "reward", "reward less penalty"

_LABELS = {
    "loss": "loss",
    "projected_gradient": "|projected gradient|",
    "forwards_per_second": "forwards/s",
    "eval_loss": "validation loss",
    "eval_accuracy": "validation accuracy",
    "eval_f1": "validation F1",
}
_REWARD_LABELS = {"eval_reward": "validation reward", "eval_pass_rate": "pass rate", "eval_kl": "KL divergence"}


class ForwardProgress(ProgressCallback):
    """The Trainer's progress bar with the loss, |projected gradient| and forwards per second beside the time left.

    Args:
        log: The log that is shown.
        quantity: ``loss``, or what the run of rewards raises.
    """

    def __init__(self, log: RunLog, quantity: str = LOSS):
        super().__init__()
        self._log, self._quantity = log, quantity
        self._smooth_loss: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if state.is_world_process_zero and self.training_bar is not None and self._log.rows:
            row = self._log.rows[-1]
            previous = row["loss"] if self._smooth_loss is None else self._smooth_loss
            self._smooth_loss = 0.9 * previous + 0.1 * row["loss"]
            self.training_bar.set_postfix(
                {
                    self._quantity: f"{_sign(self._quantity) * self._smooth_loss:z.4f}",
                    **({"|pg|": f"{row['projected_gradient']:.3g}"} if "projected_gradient" in row else {}),
                    "fwd/s": f"{self._log.forwards_per_second():.1f}",
                },
                refresh=False,
            )
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Print evaluations above the bar; the loss is in the bar already."""
        is_shown = state.is_world_process_zero and not self._log.replayed
        if logs and is_shown and self.training_bar is not None and "eval_loss" in logs:
            self.training_bar.write(_line(state.global_step, logs, self._quantity), file=sys.stderr)


class ForwardLines(TrainerCallback):
    """The same as log lines, for output that goes to a file.

    Args:
        log: The log that is shown.
        quantity: ``loss``, or what the run of rewards raises.
    """

    def __init__(self, log: RunLog, quantity: str = LOSS):
        self._log, self._quantity = log, quantity

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Log one line."""
        is_shown = state.is_world_process_zero and not self._log.replayed
        if logs and is_shown and ("loss" in logs or "eval_loss" in logs):
            logger.info("%s", _line(state.global_step, logs, self._quantity))


def _sign(quantity: str) -> int:
    return 1 if quantity == LOSS else -1


def _line(step: int, logs: dict[str, float], quantity: str = LOSS) -> str:
    """Return what was logged; of a held-out loss also by how much the same examples have changed.

    Example:
        >>> _line(20, {"eval_loss": 1.638, "eval_loss_change": -0.0053, "eval_loss_change_error": 0.0017})
        'step 20: validation loss 1.638 (-0.0053 ± 0.0017 since the start)'
        >>> _line(20, {"eval_loss": -0.9, "eval_reward": 0.9, "eval_pass_rate": 0.9}, "reward")
        'step 20: validation reward 0.900, pass rate 0.9'
    """
    numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
    parts = {key: f"{label} {numbers[key]:.4g}" for key, label in _LABELS.items() if key in numbers}
    if quantity != LOSS:
        labels = {"loss": quantity, "eval_loss": f"validation {quantity}"}
        parts |= {key: f"{label} {-numbers[key]:z.3f}" for key, label in labels.items() if key in numbers}
        others = dict(_REWARD_LABELS)
        if quantity == REWARD:
            del others["eval_reward"]  # already there, as minus the loss
        parts |= {key: f"{label} {numbers[key]:.4g}" for key, label in others.items() if key in numbers}
    if f"eval_{CHANGE}" in logs:
        change = _sign(quantity) * logs[f"eval_{CHANGE}"]
        parts["eval_loss"] += f" ({change:+z.2g} ± {logs[f'eval_{ERROR}']:.2g} since the start)"
    return f"step {step}: " + ", ".join(parts.values())
