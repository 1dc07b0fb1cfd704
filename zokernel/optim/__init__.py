"""Zeroth-order optimizers: each one published method, a short composition of directions, estimator and update."""

from __future__ import annotations

import importlib
from typing import Any

from zokernel.optim.registry import get_method, methods, register

_EXPORTS = {
    "ZerothOrderOptimizer": "base",
    "Move": "base",
    "MeZO": "mezo",
    "KerZOO": "kerzoo",
    "HiZOO": "hizoo",
    "SparseMeZO": "sparse_mezo",
    "SubZero": "subzero",
    "LOZO": "lozo",
    "LOZOM": "lozo",
    "FZOO": "fzoo",
    "ZOSign": "zo_sign",
    "ZOAdam": "adam",
    "ZOAdaMM": "adam",
    "Richardson": "richardson",
    "ForwardGradient": "forward_gradient",
    "SGD": "first_order",
    "AdamW": "first_order",
    "decay_groups": "parameters",
    "InForward": "in_forward",
    "Parallel": "parallel",
    "Stacked": "stacked",
}

__all__ = ["get_method", "methods", "register"]
__all__ += sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"zokernel.optim.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'zokernel.optim' has no attribute {name!r}")
