"""Tangent kernels of any model: first-order (eNTK), zeroth-order (ZO-eNTK) and NZK."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS = {
    "entk": "tangent_kernel",
    "kernel_moments": "tangent_kernel",
    "layer_contributions": "tangent_kernel",
    "jacobian": "jacobians",
    "jacobian_vector_product": "jacobians",
    "vector_jacobian_product": "jacobians",
    "head_kernel": "lm_head",
    "head_moments": "lm_head",
    "HeadKernel": "lm_head",
    "FunctionalModel": "model",
    "teacher_forcing": "batches",
    "forward_mode": "checks",
    "zo_entk": "projected_kernel",
    "ZOKernel": "projected_kernel",
    "zo_entk_factors": "projected_kernel",
    "project": "projections",
    "fidelity": "fidelity_table",
    "Fidelity": "fidelity_table",
    "error_curves": "curves",
    "ErrorCurves": "curves",
    "nzk": "nzk_matrix",
    "sample_nzk": "nzk_matrix",
    "NzkEstimate": "nzk_matrix",
    "jacobian_features": "features",
    "Linearization": "features",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
