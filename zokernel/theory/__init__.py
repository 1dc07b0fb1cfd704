"""Closed forms: what zeroth-order kernels do on average, how far they stray, and when they are stable."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS = {
    "smoothing_kernel": "smoothing",
    "SmoothingKernel": "smoothing",
    "KernelFacts": "smoothing",
    "convergence_bounds": "smoothing",
    "KernelMoments": "kernel_error",
    "BeliefMoments": "kernel_error",
    "second_moment": "kernel_error",
    "expected_squared_error": "kernel_error",
    "relative_error": "kernel_error",
    "expected_relative_error": "kernel_error",
    "expected_belief_error": "kernel_error",
    "single_draw_variance": "perturbation_budget",
    "required_perturbations": "perturbation_budget",
    "optimal_shrinkage": "perturbation_budget",
    "shrunken_relative_error": "perturbation_budget",
    "curvature_ratio": "perturbation_budget",
    "learning_rate_ratio": "perturbation_budget",
    "optimal_learning_rate": "perturbation_budget",
    "random_walk_rate": "perturbation_budget",
    "trajectory_relative_error": "perturbation_budget",
    "allocate_blocks": "perturbation_budget",
    "finite_difference_error": "finite_difference",
    "optimal_eps": "finite_difference",
    "error_at_optimum": "finite_difference",
    "third_derivative_from_differences": "finite_difference",
    "noise_from_differences": "finite_difference",
    "jl_distortion": "bounds",
    "jl_distortion_explicit": "bounds",
    "kernel_bound": "bounds",
    "belief_bound": "bounds",
    "projector_norm": "bounds",
    "classical_rate": "bounds",
    "classical_learning_rate": "bounds",
    "ProcessMoments": "nzk_moments",
    "expected_nzk_factor": "nzk_moments",
    "expected_direction_matrix": "nzk_moments",
    "expected_nzk": "nzk_moments",
    "process_moments": "nzk_moments",
    "matching_scale": "nzk_moments",
    "stability_limit": "stability",
    "stability_limit_of_features": "stability",
    "sampling_share": "per_example",
    "per_example_gain": "per_example",
    "gradient_square": "per_example",
    "gradient_outer_product": "per_example",
    "kernel_product": "per_example",
    "low_rank_excess": "low_rank",
    "low_rank_outer_product": "low_rank",
    "residual_noise": "batch_stability",
    "batch_stability_limit": "batch_stability",
    "curvature_factor": "step_budget",
    "StepChoice": "step_budget",
    "step_choices": "step_budget",
    "best_step": "step_budget",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
