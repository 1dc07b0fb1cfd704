r"""Mean-square stability: below which learning rate the expected squared loss of zeroth-order training stays bounded.

One step maps the second moment :math:`C` of the residual (in the eigenbasis of the kernel, with :math:`l_i` the
eigenvalues of :math:`K/n`) to

.. math:: C^+ = C - \eta c (LC + CL) + \eta^2 \Big[ \kappa LCL + \tfrac{trace}{P} tr(LC) L
          + \tfrac{diagonal}{P} Y diag(Y^T C Y) Y^T \Big], \qquad \kappa = (1 - 1/P) c^2 + outer / P

(docs/theory.md, "Second moment").  The map is positive, so it contracts exactly when :math:`\eta\, \rho(A^{-1} B) < c`,
where :math:`A(C) = LC + CL` and :math:`B` is the bracket: the limit needs no search.  Without the ``diagonal`` term it
is one eigenvalue, :math:`\eta_{max} = 2c / \lambda_{max}(\kappa L + \tfrac{trace}{P} \sqrt l \sqrt l^T)`, which solves
the equation of docs/theory.md, "Stability", :math:`\sum_i (trace/P)\, \eta l_i / (2c - \eta \kappa l_i) = 1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.errors import RunError, UsageError
from zokernel.theory.checks import check_num_perturbations
from zokernel.theory.nzk_moments import ProcessMoments, process_moments


def clean_eigenvalues(eigenvalues: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    """Return eigenvalues as a float64 array with round-off below zero removed.

    Args:
        eigenvalues: Eigenvalues of a kernel or a Hessian, in any order.

    Returns:
        The same eigenvalues, values below round-off set to exactly zero.

    Raises:
        UsageError: If there is none, one is not finite, one is clearly negative or all are zero.
    """
    tensor = eigenvalues if isinstance(eigenvalues, Tensor) else torch.as_tensor(np.asarray(eigenvalues))
    tensor = tensor.detach().cpu() if tensor.is_floating_point() else tensor.detach().cpu().double()
    values = np.atleast_1d(tensor.double().numpy())
    if values.ndim != 1 or values.size == 0:
        raise UsageError(f"Eigenvalues must be a list of numbers, not an array of shape {values.shape}.")
    if not np.isfinite(values).all():
        raise UsageError("Eigenvalues must be finite: check the features or the kernel for NaN and infinity.")
    floor = values.size * torch.finfo(tensor.dtype).eps * np.abs(values).max()
    if values.min() < -100 * floor:
        raise UsageError(
            f"The kernel has a negative eigenvalue ({values.min():.3g}; the largest is {values.max():.3g}): "
            "a kernel must be positive semi-definite."
        )
    values = np.where(values > floor, values, 0.0)
    if not values.any():
        raise UsageError("All eigenvalues are zero: no step changes any prediction.")
    return values


def noise_coefficients(moments: ProcessMoments, num_perturbations: int) -> tuple[float, float, float]:
    r"""Return :math:`(\kappa, trace/P, diagonal/P)`, the coefficients of :math:`\eta^2` when P directions are averaged.

    Args:
        moments: Moments of one random step.
        num_perturbations: Number P of directions averaged per step.

    Returns:
        The three coefficients.
    """
    count = check_num_perturbations(num_perturbations)
    kappa = (1 - 1 / count) * moments.mean**2 + moments.outer / count
    return kappa, moments.trace / count, moments.diagonal / count


def stability_limit(
    eigenvalues: Tensor | np.ndarray | Sequence[float],
    num_perturbations: int = 1,
    coupling: str = "zo_sgd",
    *,
    distribution: str | Distribution = "gaussian",
    dim: int | None = None,
    zeta_distribution: str | Distribution | None = None,
) -> float:
    r"""Return the largest learning rate at which the expected loss does not grow.

    Below the limit :math:`E L_t` converges to the part of the loss that the model cannot fit; above it, it diverges,
    even where the path of the mean converges.  Distributions whose second moment has a diagonal term (all but the
    Gaussian and the sphere) need the features: use :func:`stability_limit_of_features`.  For kurtosis below 3
    (Rademacher, uniform) this function returns a safe value, the limit without that term, which only ever lowers the
    limit.

    Args:
        eigenvalues: Eigenvalues of :math:`H = X^T X / n`, or the nonzero ones of :math:`K / n` (they are the same).
        num_perturbations: Number P of directions averaged per step.
        coupling: ``zo_sgd`` (what zeroth-order SGD does), ``shared`` or ``independent`` (the two kernels of the NZK
            paper), or ``first_order`` for gradient descent: :math:`2 / l_{max}`.
        distribution: Distribution of the directions; Gaussian by default, the setting of the NZK paper.
        dim: Number of parameters d; the number of eigenvalues when not given.  It matters for ``shared``,
            ``independent`` and the sphere, whose factors grow with d.
        zeta_distribution: Distribution of the second vector (``independent`` only).

    Returns:
        The limit, as the learning rate in front of the step (for ``shared`` the mean kernel is :math:`d + 2` times the
        NTK, so the limit is that much smaller).

    Raises:
        UsageError: If the eigenvalues are not those of a kernel, a moment does not exist, or a distribution of kurtosis
            above 3 is given (its limit cannot be bounded from eigenvalues alone).

    Example:
        >>> round(stability_limit([1.0, 0.5, 0.25], 1, "first_order"), 3)
        2.0
        >>> round(stability_limit([1.0, 0.5, 0.25], 1, "zo_sgd"), 3)
        0.586
    """
    values = clean_eigenvalues(eigenvalues)
    if coupling == "first_order":
        return float(2.0 / values.max())
    size = values.size if dim is None else dim
    if np.count_nonzero(values) > size:
        raise UsageError(f"There are {np.count_nonzero(values)} nonzero eigenvalues but only {size} parameters.")
    moments = process_moments(distribution, size, coupling, zeta_distribution=zeta_distribution)
    if moments.diagonal > 0:
        raise UsageError(
            "The stability limit of a distribution with kurtosis above 3 depends on the features, not on eigenvalues "
            "alone: use stability_limit_of_features."
        )
    return limit_from_moments(values, moments, num_perturbations)


def limit_from_moments(eigenvalues: np.ndarray, moments: ProcessMoments, num_perturbations: int) -> float:
    """Return the limit from eigenvalues of K/n and the moments of a step, leaving out the diagonal term.

    Args:
        eigenvalues: Clean eigenvalues (see :func:`clean_eigenvalues`).
        moments: Moments of one random step.
        num_perturbations: Number P of directions averaged per step.

    Returns:
        The largest stable learning rate.
    """
    values = eigenvalues[eigenvalues > 0]
    kappa, trace, _ = noise_coefficients(moments, num_perturbations)
    root = np.sqrt(values)
    top = np.linalg.eigvalsh(np.diag(kappa * values) + trace * np.outer(root, root))[-1]
    return float(2.0 * moments.mean / top)


def stability_limit_of_features(
    features: Tensor,
    num_perturbations: int = 1,
    coupling: str = "zo_sgd",
    *,
    distribution: str | Distribution = "rademacher",
    zeta_distribution: str | Distribution | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 20_000,
) -> float:
    r"""Return the exact limit for any isotropic distribution, by power iteration on :math:`A^{-1}B`.

    Args:
        features: Features or Jacobian rows X, shape (n, d).
        num_perturbations: Number P of directions averaged per step.
        coupling: ``zo_sgd``, ``shared``, ``independent`` or ``first_order``.
        distribution: Distribution of the directions.
        zeta_distribution: Distribution of the second vector (``independent`` only).
        tolerance: Relative change of the eigenvalue at which the iteration stops.
        max_iterations: Iterations before giving up.

    Returns:
        The largest stable learning rate.

    Raises:
        UsageError: If the features are not finite or a moment does not exist.
        RunError: If the iteration has not settled.

    Example:
        >>> features = torch.eye(3, dtype=torch.float64)
        >>> round(stability_limit_of_features(features, distribution="rademacher"), 6)  # |z|^2 = 3 without spread
        2.0
    """
    left, values = reduced_features(features)
    if coupling == "first_order":
        return float(2.0 / values.max())
    moments = process_moments(distribution, features.shape[1], coupling, zeta_distribution=zeta_distribution)
    if moments.diagonal == 0:
        return limit_from_moments(values, moments, num_perturbations)
    kappa, trace, diagonal = noise_coefficients(moments, num_perturbations)
    outer = np.outer(values, values)
    pairs = np.add.outer(values, values)

    def advance(state: np.ndarray) -> np.ndarray:
        noise = kappa * outer * state + trace * (values @ state.diagonal()) * np.diag(values)
        return (noise + diagonal * diagonal_noise(left, state)) / pairs

    return moments.mean / spectral_radius(advance, np.eye(values.size), tolerance, max_iterations)


def spectral_radius(advance: Callable[[Any], Any], state: Any, tolerance: float, max_iterations: int) -> float:
    """Return the largest eigenvalue of a linear map that keeps matrices positive, by power iteration.

    Args:
        advance: The map, of arrays or of tensors.
        state: A positive definite matrix to begin with.
        tolerance: Relative change of the eigenvalue at which the iteration stops.
        max_iterations: Iterations before giving up.

    Raises:
        RunError: If the iteration has not settled.

    Example:
        >>> spectral_radius(lambda state: 2.0 * state, np.eye(4), 1e-9, 10)
        2.0
    """
    state, radius = state / float((state**2).sum()) ** 0.5, math.inf
    for _ in range(max_iterations):
        state = advance(state)
        previous, radius = radius, float((state**2).sum()) ** 0.5
        state = state / radius
        if abs(radius - previous) <= tolerance * radius:
            return radius
    raise RunError(f"The stability limit has not settled in {max_iterations} iterations: raise max_iterations.")


def reduced_features(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    r"""Return :math:`Y = U^T X / \sqrt n` (r, d) and the nonzero eigenvalues :math:`l` of :math:`K / n`, ascending.

    Args:
        features: Features X, shape (n, d).

    Returns:
        ``(Y, l)`` with :math:`Y Y^T = diag(l)`.

    Raises:
        UsageError: If the features have another shape or are not finite.
    """
    x = np.asarray(features.detach().cpu(), dtype=np.float64)
    if x.ndim != 2:
        raise UsageError(f"Features must have shape (n, d), not {x.shape}.")
    if not np.isfinite(x).all():
        raise UsageError("Features must be finite: check them for NaN and infinity.")
    values, vectors = np.linalg.eigh(x @ x.T / len(x))
    values = clean_eigenvalues(values)
    keep = values > 0
    return vectors[:, keep].T @ x / math.sqrt(len(x)), values[keep]


def diagonal_noise(left: np.ndarray, state: np.ndarray) -> np.ndarray:
    r"""Return :math:`Y diag(Y^T C Y) Y^T` for ``left`` Y (r, d) and ``state`` C (r, r)."""
    weights = np.einsum("rk,rk->k", left, state @ left)
    return (left * weights) @ left.T
