"""What one step, or a whole run, does to the outputs of a model."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS: dict[str, str] = {
    "belief_change": "belief",
    "Evolution": "evolution",
    "gradient_descent": "descent",
    "zo_descent": "descent",
    "ZoDescent": "descent",
    "spectral_path": "recursion",
    "dense_path": "recursion",
    "simulate": "simulation",
    "Simulation": "simulation",
    "zo_sgd_run": "parametric",
    "steps_to_reach": "budget",
    "query_budget": "budget",
    "kernel_drift": "drift",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
