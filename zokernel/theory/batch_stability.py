r"""Mean-square stability under mini-batches, with shared directions and with one per example.

A linear(ised) model with N examples, kernel :math:`K = X X^T`, residual :math:`e = f - y` and loss
:math:`\frac{1}{2N} \|e\|^2` takes a step on a random batch of B examples.  With :math:`C = E e e^T`, s of
:func:`~zokernel.theory.per_example.sampling_share`, and the moments of one direction,

.. math:: C^+ &= C - \tfrac{\eta}{N} (K C + C K) + \eta^2\, X\, E[\hat g \hat g^T]\, X^T

and :math:`E \hat g \hat g^T` is that of :mod:`zokernel.theory.per_example` with the weights

.. math:: E \bar g \bar g^T = X^T \Big[ \tfrac{1 - s}{N^2} C + \tfrac{s}{N} diag(C) \Big] X, \qquad
          B^{-2} E \sum_i g_i g_i^T = \tfrac{1}{B N} X^T diag(C)\, X .

(docs/theory.md, "E.3 Training with mini-batches".)  The map is positive, so it contracts exactly when
:math:`\eta\, \rho(A^{-1} B) < 1`, with :math:`A(C) = (K C + C K)/N` and :math:`B` the factor of :math:`\eta^2`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.theory.checks import as_kernel, check_count
from zokernel.theory.per_example import example_blocks, sampling_share, step_second_moment
from zokernel.theory.stability import clean_eigenvalues, spectral_radius


def residual_noise(
    kernel: Tensor,
    state: Tensor,
    batch_size: int,
    num_perturbations: int = 1,
    scheme: str = "per_example",
    distribution: str | Distribution = "gaussian",
    *,
    replacement: bool = False,
    features: Tensor | None = None,
    outputs: int = 1,
) -> Tensor:
    r"""Return the factor of :math:`\eta^2` in the recursion of :math:`C = E e e^T` for random batches.

    Gaussian directions, one output per example:

    .. math:: \text{shared:}\quad & (1 + \tfrac1P) K W K + \tfrac1P tr(K W) K,
              \qquad W = \tfrac{1-s}{N^2} C + \tfrac{s}{N} diag(C) \\
              \text{per example:}\quad & K W K
              + \tfrac{1}{B P N} \Big[ K\, diag(C)\, K + \sum_i K_{ii} C_{ii}\, K \Big]

    Args:
        kernel: Kernel :math:`X X^T` of all N examples, (N V, N V).
        state: C, the same shape.
        batch_size: Examples B per batch.
        num_perturbations: Directions P of the batch, or of each example.
        scheme: ``shared``, ``per_example``, ``flipout`` or ``first_order``.
        distribution: Distribution of the directions.
        replacement: Whether an example can be in a batch twice; every batch is drawn anew.
        features: X, as for :func:`~zokernel.theory.per_example.kernel_product`.
        outputs: Outputs V per example.

    Returns:
        The matrix, shaped like the kernel, float64.

    Raises:
        UsageError: If an argument is out of range, or features are needed and missing.

    Example:
        >>> residual_noise(torch.eye(2), torch.eye(2), batch_size=2, scheme="shared").tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> residual_noise(torch.eye(2), torch.eye(2), batch_size=2).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    state = state.double()
    blocks = example_blocks(len(state), outputs)
    population = len(state) // outputs
    share = sampling_share(batch_size, None if replacement else population)
    local = state * blocks / population
    total = (1 - share) / population**2 * state + share * local
    return step_second_moment(
        kernel, total, local / batch_size, num_perturbations, scheme, distribution, features=features
    )


def batch_stability_limit(
    kernel: Tensor,
    batch_size: int,
    num_perturbations: int = 1,
    scheme: str = "per_example",
    distribution: str | Distribution = "gaussian",
    *,
    replacement: bool = False,
    features: Tensor | None = None,
    outputs: int = 1,
    tolerance: float = 1e-9,
    max_iterations: int = 5000,
) -> float:
    r"""Return the largest learning rate at which the expected loss of training with random batches does not grow.

    With ``shared``, the full batch and no replacement it is :func:`~zokernel.theory.stability.stability_limit`.
    Residuals outside the range of the kernel add noise of constant size and do not move the limit.

    Args:
        kernel: Kernel :math:`X X^T` of all N examples, (N V, N V); up to about a thousand rows.
        batch_size: Examples B per batch.
        num_perturbations: Directions P of the batch, or of each example.
        scheme: ``shared``, ``per_example``, ``flipout``, or ``first_order`` for mini-batch gradient descent.
        distribution: Distribution of the directions.
        replacement: Whether an example can be in a batch twice.
        features: X, as for :func:`~zokernel.theory.per_example.kernel_product`.
        outputs: Outputs V per example.
        tolerance: Relative change of the eigenvalue at which the power iteration stops.
        max_iterations: Iterations before giving up.

    Returns:
        The limit.

    Raises:
        UsageError: If the kernel is not one, an argument is out of range, or features are needed and missing.
        RunError: If the iteration has not settled.

    Example:
        >>> kernel = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> schemes = ("first_order", "shared", "per_example")
        >>> [round(batch_stability_limit(kernel, 2, scheme=scheme), 3) for scheme in schemes]
        [1.333, 0.423, 0.481]
    """
    check_count(outputs, "number of outputs")
    kernel = as_kernel(kernel).cpu()
    eigenvalues, vectors = torch.linalg.eigh(kernel)
    values = torch.as_tensor(clean_eigenvalues(eigenvalues))
    keep = values > 0
    values, vectors = values[keep], vectors[:, keep]
    pairs = (values[:, None] + values) / (len(kernel) // outputs)

    def advance(state: Tensor) -> Tensor:
        noise = residual_noise(
            kernel,
            vectors @ state @ vectors.T,
            batch_size,
            num_perturbations,
            scheme,
            distribution,
            replacement=replacement,
            features=features,
            outputs=outputs,
        )
        return vectors.T @ noise @ vectors / pairs

    state = torch.eye(len(values), dtype=torch.float64)
    return 1.0 / spectral_radius(advance, state, tolerance, max_iterations)
