"""What one step, or a whole run, does to the outputs of a model."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS = {
    "belief_change": "belief",
    "Evolution": "evolution",
    "gradient_descent": "descent",
    "zo_descent": "descent",
    "ZoDescent": "descent",
    "batch_descent": "minibatch",
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

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
