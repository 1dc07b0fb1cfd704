r"""The finite-difference error of a two-point estimate and the perturbation size that minimises it.

Along a direction u, with each loss known to a standard deviation :math:`\sigma_L`,

.. math:: D(\mu) = \frac{L(\theta+\mu u) - L(\theta-\mu u)}{2\mu} = g^T u + \frac{\mu^2}{6} T + noise,

where :math:`T = D^3L[u,u,u]` and the noise has standard deviation :math:`\sigma_L / (\sqrt2 \mu)`
(docs/theory.md, "D. Finite differences").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from zokernel.errors import UsageError
from zokernel.values import check_positive, is_number, is_whole


def finite_difference_error(eps: float, loss_noise: float, third_derivative: float) -> float:
    r"""Return the rms error of one projected gradient, :math:`\sqrt{(\mu^2 T/6)^2 + \sigma_L^2 / (2\mu^2)}`.

    Args:
        eps: Perturbation size :math:`\mu`.
        loss_noise: Standard deviation :math:`\sigma_L` of one loss evaluation (rounding).
        third_derivative: rms of :math:`T = D^3L[u,u,u]` over directions.

    Returns:
        The error, in units of a projected gradient.

    Raises:
        UsageError: If ``eps`` is not positive.

    Example:
        >>> finite_difference_error(1e-3, 0.0, 6.0)
        1e-06
    """
    check_positive(eps=eps)
    bias = eps**2 * third_derivative / 6
    return math.hypot(bias, loss_noise / (math.sqrt(2) * eps))


def optimal_eps(loss_noise: float, third_derivative: float) -> float:
    r"""Return :math:`\mu^* = (3\sigma_L / |T|)^{1/3}`, where bias and rounding noise balance best.

    Args:
        loss_noise: Standard deviation :math:`\sigma_L` of one loss evaluation.
        third_derivative: rms of :math:`T` over directions.

    Returns:
        The perturbation size that minimises :func:`finite_difference_error`.

    Raises:
        UsageError: If ``loss_noise`` is negative or ``third_derivative`` is zero (then every size is free of bias).

    Example:
        >>> round(optimal_eps(loss_noise=7.7e-8, third_derivative=261.0), 6)
        0.00096
    """
    if not (is_number(loss_noise) and loss_noise >= 0):
        raise UsageError(f"loss_noise is {loss_noise!r}: a standard deviation is finite and cannot be negative.")
    if not is_number(third_derivative):
        raise UsageError(f"third_derivative is {third_derivative!r}: it must be a finite number.")
    if third_derivative == 0:
        raise UsageError("The third derivative is zero: central differences have no bias, so no eps is best; take any.")
    return (3 * loss_noise / abs(third_derivative)) ** (1 / 3)


def error_at_optimum(loss_noise: float, third_derivative: float) -> float:
    r"""Return the rms error at the best size, :math:`\frac{\sqrt3}{2} \sigma_L / \mu^*`.

    Args:
        loss_noise: Standard deviation :math:`\sigma_L` of one loss evaluation.
        third_derivative: rms of :math:`T` over directions.

    Returns:
        The smallest error that any perturbation size reaches; without noise zero, which small sizes come near.

    Raises:
        UsageError: As for :func:`optimal_eps`.

    Example:
        >>> eps = optimal_eps(1e-7, 100.0)
        >>> math.isclose(error_at_optimum(1e-7, 100.0), finite_difference_error(eps, 1e-7, 100.0))
        True
    """
    eps = optimal_eps(loss_noise, third_derivative)
    return math.sqrt(3) / 2 * loss_noise / eps if eps else 0.0


def third_derivative_from_differences(difference: float, doubled: float, eps: float) -> float:
    r"""Return :math:`T = 2 [D(2\mu) - D(\mu)] / \mu^2` from two central differences along one direction.

    Args:
        difference: :math:`D(\mu)`.
        doubled: :math:`D(2\mu)`.
        eps: :math:`\mu`.

    Returns:
        The third directional derivative, exact to :math:`O(\mu^2)`, with noise :math:`\sqrt{5/2}\,\sigma_L/\mu^3`.

    Raises:
        UsageError: If ``eps`` is not positive.

    Example:
        >>> cube = lambda mu: ((1 + mu) ** 3 - (1 - mu) ** 3) / (2 * mu)
        >>> round(third_derivative_from_differences(cube(0.1), cube(0.2), 0.1), 6)
        6.0
    """
    check_positive(eps=eps)
    return 2 * (doubled - difference) / eps**2


def noise_from_differences(values: Sequence[float], *, order: int | None = None) -> float:
    r"""Estimate the noise of a function from equally spaced values of it (a difference table).

    Differences of order k remove polynomials of degree below k and multiply the variance of independent noise by
    :math:`\binom{2k}{k}`, so :math:`\hat\sigma^2 = \overline{(\Delta^k f)^2} / \binom{2k}{k}`.

    Args:
        values: At least four values at equally spaced points along a line, so close that the function is smooth.
        order: Order k of the differences; by default half the number of values.

    Returns:
        The standard deviation of the noise of one value.

    Raises:
        UsageError: If there are too few values.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> line = np.linspace(0, 1, 2000) ** 2 + 1e-3 * rng.standard_normal(2000)
        >>> 0.95e-3 < noise_from_differences(line, order=3) < 1.05e-3
        True
    """
    table = np.asarray(values, dtype=np.float64)
    order = len(table) // 2 if order is None else order
    if len(table) < 4 or not is_whole(order) or order >= len(table):
        raise UsageError(f"{len(table)} values do not allow differences of order {order}: give at least four values.")
    differences = np.diff(table, n=order)
    return float(np.sqrt(np.mean(differences**2) / math.comb(2 * order, order)))
