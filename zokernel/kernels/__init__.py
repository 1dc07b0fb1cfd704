"""Tangent kernels of any model: first-order (eNTK), zeroth-order (ZO-eNTK) and NZK."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS = {
    "entk": "entk_kernel",
    "kernel_moments": "entk_kernel",
    "layer_contributions": "entk_kernel",
    "jacobian": "jacobians",
    "jacobian_vector_product": "jacobians",
    "vector_jacobian_product": "jacobians",
    "head_kernel": "lm_head",
    "head_moments": "lm_head",
    "HeadKernel": "lm_head",
    "FunctionalModel": "model",
    "teacher_forcing": "model",
    "forward_mode": "checks",
    "zo_entk": "zo_entk_kernel",
    "ZOKernel": "zo_entk_kernel",
    "zo_entk_factors": "zo_entk_kernel",
    "project": "projections",
    "fidelity": "fidelity_table",
    "Fidelity": "fidelity_table",
    "error_curves": "curves",
    "ErrorCurves": "curves",
    "nzk": "nzk_kernel",
    "sample_nzk": "nzk_kernel",
    "NzkEstimate": "nzk_kernel",
    "jacobian_features": "features",
    "Linearization": "features",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
