"""A clean stop on Ctrl-C."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one stops at once.

    Attributes:
        interrupted: Whether a signal came.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals during training."""
        self.interrupted = False
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
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Give the signals back to whoever had them before training; done also where training ends with an error."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
