"""Closed forms: what zeroth-order kernels do on average, how far they stray, and when they are stable."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(__name__)  # the names of __init__.pyi
