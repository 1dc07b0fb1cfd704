"""The early warnings of :mod:`zokernel.finetune.monitor.divergence`, while a run trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from zokernel.finetune.monitor.divergence import find_trouble

logger = logging.getLogger(__name__)


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
        trouble = find_trouble(self._rows)
        if trouble is None or not state.is_world_process_zero:
            return
        kind, sentence = trouble
        if kind not in self._logged:
            logger.warning("Step %d: %s", state.global_step, sentence)
        self._logged.add(kind)
