"""Zeroth-order optimizers: directions, an estimator, an update and a way of perturbing, put together.

:class:`ZerothOrder` takes any combination; each published method is one of them under its own name.
"""

from __future__ import annotations

from zokernel._lazy import lazy_exports
from zokernel.optim.registry import get_method, method_options, methods, register

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS = {
    "ZerothOrder": "zeroth_order",
    "ZerothOrderOptions": "options",
    "MeZO": "published.mezo",
    "KerZOO": "published.kerzoo",
    "GRZO": "published.grzo",
    "HiZOO": "published.hizoo",
    "SparseMeZO": "published.sparse_mezo",
    "SubZero": "published.subzero",
    "SubZeroPlus": "published.subzero_plus",
    "LOZO": "published.lozo",
    "LOZOM": "published.lozo",
    "FZOO": "published.fzoo",
    "ForwardDifference": "published.forward_difference",
    "ZOMuon": "published.zo_muon",
    "ZOSign": "published.zo_sign",
    "ZOAdam": "published.adam",
    "ZOAdaMM": "published.adam",
    "QZO": "published.qzo",
    "Richardson": "published.richardson",
    "ForwardGradient": "published.forward_gradient",
    "SPSA15": "published.spsa_1_5",
    "RLOO": "published.rloo",
    "RAdaZO": "published.r_adazo",
    "ConMeZO": "published.conmezo",
    "ES": "published.es",
    "EGGROLL": "published.es",
    "Point": "ask_tell",
    "Adam": "adam_rule",
    "Clip": "updates",
    "ClipSlopes": "updates",
    "CurvatureWeights": "curvature_weights",
    "IterateAverage": "averaging.averages",
    "Normalized": "updates",
    "PolyakBound": "updates",
    "Sign": "updates",
    "SignOfProjections": "updates",
    "iterate_average": "averaging.averages",
    "SGD": "published.first_order",
    "AdamW": "published.first_order",
    "decay_groups": "parameters",
}

__all__ = ["get_method", "method_options", "methods", "register"]
__all__ += sorted(_EXPORTS)

_GONE = {
    "InForward": "zokernel.perturb.InForward",
    "Parallel": "zokernel.perturb.Parallel",
    "Stacked": "zokernel.perturb.Stacked",
    "ZerothOrderOptimizer": "zokernel.optim.ZerothOrder",
}
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS, _GONE)
