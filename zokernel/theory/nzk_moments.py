r"""Moments of random directions that decide the neural zeroth-order kernel (NZK), in closed form.

With features :math:`X \in R^{n \times d}` (a linear model, or the Jacobian rows of a linearised network) every kernel
here is :math:`X M X^T` for a random :math:`d \times d` matrix :math:`M`:

=============== ============================== =====================================================
coupling        :math:`M`                      what it is
=============== ============================== =====================================================
``zo_sgd``      :math:`z z^T`                  what one step of zeroth-order SGD really applies
``shared``      :math:`|z|^2 z z^T`            the NZK with a single shared vector
``independent`` :math:`\zeta\zeta^T z z^T`     the NZK with two independent vectors
=============== ============================== =====================================================

The NZK is that of Zhang et al. (2026), arXiv:2603.21169.  The mean :math:`E M` gives the evolution of the expected
model (docs/theory.md, "B.1 Expected kernels").  The spread of the random process needs
:math:`E[M Q M^T]`, which for iid symmetric coordinates is always ``outer`` :math:`Q` + ``trace`` :math:`tr(Q) I` +
``diagonal`` :math:`diag(Q)` (docs/theory.md, "Second moment", generalised here to
any distribution with enough moments).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.errors import UsageError
from zokernel.values import is_whole

COUPLINGS = ("shared", "independent", "zo_sgd")


@dataclass(frozen=True)
class ProcessMoments:
    r"""First and second moments of one random step matrix :math:`M`: all that the dynamics needs.

    .. math:: E M = mean \cdot I, \qquad
              E[M Q M^T] = outer \cdot Q + trace \cdot tr(Q) I + diagonal \cdot diag(Q)

    Attributes:
        mean: Factor of the expected kernel over the NTK.
        outer: Coefficient of :math:`Q`.
        trace: Coefficient of :math:`tr(Q) I`.
        diagonal: Coefficient of :math:`diag(Q)`; zero for the Gaussian and the sphere.
    """

    mean: float
    outer: float
    trace: float
    diagonal: float = 0.0

    @classmethod
    def deterministic(cls, factor: float = 1.0) -> ProcessMoments:
        """Return the moments of the constant matrix ``factor * I``: gradient descent, or an expected kernel."""
        return cls(mean=factor, outer=factor**2, trace=0.0)


def check_coupling(coupling: str) -> str:
    """Return ``coupling`` if it is known.

    Raises:
        UsageError: If it is not.
    """
    if coupling not in COUPLINGS:
        raise UsageError(f"There is no coupling {coupling!r}: choose one of {', '.join(COUPLINGS)}.")
    return coupling


def expected_nzk_factor(
    distribution: str | Distribution,
    dim: int,
    coupling: str = "shared",
    *,
    zeta_distribution: str | Distribution | None = None,
) -> float:
    r"""Return :math:`c` in :math:`E K_{NZK} = c\, X X^T` for coordinates of mean zero.

    With :math:`m_k` the moments of one coordinate: ``shared`` :math:`m_4 + (d-1) m_2^2` (:math:`d + 2` for unit
    Gaussians), ``independent`` :math:`m_2(\zeta) m_2(z)`, ``zo_sgd`` :math:`m_2`.  The shared factor needs the fourth
    moment: first and second moments alone do not decide it.

    Args:
        distribution: Distribution of :math:`z`: a name (variance one), a name with its own parameter such as
            ``laplace(0.5)`` or ``student_t(10)``, or a :class:`~zokernel.distributions.Distribution`.
        dim: Number of parameters :math:`d`.
        coupling: ``shared``, ``independent`` or ``zo_sgd``.
        zeta_distribution: Distribution of the second vector (``independent`` only); that of z when not given.

    Returns:
        The factor :math:`c`.

    Raises:
        UsageError: If a moment that it needs does not exist, or the distribution has a mean or a covariance of its own.

    Example:
        >>> names = ("gaussian", "rademacher", "student_t(10)", "laplace(0.5)")
        >>> [round(expected_nzk_factor(name, 2), 6) for name in names]
        [4.0, 2.0, 7.8125, 1.75]
    """
    return _factor(*_distributions(distribution, zeta_distribution, dim, coupling), dim, coupling)


def expected_direction_matrix(
    distribution: str | Distribution,
    dim: int,
    coupling: str = "shared",
    *,
    zeta_distribution: str | Distribution | None = None,
) -> Tensor:
    r"""Return :math:`E M` with :math:`E K_{NZK} = X (E M) X^T`, for any mean and covariance.

    With :math:`z = \mu + A w`, :math:`S = A A^T`, :math:`w` of unit variance and kurtosis :math:`\kappa`, symmetric:

    * ``zo_sgd``: :math:`S + \mu\mu^T`; ``independent``: :math:`(S_\zeta + \mu_\zeta\mu_\zeta^T)(S + \mu\mu^T)`, in
      general not symmetric;
    * ``shared``: :math:`(tr S + |\mu|^2)\mu\mu^T + |\mu|^2 S + 2(S \mu\mu^T + \mu\mu^T S)
      + A\,[\,tr(B) I + 2 B + (\kappa - 3) diag(B)\,]A^T` with :math:`B = A^T A`
      (the sphere has :math:`\frac{d}{d+2}[tr(B) I + 2B]` in the bracket).

    Args:
        distribution: Distribution of :math:`z`, as for :func:`expected_nzk_factor`.
        dim: Number of parameters :math:`d`.
        coupling: ``shared``, ``independent`` or ``zo_sgd``.
        zeta_distribution: Distribution of the second vector (``independent`` only); that of z when not given.

    Returns:
        A (d, d) float64 matrix.

    Raises:
        UsageError: If a moment that it needs does not exist.

    Example:
        >>> shifted = Distribution("gaussian", mean=(1.0, 0.0))
        >>> expected_direction_matrix(shifted, 2, "zo_sgd").tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """
    return _matrix(*_distributions(distribution, zeta_distribution, dim, coupling), dim, coupling)


def _factor(z: Distribution, zeta: Distribution, dim: int, coupling: str) -> float:
    if not (z.is_isotropic and zeta.is_isotropic):
        raise UsageError(
            "A distribution with its own mean or covariance scales no kernel by a single factor: "
            "use expected_direction_matrix, or expected_nzk for the kernel itself."
        )
    if coupling == "zo_sgd":
        return z.moment(2)
    if coupling == "independent":
        return z.moment(2) * zeta.moment(2)
    if z.is_sphere:
        return dim * z.moment(2) ** 2
    return z.moment(4) + (dim - 1) * z.moment(2) ** 2


def _matrix(z: Distribution, zeta: Distribution, dim: int, coupling: str) -> Tensor:
    if coupling == "zo_sgd":
        return z.second_moment_matrix(dim)
    if coupling == "independent":
        return zeta.second_moment_matrix(dim) @ z.second_moment_matrix(dim)
    mean = z.mean_vector(dim)
    factor = z.factor_matrix(dim)
    cov = factor @ factor.T
    outer = torch.outer(mean, mean)
    gram = factor.T @ factor
    inner = gram.trace() * torch.eye(dim, dtype=torch.float64) + 2 * gram
    if z.is_sphere:
        inner = inner * (dim / (dim + 2))
    else:
        inner = inner + (z.kurtosis - 3.0) * torch.diag(gram.diagonal())
    square = mean @ mean
    return (cov.trace() + square) * outer + square * cov + 2 * (cov @ outer + outer @ cov) + factor @ inner @ factor.T


def expected_nzk(
    features: Tensor,
    *,
    distribution: str | Distribution = "gaussian",
    coupling: str = "shared",
    other: Tensor | None = None,
    zeta_distribution: str | Distribution | None = None,
) -> Tensor:
    r"""Return the expected kernel :math:`X_o (E M) X_u^T` exactly, without sampling.

    Args:
        features: Features or Jacobian rows :math:`X_o`, shape (n, d).
        distribution: Distribution of :math:`z`, as for :func:`expected_nzk_factor`.
        coupling: ``shared``, ``independent`` or ``zo_sgd``.
        other: Features :math:`X_u` of the training side, shape (m, d); the same as ``features`` when not given.
        zeta_distribution: Distribution of the second vector (``independent`` only).

    Returns:
        The kernel, shape (n, m), in the dtype of ``features``.

    Raises:
        UsageError: If a moment that it needs does not exist or shapes do not match.

    Example:
        >>> expected_nzk(torch.eye(2)).tolist()
        [[4.0, 0.0], [0.0, 4.0]]
    """
    if features.ndim != 2:
        raise UsageError(f"Features must have shape (n, d), not {tuple(features.shape)}.")
    right = features if other is None else other
    dim = features.shape[1]
    z, zeta = _distributions(distribution, zeta_distribution, dim, coupling)
    if z.is_isotropic and zeta.is_isotropic:
        return _factor(z, zeta, dim, coupling) * (features @ right.T)
    return features @ _matrix(z, zeta, dim, coupling).to(features) @ right.T


def process_moments(
    distribution: str | Distribution,
    dim: int,
    coupling: str = "zo_sgd",
    *,
    zeta_distribution: str | Distribution | None = None,
) -> ProcessMoments:
    r"""Return the first two moments of the random step matrix, for any isotropic distribution with enough moments.

    For one vector :math:`E[\,|z|^{2s} z z^T Q z z^T] = 2\beta Q + \beta\,tr(Q) I + (\alpha - 3\beta) diag(Q)` with
    :math:`\alpha = E|z|^{2s} z_1^4` and :math:`\beta = E|z|^{2s} z_1^2 z_2^2`, where :math:`s = 0` for ``zo_sgd`` and
    :math:`s = 2` for ``shared`` (Gaussian: :math:`\beta = (d+4)(d+6)`); two independent vectors compose.

    Args:
        distribution: Distribution of :math:`z`, as for :func:`expected_nzk_factor`.
        dim: Number of parameters :math:`d`.
        coupling: ``shared``, ``independent`` or ``zo_sgd``.
        zeta_distribution: Distribution of the second vector (``independent`` only).

    Returns:
        The moments.

    Raises:
        UsageError: If a moment that it needs does not exist, or the distribution has a mean or a covariance of its own.

    Example:
        >>> process_moments("gaussian", 6, "shared")
        ProcessMoments(mean=8.0, outer=240.0, trace=120.0, diagonal=0.0)
    """
    z, zeta = _distributions(distribution, zeta_distribution, dim, coupling)
    mean = _factor(z, zeta, dim, coupling)
    power = 2 if coupling == "shared" else 0
    beta, gamma = _pair_and_excess(z, dim, power)
    if coupling != "independent":
        return ProcessMoments(mean, outer=2 * beta, trace=beta, diagonal=gamma)
    beta2, gamma2 = _pair_and_excess(zeta, dim, 0)
    return ProcessMoments(
        mean,
        outer=4 * beta * beta2,
        trace=2 * beta2 * beta + beta2 * (2 * beta + dim * beta + gamma) + gamma2 * beta,
        diagonal=2 * beta2 * gamma + gamma2 * (2 * beta + gamma),
    )


def matching_scale(distribution: str, dim: int, target: float) -> float:
    """Return the factor on the scale of a distribution that makes its shared NZK factor equal ``target``.

    The shared factor grows with the fourth power of the scale, so the answer is a fourth root.

    Args:
        distribution: Distribution to rescale, for example ``laplace(1)``.
        dim: Number of parameters.
        target: Wanted shared factor.

    Returns:
        The factor on the scale.

    Example:
        >>> round(matching_scale("laplace(1)", 2, 4.0), 4)  # the published figure uses 0.605
        0.6148
    """
    return (target / expected_nzk_factor(distribution, dim, "shared")) ** 0.25


def _distributions(
    distribution: str | Distribution,
    zeta_distribution: str | Distribution | None,
    dim: int,
    coupling: str,
) -> tuple[Distribution, Distribution]:
    check_coupling(coupling)
    if not is_whole(dim):
        raise UsageError(f"The number of parameters must be a whole number of at least 1, not {dim!r}.")
    z = Distribution.parse(distribution)
    if zeta_distribution is None:
        return z, z
    if coupling != "independent":
        raise UsageError(
            f"A second distribution has no meaning with coupling {coupling!r}: it belongs to 'independent'."
        )
    return z, Distribution.parse(zeta_distribution)


def _pair_and_excess(z: Distribution, dim: int, power: int) -> tuple[float, float]:
    r"""Return :math:`\beta = E|z|^{2s}z_1^2z_2^2` and :math:`\alpha-3\beta` for :math:`s` = ``power`` in {0, 2}."""
    if not z.is_isotropic:
        raise UsageError(
            "Second moments of the process are known for distributions without a mean or covariance of their own only: "
            "simulate the process instead."
        )
    second = z.moment(2)
    if z.is_sphere:
        return (dim * second) ** power * dim / (dim + 2) * second**2, 0.0
    fourth = z.moment(4)
    if power == 0:
        return second**2, fourth - 3 * second**2
    sixth, eighth = z.moment(6), z.moment(8)

    def square_of_rest(count: int) -> float:  # E R^2 for R a sum of `count` squared coordinates
        return count * fourth + count * (count - 1) * second**2

    alpha = eighth + 2 * sixth * (dim - 1) * second + fourth * square_of_rest(dim - 1)
    if dim == 1:  # no second coordinate: split so that outer + trace + diagonal is the scalar moment
        return alpha / 3, 0.0
    beta = 2 * sixth * second + 2 * fourth**2 + 4 * (dim - 2) * second**2 * fourth
    beta += second**2 * square_of_rest(dim - 2)
    excess = alpha - 3 * beta
    return beta, 0.0 if math.isclose(alpha, 3 * beta, rel_tol=1e-13) else excess
