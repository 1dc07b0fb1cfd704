"""How the losses at perturbed weights are taken, and how the weights are restored."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS = {
    "InForward": "in_forward",
    "InPlace": "in_place",
    "PerExampleRows": "per_example",
    "Perturb": "base",
    "Recorded": "recorded",
    "Tangents": "tangents",
    "make_perturb": "registry",
    "matches_in_place": "agreement",
    "perturb_for_replay": "registry",
    "stackable": "changes",
    "Parallel": "parallel",
    "Stacked": "stacked",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
