"""Zeroth-order optimizers: directions, an estimator, an update and a way of perturbing, put together.

:class:`ZerothOrder` takes any combination; each published method is one of them under its own name.  The parts of an
update are in :mod:`zokernel.optim.updates`.
"""

from __future__ import annotations

from zokernel._lazy import lazy_exports

_UPDATES = (
    "Adam",
    "Clip",
    "ClipSlopes",
    "CurvatureWeights",
    "IterateAverage",
    "Normalized",
    "PolyakBound",
    "Sign",
    "SignOfProjections",
    "iterate_average",
)
_GONE = {
    "InForward": "zokernel.perturb.InForward",
    "Parallel": "zokernel.perturb.Parallel",
    "Stacked": "zokernel.perturb.Stacked",
    "ZerothOrderOptimizer": "zokernel.optim.ZerothOrder",
} | {name: f"zokernel.optim.updates.{name}" for name in _UPDATES}

__all__, __getattr__, __dir__ = lazy_exports(__name__, _GONE)  # the names of __init__.pyi
