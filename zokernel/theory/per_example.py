r"""Zeroth-order steps with one direction per example: the second moment of the step, beside that of a shared direction.

Example i of a batch of B has its own P directions and :math:`s_{ip}`, the slope of its own loss along each of them:

.. math:: \hat g = \frac1B \sum_i \frac1P \sum_p s_{ip} z_{ip}, \qquad s_{ip} = z_{ip}^T g_i .

The expectation is the batch's gradient :math:`\bar g`, as with shared directions, so the expected kernel is the same.
The spread is not.  With ``outer``, ``trace`` and ``diagonal`` of
:class:`~zokernel.theory.nzk_moments.ProcessMoments` (Gaussian 2, 1, 0; Rademacher 2, 1, -2),

.. math:: E\, \hat g \hat g^T = \bar g \bar g^T + \tfrac1P \big[ (outer - 1) A + trace \cdot tr(A) I
          + diagonal \cdot diag(A) \big],

where :math:`A = \bar g \bar g^T` with shared directions and :math:`A = B^{-2} \sum_i g_i g_i^T` with one per example
(docs/theory.md, "E.1 The step").  One direction per example is the estimator of GRZO (2026), arXiv:2606.02857.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zokernel.distributions import Distribution, direction_distribution
from zokernel.errors import UsageError
from zokernel.theory.checks import check_count, check_noise_ratio, check_num_perturbations
from zokernel.theory.nzk_moments import ProcessMoments, process_moments

SCHEMES = ("first_order", "shared", "per_example", "flipout")


def sampling_share(batch_size: int, population: int | None = None) -> float:
    r"""Return the share s of the examples' noise that the gradient of a random batch keeps.

    .. math:: E\, \bar g \bar g^T = g g^T + s\, \Sigma, \qquad s = \frac1B \ \text{or}\ \frac{N - B}{B (N - 1)}

    with :math:`\Sigma` the covariance of the N examples' gradients (divided by N).

    Args:
        batch_size: Examples B per batch.
        population: N for batches without replacement from N examples; None for batches with replacement or from a
            population without end.

    Returns:
        s, in [0, 1].

    Raises:
        UsageError: If the batch is empty or larger than the population.

    Example:
        >>> sampling_share(4), sampling_share(4, population=5), sampling_share(5, population=5)
        (0.25, 0.0625, 0.0)
    """
    check_count(batch_size, "batch size")
    if population is None:
        return 1.0 / batch_size
    if batch_size > check_count(population, "population"):
        raise UsageError(f"A batch of {batch_size} without replacement needs as many examples, not {population}.")
    return 0.0 if batch_size == population else (population - batch_size) / (batch_size * (population - 1))


def per_example_gain(noise_ratio: float, batch_size: int, population: int | None = None) -> float:
    r"""Return how many times less spread a step has with one direction per example, to leading order in d.

    .. math:: G = \frac{B (1 + s \nu)}{1 + \nu}, \qquad
              G = \frac{B + \nu}{1 + \nu} \ge 1 \ \text{with replacement}

    Without replacement G is below 1 once :math:`\nu > N - 1`, the end of a fit that interpolates.

    Args:
        noise_ratio: :math:`\nu = tr \Sigma / \|g\|^2` of the examples' gradients.
        batch_size: Examples B per batch.
        population: N for batches without replacement.

    Returns:
        G, between B (no noise) and 1.

    Raises:
        UsageError: If the noise ratio is negative or the batch is not one.

    Example:
        >>> [round(per_example_gain(5.5, size), 2) for size in (4, 16, 64)]
        [1.46, 3.31, 10.69]
    """
    check_noise_ratio(noise_ratio)
    return batch_size * (1 + sampling_share(batch_size, population) * noise_ratio) / (1 + noise_ratio)


def gradient_square(
    noise_ratio: float,
    batch_size: int,
    num_perturbations: int,
    dim: int,
    scheme: str = "per_example",
    *,
    distribution: str | Distribution = "gaussian",
    population: int | None = None,
    rank_excess: float = 0.0,
) -> float:
    r"""Return :math:`E\|\hat g\|^2 / \|g\|^2` exactly, with every lower-order term in d.

    With :math:`m = d + \kappa - 1` (the sphere: d) plus ``rank_excess``, and s of :func:`sampling_share`:

    ============== ===================================================================================
    shared         :math:`(1 + s\nu)\, (P - 1 + m) / P`
    per_example    :math:`1 + s\nu + (1 + \nu)\, (m - 1) / (B P)`
    flipout        :math:`1 + s\nu + (1 + \nu)\, (d - 1) / (B P) + (1 + s\nu)\, (\kappa - 1) / P`
    first_order    :math:`1 + s\nu`
    ============== ===================================================================================

    Args:
        noise_ratio: :math:`\nu = tr \Sigma / \|g\|^2`.
        batch_size: Examples B per batch.
        num_perturbations: Directions P of the batch, or of each example.
        dim: Number of parameters d.
        scheme: ``shared``, ``per_example``, ``flipout`` (one vector U for the batch, random signs of rows and columns
            for each example) or ``first_order``.
        distribution: Distribution of the directions, or of U.
        population: N for batches without replacement.
        rank_excess: :func:`~zokernel.theory.low_rank.low_rank_excess` of Gaussian directions of low rank.

    Returns:
        The expected squared norm, in units of that of the gradient of the whole loss.

    Raises:
        UsageError: If an argument is out of range.

    Example:
        >>> gradient_square(5.5, 16, 1, 1000, "shared"), gradient_square(5.5, 16, 1, 1000)
        (1346.4375, 408.0)
    """
    check_noise_ratio(noise_ratio)
    count = check_num_perturbations(num_perturbations)
    moments = scheme_moments(scheme, distribution, dim)
    batch = 1 + sampling_share(batch_size, population) * noise_ratio
    each = (1 + noise_ratio) / batch_size
    if rank_excess and (scheme == "flipout" or moments != process_moments("gaussian", dim)):
        raise UsageError("Directions of low rank have a closed form for Gaussian factors, shared or per example only.")
    excess = moments.outer + moments.trace * dim + moments.diagonal + rank_excess - 1
    square = batch + (batch if scheme == "shared" else each) * excess / count
    return square + batch * flipout_excess(scheme, distribution) / count


def gradient_outer_product(
    gradients_BD: Tensor,
    num_perturbations: int = 1,
    scheme: str = "per_example",
    distribution: str | Distribution = "gaussian",
) -> Tensor:
    r"""Return :math:`E\, \hat g \hat g^T` for one given batch, exactly.

    Args:
        gradients_BD: Gradients of the examples' losses, (B, d).
        num_perturbations: Directions P of the batch, or of each example.
        scheme: As for :func:`gradient_square`.
        distribution: Distribution of the directions, or of flipout's shared vector.

    Returns:
        The second moment, (d, d), float64.

    Raises:
        UsageError: If the scheme is unknown or a moment does not exist.

    Example:
        >>> gradient_outer_product(torch.eye(2), scheme="shared").tolist()
        [[1.0, 0.5], [0.5, 1.0]]
        >>> gradient_outer_product(torch.eye(2)).tolist()
        [[1.0, 0.25], [0.25, 1.0]]
    """
    gradients_BD = gradients_BD.double()
    size, dim = gradients_BD.shape
    mean_D = gradients_BD.mean(0)
    identity_DD = torch.eye(dim, dtype=torch.float64)
    local_DD = gradients_BD.T @ gradients_BD / size**2
    total_DD = torch.outer(mean_D, mean_D)
    return step_second_moment(
        identity_DD, total_DD, local_DD, num_perturbations, scheme, distribution, features=identity_DD
    )


def kernel_product(
    kernel: Tensor,
    weights: Tensor,
    num_perturbations: int = 1,
    scheme: str = "per_example",
    distribution: str | Distribution = "gaussian",
    *,
    features: Tensor | None = None,
    outputs: int = 1,
) -> Tensor:
    r"""Return :math:`E[\hat K Q \hat K^T]`, the second moment of the kernel of one step on a batch of n examples.

    Column j of :math:`\hat K_{ij} = \frac1P \sum_p (x_i^T z_{jp})(z_{jp}^T x_j)` is drawn with example j's directions.
    Every entry has mean :math:`K_{ij}` and the variance of a shared direction, but different columns are uncorrelated:
    entries of Q on the diagonal have other factors than those off it.  For Gaussian directions

    .. math:: E[\hat K Q \hat K^T] = K Q K + \frac1P \Big[ K\, diag(Q)\, K + \sum_i Q_{ii} K_{ii}\, K \Big]

    where a shared direction has :math:`Q` and :math:`tr(Q K)` in the bracket.

    Args:
        kernel: Kernel :math:`K = X X^T` of the batch, (n, n), or (n V, n V) with V outputs per example.
        weights: :math:`Q`, the same shape: for one step the outer product of the losses' derivatives.
        num_perturbations: Directions P of the batch, or of each example.
        scheme: As for :func:`gradient_square`.
        distribution: Distribution of the directions, or of flipout's shared vector.
        features: X, (n V, d); needed by distributions of independent coordinates other than the Gaussian, by flipout
            and by the sphere.
        outputs: Outputs V per example, one after the other in the rows of K; diag(Q) then means the blocks of Q.

    Returns:
        The second moment, shaped like the kernel, float64.

    Raises:
        UsageError: If features are needed and missing, or shapes do not match.

    Example:
        >>> kernel_product(torch.eye(2), torch.ones(2, 2)).tolist(), kernel_product(torch.eye(1), torch.eye(1)).tolist()
        ([[4.0, 1.0], [1.0, 4.0]], [[3.0]])
    """
    weights = weights.double()
    local = weights * example_blocks(len(weights), outputs)
    return step_second_moment(kernel, weights, local, num_perturbations, scheme, distribution, features=features)


def example_blocks(size: int, outputs: int = 1) -> Tensor:
    """Return a (size, size) matrix of ones where both rows belong to one example, zeros elsewhere.

    Raises:
        UsageError: If the rows cannot be divided into examples.
    """
    if outputs < 1 or size % outputs:
        raise UsageError(f"{size} rows cannot be divided into examples of {outputs} outputs.")
    return torch.kron(
        torch.eye(size // outputs, dtype=torch.float64), torch.ones(outputs, outputs, dtype=torch.float64)
    )


def step_second_moment(
    kernel: Tensor,
    total: Tensor,
    local: Tensor,
    num_perturbations: int,
    scheme: str,
    distribution: str | Distribution,
    *,
    features: Tensor | None = None,
) -> Tensor:
    r"""Return :math:`X\, E[\hat g \hat g^T]\, X^T` from the weights of the batch.

    Args:
        kernel: :math:`K = X X^T`.
        total: :math:`E\, w w^T` of the weights in :math:`\bar g = X^T w`.
        local: :math:`E \sum_i w_i w_i^T`, the part of it within single draws of an example.
        num_perturbations: Directions P of the batch, or of each example.
        scheme: As for :func:`gradient_square`.
        distribution: Distribution of the directions, or of flipout's shared vector.
        features: X, as for :func:`kernel_product`.

    Returns:
        The second moment, shaped like the kernel, float64.

    Raises:
        UsageError: If features are needed and missing, or shapes do not match.
    """
    count = check_num_perturbations(num_perturbations)
    kernel, total, local = kernel.double(), total.double(), local.double()
    if kernel.shape != total.shape:
        raise UsageError(f"The kernel has shape {tuple(kernel.shape)}, its weights {tuple(total.shape)}.")
    parsed = direction_distribution(distribution)
    if features is None and (scheme == "flipout" or parsed.is_sphere):
        name = f"{scheme!r} {parsed.name}"
        raise UsageError(f"The second moment of {name} directions needs the features: pass features=.")
    moments = scheme_moments(scheme, parsed, 2 if features is None else features.shape[1])
    spread = total if scheme == "shared" else local
    noise = (moments.outer - 1) * kernel @ spread @ kernel + moments.trace * (kernel * spread).sum() * kernel
    for factor, matrix in ((moments.diagonal, spread), (flipout_excess(scheme, parsed), total)):
        if factor:
            if features is None:
                raise UsageError(f"The second moment of {parsed.name} directions needs the features: pass features=.")
            x = features.double()
            noise = noise + factor * (x * torch.einsum("nk,nm,mk->k", x, matrix, x)) @ x.T
    return kernel @ total @ kernel + noise / count


def scheme_moments(scheme: str, distribution: str | Distribution, dim: int) -> ProcessMoments:
    """Return the moments of one direction of a scheme; flipout's signs make any direction a Rademacher one.

    Raises:
        UsageError: If the scheme is unknown, or flipout is to sign vectors without independent coordinates.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"There is no scheme {scheme!r}: choose one of {', '.join(SCHEMES)}.")
    if scheme == "first_order":
        return ProcessMoments.deterministic()
    if scheme == "flipout":
        if not direction_distribution(distribution).independent:
            raise UsageError("Flipout needs a vector with independent coordinates, not one on the sphere.")
        return ProcessMoments(mean=1.0, outer=2.0, trace=1.0, diagonal=-2.0)
    return process_moments(direction_distribution(distribution), dim)


def flipout_excess(scheme: str, distribution: str | Distribution) -> float:
    r"""Return :math:`\kappa - 1`, the factor of :math:`diag(\bar g \bar g^T)` that flipout's shared U adds, or 0."""
    return direction_distribution(distribution).kurtosis - 1.0 if scheme == "flipout" else 0.0
