"""What a run shows and keeps while it trains: a bar that counts forwards, a log, and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from zokernel.files import write_text

if TYPE_CHECKING:
    from zokernel.finetune.trainer.zo_trainer import ZOTrainer

logger = logging.getLogger(__name__)

STEPS_FILE = "steps.jsonl"


class RunLog(TrainerCallback):
    """Keeps one row a step: loss, projected gradient, forwards and seconds so far; also in ``steps.jsonl``.

    Args:
        trainer: The trainer whose optimizer is read after every step.
    """

    def __init__(self, trainer: ZOTrainer):
        self._trainer = trainer
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self.forwards = 0
        self._since = time.perf_counter()
        self._seconds_at: dict[int, float] = {}
        self._file: TextIO | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; when resuming, take up the rows of the steps already done."""
        kept = read_rows(Path(args.output_dir) / STEPS_FILE) if self._trainer.continues else []
        self._seconds_at = {int(row["step"]): row["seconds"] for row in kept}
        self.rows = [row for row in kept if row["step"] <= state.global_step]
        self.forwards, self.seconds = (
            (int(self.rows[-1]["forwards"]), self.rows[-1]["seconds"]) if self.rows else (0, 0)
        )
        self._file = None
        self._since = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing a step; evaluation between steps is not counted."""
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append a row."""
        if self._trainer.is_replaying:
            self.seconds = self._seconds_at.get(state.global_step, self.seconds)
        else:
            self.seconds += time.perf_counter() - self._since
        self.forwards += self._trainer.forwards_per_step * max(1, args.gradient_accumulation_steps)
        row: dict[str, float] = {
            "step": state.global_step,
            "forwards": self.forwards,
            "seconds": round(self.seconds, 3),
            "loss": self._trainer.last_loss,
        }
        estimate = getattr(self._trainer.bare_optimizer, "last_estimate", None)
        if estimate is not None:
            # Root mean square of the P projected gradients; each coefficient is one of them over P.
            coefficients = estimate.coefficients.values()
            row["projected_gradient"] = math.sqrt(sum(c * c for c in coefficients) * len(coefficients))
        if self._trainer.parallel is not None:
            row["bytes_sent"] = self._trainer.parallel.bytes_sent
        self.rows.append(row)
        if args.should_save and not self._trainer.is_replaying:
            self._write(Path(args.output_dir), row)

    def _write(self, folder: Path, row: dict[str, float]) -> None:
        if self._file is None:
            # What an earlier process wrote after the last whole step is replaced.
            self.save(folder)
            self._file = (folder / STEPS_FILE).open("a", encoding="utf-8")
        else:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def forwards_at(self, step: float) -> int:
        """Return how many forwards had been used after ``step`` steps."""
        return next((int(row["forwards"]) for row in reversed(self.rows) if row["step"] <= step), 0)

    def save(self, folder: Path) -> None:
        """Write all rows to ``steps.jsonl``."""
        if self._file is not None:
            self._file.close()
            self._file = None
        write_text(folder / STEPS_FILE, "".join(json.dumps(row) + "\n" for row in self.rows))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add forwards and the projected gradient to what the Trainer logs (progress bar, TensorBoard, W&B, ...)."""
        if logs is None or "loss" not in logs or not self.rows:
            return
        recent = [row["projected_gradient"] for row in self.rows[-10:] if "projected_gradient" in row]
        if recent:
            logs["projected_gradient"] = sum(recent) / len(recent)
        logs["forwards"] = self.forwards
        logs["forwards_per_second"] = round(self.forwards / max(self.seconds, 1e-9), 2)
        logs.pop("grad_norm", None)


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of a ``steps.jsonl``, up to a line that was torn by a crash."""
    rows: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class ForwardProgress(ProgressCallback):
    """The Trainer's progress bar with the loss, |projected gradient| and forwards a second beside the time left.

    Args:
        trainer: The trainer whose log is shown.
    """

    def __init__(self, trainer: ZOTrainer):
        super().__init__()
        self._trainer = trainer
        self._smooth_loss: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        log = self._trainer.run_log
        if state.is_world_process_zero and self.training_bar is not None and log.rows:
            row = log.rows[-1]
            previous = row["loss"] if self._smooth_loss is None else self._smooth_loss
            self._smooth_loss = 0.9 * previous + 0.1 * row["loss"]
            self.training_bar.set_postfix(
                {
                    "loss": f"{self._smooth_loss:.4f}",
                    **({"|pg|": f"{row['projected_gradient']:.3g}"} if "projected_gradient" in row else {}),
                    "fwd/s": f"{log.forwards / max(log.seconds, 1e-9):.1f}",
                },
                refresh=False,
            )
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Print evaluations above the bar; the loss is in the bar already."""
        shown = state.is_world_process_zero and not self._trainer.is_replaying
        if logs and shown and self.training_bar is not None and "eval_loss" in logs:
            self.training_bar.write(_line(state.global_step, logs), file=sys.stderr)


class ForwardLines(TrainerCallback):
    """The same as log lines, for output that goes to a file.

    Args:
        trainer: The trainer whose log is shown.
    """

    def __init__(self, trainer: ZOTrainer):
        self._trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Log one line."""
        shown = state.is_world_process_zero and not self._trainer.is_replaying
        if logs and shown and ("loss" in logs or "eval_loss" in logs):
            logger.info("%s", _line(state.global_step, logs))


_SHOWN = {
    "loss": "loss",
    "projected_gradient": "|projected gradient|",
    "forwards_per_second": "forwards/s",
    "eval_loss": "validation loss",
    "eval_accuracy": "validation accuracy",
    "eval_f1": "validation F1",
}


def _line(step: int, logs: dict[str, float]) -> str:
    return f"step {step}: " + ", ".join(f"{label} {logs[key]:.4g}" for key, label in _SHOWN.items() if key in logs)


def replace_progress_bar(trainer: ZOTrainer) -> None:
    """Put our bar (or, where progress bars are off, our log lines) in place of the Trainer's own."""
    trainer.pop_callback(PrinterCallback)
    has_bar = trainer.pop_callback(ProgressCallback) is not None
    trainer.add_callback(ForwardProgress(trainer) if has_bar else ForwardLines(trainer))


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals for the time of training."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        logger.warning("Interrupted: finishing this step, then saving (press Ctrl-C again to stop at once).")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask the Trainer to save and stop if a signal came."""
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
