"""Fine-tuning language models with transformers' loop: trainer, tasks, scoring and the ``finetune`` job."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Collator": "scoring",
    "EncodedDataset": "scoring",
    "PromptTask": "tasks.prompt",
    "ZOConfig": "config",
    "ZOTrainer": "trainer",
    "Objective": "objective",
    "encode": "tasks.encoding",
    "finetune": "job",
    "get_task": "tasks.registry",
    "option_scores": "scoring",
    "replay": "rebuild",
}

__all__ = [
    "Collator",
    "EncodedDataset",
    "Objective",
    "PromptTask",
    "ZOConfig",
    "ZOTrainer",
    "encode",
    "finetune",
    "get_task",
    "option_scores",
    "replay",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"zokernel.finetune.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'zokernel.finetune' has no attribute {name!r}")
