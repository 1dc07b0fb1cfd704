"""Models larger than the memory: weights stay in files or host memory, and a block comes just before it runs."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(__name__)  # the names of __init__.pyi
