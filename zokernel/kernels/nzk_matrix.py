r"""The neural zeroth-order kernel (NZK) by vectorised Monte Carlo, with the standard error of every entry.

For features :math:`X` (rows :math:`x_i`: inputs of a linear model, or Jacobian rows of a network)

=============== ================================================== ==============================================
coupling        entry (i, j)                                       as in
=============== ================================================== ==============================================
``shared``      :math:`|z|^2 (z^T x_i)(z^T x_j)`                   the published kernel with one shared vector
``independent`` :math:`(\zeta^T x_i)(\zeta^T z)(z^T x_j)`          the published kernel with two vectors
``zo_sgd``      :math:`(z^T x_i)(z^T x_j)`                         what a step of zeroth-order SGD applies
=============== ================================================== ==============================================

The published kernels are those of Zhang et al. (2026), arXiv:2603.21169.

All samples of a block are one matrix product: with :math:`A = Z X^T` the shared estimate is
:math:`A^T diag(|z|^2) A / S`, and its second moment :math:`(A^2)^T diag(|z|^4) A^2 / S` is one more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.errors import UsageError
from zokernel.theory.nzk_moments import check_coupling

# Shape suffixes: N examples (o: evaluated, u: trained on), S samples of a block, D parameters.

BLOCK_ELEMENTS = 2**22  # of Z: 32 MiB in float64


class NzkEstimate(NamedTuple):
    """A Monte Carlo estimate of the NZK.

    Attributes:
        mean: Average over samples.
        standard_error: Standard error of every entry of ``mean``.
    """

    mean: Tensor
    standard_error: Tensor


def sample_nzk(
    features: Tensor,
    *,
    distribution: str | Distribution = "gaussian",
    coupling: str = "shared",
    num_samples: int = 10_000,
    seed: int = 0,
    other: Tensor | None = None,
    zeta_distribution: str | Distribution | None = None,
) -> NzkEstimate:
    r"""Estimate the expected NZK from samples, with standard errors.

    The default is the setting of the paper, Gaussian vectors and one vector shared; optimizers draw Rademacher ones.

    Args:
        features: Features :math:`X_o` of the evaluated points, (n, d); or (n, V, d) for models with V outputs.
        distribution: Distribution of the vectors: a name (variance one), a name with its parameter such as
            ``laplace(0.5)``, or a :class:`~zokernel.distributions.Distribution`.
        coupling: ``shared``, ``independent`` or ``zo_sgd``.
        num_samples: Number of sampled vectors (pairs of vectors for ``independent``).
        seed: Seed of the draws.
        other: Features :math:`X_u` of the training points; the same points when not given.
        zeta_distribution: Distribution of the second vector (``independent`` only); that of z when not given.

    Returns:
        Mean and standard error, each (n, m), or (n, V, m, V) for features of several outputs.

    Raises:
        UsageError: If shapes do not match, the features are not finite, or a name is unknown.

    Example:
        >>> estimate = sample_nzk(torch.eye(2), num_samples=20_000)
        >>> bool(((estimate.mean - 4 * torch.eye(2)).abs() < 4 * estimate.standard_error).all())
        True
    """
    check_coupling(coupling)
    if num_samples < 2:
        raise UsageError(f"A standard error needs at least 2 samples, not {num_samples}.")
    rows_o, rows_u = _rows(features), _rows(features if other is None else other)
    dim = rows_o.shape[1]
    if rows_u.shape[1] != dim:
        raise UsageError(f"Both sides need the same number of parameters, not {dim} and {rows_u.shape[1]}.")
    distribution = Distribution.parse(distribution)
    if zeta_distribution is not None and coupling != "independent":
        raise UsageError(
            f"A second distribution has no meaning with coupling {coupling!r}: it belongs to 'independent'."
        )
    zeta = distribution if zeta_distribution is None else Distribution.parse(zeta_distribution)
    generator = torch.Generator(rows_o.device).manual_seed(seed)
    total = rows_o.new_zeros(rows_o.shape[0], rows_u.shape[0], dtype=torch.float64)
    square = torch.zeros_like(total)
    block = max(1, BLOCK_ELEMENTS // dim)
    for start in range(0, num_samples, block):
        count = min(block, num_samples - start)
        z_SD = distribution.sample(count, dim, generator, dtype=rows_o.dtype)
        right_SN = z_SD @ rows_u.T
        if coupling == "independent":
            zeta_SD = zeta.sample(count, dim, generator, dtype=rows_o.dtype)
            left_SN, weight_S = zeta_SD @ rows_o.T, (zeta_SD * z_SD).sum(1)
        else:
            left_SN = right_SN if other is None else z_SD @ rows_o.T
            weight_S = z_SD.square().sum(1) if coupling == "shared" else z_SD.new_ones(count)
        total += (left_SN * weight_S[:, None]).T @ right_SN
        square += (left_SN * weight_S[:, None]).square().T @ right_SN.square()
    mean = total / num_samples
    variance = (square / num_samples - mean.square()).clamp_min(0) * (num_samples / (num_samples - 1))
    shape = _kernel_shape(features, features if other is None else other)
    error = (variance / num_samples).sqrt()
    return NzkEstimate(mean.to(rows_o.dtype).reshape(shape), error.to(rows_o.dtype).reshape(shape))


def nzk(
    features: Tensor,
    *,
    distribution: str | Distribution = "gaussian",
    coupling: str = "shared",
    num_samples: int = 10_000,
    seed: int = 0,
    other: Tensor | None = None,
    zeta_distribution: str | Distribution | None = None,
) -> Tensor:
    r"""Estimate the expected NZK from samples; :func:`sample_nzk` adds standard errors.

    :func:`zokernel.theory.expected_nzk` gives the same kernel exactly, without sampling, for features (n, d) and
    distributions whose moments exist: ``shared`` needs the fourth, which ``student_t(3)`` lacks.  The default is the
    setting of the paper: one shared Gaussian vector.

    Args:
        features: Features of the evaluated points, (n, d); or (n, V, d) for models with V outputs.
        distribution: Distribution of the vectors, as for :func:`sample_nzk`.
        coupling: ``shared``, ``independent`` or ``zo_sgd``.
        num_samples: Number of sampled vectors (pairs of vectors for ``independent``).
        seed: Seed of the draws.
        other: Features of the training points; the same points when not given.
        zeta_distribution: Distribution of the second vector (``independent`` only); that of z when not given.

    Returns:
        The kernel, (n, m), or (n, V, m, V) for features of several outputs.

    Raises:
        UsageError: If shapes do not match, the features are not finite, or a name is unknown.

    Example:
        >>> nzk(torch.eye(2), distribution="rademacher", num_samples=100).diagonal().tolist()  # |z|^2 = 2, z_i^2 = 1
        [2.0, 2.0]
    """
    return sample_nzk(
        features,
        distribution=distribution,
        coupling=coupling,
        num_samples=num_samples,
        seed=seed,
        other=other,
        zeta_distribution=zeta_distribution,
    ).mean


def _rows(features: Tensor) -> Tensor:
    if features.ndim not in (2, 3):
        raise UsageError(f"Features must have shape (n, d), or (n, V, d), not {tuple(features.shape)}.")
    if not features.is_floating_point():
        raise UsageError(f"Features must be floating point, not {features.dtype}.")
    if not features.isfinite().all():
        raise UsageError("Features must be finite: check them for NaN and infinity.")
    return features.detach().reshape(-1, features.shape[-1])


def _kernel_shape(features: Tensor, other: Tensor) -> tuple[int, ...]:
    return (*features.shape[:-1], *other.shape[:-1])
