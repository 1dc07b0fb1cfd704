"""Zeroth-order optimizers: each one published method, a short composition of directions, estimator and update."""

from __future__ import annotations

from zokernel._lazy import lazy_exports
from zokernel.optim.registry import get_method, methods, register

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS = {
    "ZerothOrderOptimizer": "base",
    "Move": "moves",
    "MeZO": "mezo",
    "KerZOO": "kerzoo",
    "HiZOO": "hizoo",
    "SparseMeZO": "sparse_mezo",
    "SubZero": "subzero",
    "LOZO": "lozo",
    "LOZOM": "lozo",
    "FZOO": "fzoo",
    "ForwardDifference": "forward_difference",
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

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
