"""``torch_empty_cache_steps``, which transformers reads in a ``training_step`` that zeroth-order steps replace."""

from __future__ import annotations

from typing import Any

from accelerate.utils.memory import clear_device_cache
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EmptyCache(TrainerCallback):
    """Give the device's cached memory back after every so many steps."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Empty the cache if it is time."""
        if args.torch_empty_cache_steps and state.global_step % args.torch_empty_cache_steps == 0:
            clear_device_cache()
