"""Zeroth-order optimizers: each one published method, a short composition of directions, estimator and update."""

from __future__ import annotations

import importlib
from typing import Any

from zokernel.optim.registry import get_method, methods, register

_EXPORTS = {
    "ZerothOrderOptimizer": "base",
    "MeZO": "mezo",
    "KerZOO": "kerzoo",
    "SGD": "first_order",
    "AdamW": "first_order",
}

__all__ = ["SGD", "AdamW", "KerZOO", "MeZO", "ZerothOrderOptimizer", "get_method", "methods", "register"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"zokernel.optim.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'zokernel.optim' has no attribute {name!r}")
