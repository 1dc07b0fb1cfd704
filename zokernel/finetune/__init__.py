"""Fine-tuning language models with transformers' loop: trainer, tasks, scoring and the ``finetune`` job."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS = {
    "Collator": "scoring.options",
    "EncodedDataset": "scoring.options",
    "PromptTask": "tasks.prompt",
    "ZOConfig": "settings.config",
    "ZOTrainer": "trainer.zo_trainer",
    "Objective": "scoring.objective",
    "encode": "tasks.encoding",
    "finetune": "job",
    "get_task": "tasks.registry",
    "load_predictor": "predict",
    "option_scores": "scoring.options",
    "replay": "storage.replay",
    "zeroth_order": "trainer.zeroth_order",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
