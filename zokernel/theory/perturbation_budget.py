r"""How many directions are enough, and what to do with too few.

All of it follows from one number, the relative variance of a single Gaussian direction :math:`v = 1 + \rho^{-2}`;
the derivations are in docs/theory.md, "A.3 Exact results".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zokernel.errors import UsageError
from zokernel.theory.checks import check_num_perturbations
from zokernel.theory.kernel_error import check_similarity
from zokernel.values import check_positive, is_number


def single_draw_variance(rho: float) -> float:
    r"""Return :math:`v = 1 + \rho^{-2}`, the relative squared error of one Gaussian direction.

    Args:
        rho: Similarity in (0, 1].

    Returns:
        v, at least 2.

    Raises:
        UsageError: If rho is not in (0, 1].

    Example:
        >>> single_draw_variance(0.5)
        5.0
    """
    check_similarity(rho)
    return 1.0 + rho**-2


def required_perturbations(rho: float, tolerance: float, *, confidence: float | None = None) -> int:
    r"""Return the smallest P whose rms relative error is at most ``tolerance``: :math:`\lceil v / t^2 \rceil`.

    With ``confidence`` the statement is about every draw instead of the rms: Chebyshev's inequality
    :math:`\Pr(err > t) \le v / (P t^2)` gives :math:`P = \lceil v / ((1 - c)\,t^2) \rceil`.

    Args:
        rho: Similarity in (0, 1].
        tolerance: Relative error t, for example 0.1.
        confidence: Probability c with which the error must stay below t; ``None`` for the rms.

    Returns:
        The number of directions.

    Raises:
        UsageError: If an argument is out of range.

    Example:
        >>> required_perturbations(10**-0.5, 0.1), required_perturbations(1.0, 0.3)
        (1100, 23)
    """
    if not (is_number(tolerance) and tolerance > 0):
        raise UsageError(f"tolerance is {tolerance!r}: a relative error to reach must be positive and finite.")
    if confidence is not None and not (is_number(confidence) and 0.0 <= confidence < 1.0):
        raise UsageError(f"confidence is {confidence!r}: it must lie in [0, 1).")
    target = tolerance**2 * (1.0 if confidence is None else 1.0 - confidence)
    return max(1, math.ceil(round(single_draw_variance(rho) / target, 9)))


def optimal_shrinkage(rho: float, num_perturbations: int) -> float:
    r"""Return :math:`c^* = \arg\min_c E\|c\hat K - K\|^2 = 1 / (1 + v/P)`.

    Args:
        rho: Similarity in (0, 1].
        num_perturbations: P.

    Returns:
        The factor, in (0, 1); multiply the learning rate by it to take the best step in the mean-square sense.

    Example:
        >>> optimal_shrinkage(0.5, 5)
        0.5
    """
    return 1.0 / (1.0 + single_draw_variance(rho) / check_num_perturbations(num_perturbations))


def shrunken_relative_error(rho: float, num_perturbations: int) -> float:
    r"""Return the rms relative error after optimal shrinkage, :math:`\sqrt{(v/P) / (1 + v/P)} < 1`.

    Args:
        rho: Similarity in (0, 1].
        num_perturbations: P.

    Returns:
        The relative error.

    Example:
        >>> round(shrunken_relative_error(0.5, 5), 4)
        0.7071
    """
    ratio = single_draw_variance(rho) / check_num_perturbations(num_perturbations)
    return math.sqrt(ratio / (1.0 + ratio))


def curvature_ratio(trace_hessian: float, gradient_sq: float, gradient_curvature: float) -> float:
    r"""Return :math:`r = tr H\,\|g\|^2 / (g^T H g)`: the trace in units of the curvature along the gradient.

    Args:
        trace_hessian: :math:`tr H`.
        gradient_sq: :math:`\|g\|^2`.
        gradient_curvature: :math:`g^T H g`.

    Returns:
        r; for an isotropic Hessian it is the dimension.

    Raises:
        UsageError: If the loss has no curvature along the gradient.

    Example:
        >>> curvature_ratio(trace_hessian=30.0, gradient_sq=2.0, gradient_curvature=20.0)
        3.0
    """
    if gradient_curvature == 0:
        raise UsageError("The loss has no curvature along the gradient (g^T H g = 0): no trace is relative to it.")
    return trace_hessian * gradient_sq / gradient_curvature


def learning_rate_ratio(num_perturbations: int, ratio: float) -> float:
    r"""Return :math:`\eta_{zo}/\eta_{fo} = P / (P + 1 + r)` of the steps that decrease a quadratic loss fastest.

    Args:
        num_perturbations: P.
        ratio: r of :func:`curvature_ratio`.

    Returns:
        The ratio (Gaussian directions), in (0, 1) when r is positive.

    Raises:
        UsageError: If :math:`P + 1 + r` is not positive (the loss is concave along the step: no finite best step).

    Example:
        >>> learning_rate_ratio(10, 89.0)
        0.1
    """
    check_num_perturbations(num_perturbations)
    if num_perturbations + 1 + ratio <= 0:
        raise UsageError("P + 1 + r is not positive: the curvature along the step is negative, no step size is best.")
    return num_perturbations / (num_perturbations + 1 + ratio)


def optimal_learning_rate(
    num_perturbations: int, *, gradient_sq: float, trace_hessian: float, gradient_curvature: float
) -> float:
    r"""Return the step size that decreases a quadratic loss fastest with P Gaussian directions.

    :math:`\eta = \|g\|^2 / E[\hat g^T H \hat g]`, :math:`E[\hat g^T H \hat g] = ((P+1) g^T H g + \|g\|^2 tr H) / P`.

    Args:
        num_perturbations: P.
        gradient_sq: :math:`\|g\|^2`.
        trace_hessian: :math:`tr H`.
        gradient_curvature: :math:`g^T H g`.

    Returns:
        The step size.

    Raises:
        UsageError: If the expected curvature along the step is not positive.

    Example:
        >>> optimal_learning_rate(1, gradient_sq=1.0, trace_hessian=8.0, gradient_curvature=1.0)
        0.1
    """
    check_num_perturbations(num_perturbations)
    curvature = ((num_perturbations + 1) * gradient_curvature + gradient_sq * trace_hessian) / num_perturbations
    if curvature <= 0:
        raise UsageError("The expected curvature along the step is not positive: no step size is best.")
    return gradient_sq / curvature


def random_walk_rate(walk: float, *, gradient_norm: float, num_perturbations: int, num_steps: int) -> float:
    r"""Return the learning rate at which the noise of a run takes every weight a given distance from its start.

    A step along P directions of variance one moves each weight by :math:`\eta \|g\| / \sqrt P` (rms), most of it noise
    that is new in every step: :math:`D = \eta \|g\| \sqrt{T/P}` after T steps.

    Args:
        walk: D, in units of the weights.
        gradient_norm: :math:`\|g\|` of a batch.
        num_perturbations: P.
        num_steps: T.

    Returns:
        The learning rate :math:`D \sqrt{P/T} / \|g\|`.

    Raises:
        UsageError: If P or T is no positive whole number, or the gradient is zero.

    Example:
        >>> random_walk_rate(0.01, gradient_norm=5.0, num_perturbations=4, num_steps=400)
        0.0002
    """
    check_num_perturbations(num_perturbations)
    check_positive(num_steps=num_steps, gradient_norm=gradient_norm)
    return walk * math.sqrt(num_perturbations / num_steps) / gradient_norm


def trajectory_relative_error(rho: float, num_perturbations: int, num_steps: int) -> float:
    r"""Return :math:`\sqrt{v / (P T)}`: independent draws of T small steps average like more directions in one.

    Args:
        rho: Similarity in (0, 1], taken as constant over the steps (the lazy regime).
        num_perturbations: P per step.
        num_steps: T.

    Returns:
        The rms relative error of the accumulated change, which is why P = 1 works at all.

    Example:
        >>> trajectory_relative_error(0.5, 1, 500) == trajectory_relative_error(0.5, 5, 100)
        True
    """
    check_num_perturbations(num_perturbations)
    check_positive(num_steps=num_steps)
    return math.sqrt(single_draw_variance(rho) / (num_perturbations * num_steps))


@dataclass(frozen=True)
class BlockAllocation:
    r"""Directions to spend on each block of parameters when blocks are perturbed one at a time.

    Attributes:
        shares: Share of the directions for each block, :math:`\propto \sqrt{S_l + \|K_l\|^2}`.
        variance: :math:`(\sum_l \sqrt{v_l})^2`; divide by the total number of directions for the squared error.
        joint_variance: :math:`S + \|K\|^2` of perturbing everything at once, for comparison.
    """

    shares: list[float]
    variance: float
    joint_variance: float


def allocate_blocks(products: Sequence[float], kernels_sq: Sequence[float], joint_variance: float) -> BlockAllocation:
    r"""Split a budget of directions over blocks of parameters so that the kernel's error is smallest.

    Args:
        products: :math:`S_l = \|J_{o,l}\|_F^2 \|J_{u,l}\|_F^2` of each block.
        kernels_sq: :math:`\|K_l\|_F^2` of each block.
        joint_variance: :math:`S + \|K\|_F^2` of all parameters together.

    Returns:
        Shares, the resulting variance and the joint one.

    Raises:
        UsageError: If a product or a kernel is negative, or all are zero.

    Example:
        >>> allocate_blocks([9.0, 1.0], [0.0, 0.0], joint_variance=16.0).shares
        [0.75, 0.25]
    """
    if not all(is_number(square) and square >= 0 for square in (*products, *kernels_sq)):
        raise UsageError("Squared norms of blocks must be at least 0 and finite: check products and kernels_sq.")
    roots = [math.sqrt(product + kernel_sq) for product, kernel_sq in zip(products, kernels_sq, strict=True)]
    total = math.fsum(roots)
    if not total:
        raise UsageError("All blocks have zero Jacobians, so no share of the directions is better than another.")
    return BlockAllocation([root / total for root in roots], total**2, joint_variance)
