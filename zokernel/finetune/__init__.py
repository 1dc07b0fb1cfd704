"""Fine-tuning language models with transformers' loop: trainer, tasks, scoring and the ``finetune`` job."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(__name__)  # the names of __init__.pyi
