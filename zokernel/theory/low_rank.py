r"""Second moments of directions of low rank: what structure costs where full directions would be too large.

Each matrix (m, n) of the model has the direction :math:`Z = L R^T / \sqrt r` with standard Gaussian L (m, r) and
R (n, r), as in EGGROLL (2025), arXiv:2511.16652.  Its coordinates are uncorrelated but not independent.
(docs/theory.md, "E.2 The length of the step".)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.theory.checks import check_count


def low_rank_excess(shapes: Sequence[tuple[int, int]], rank: int, shares: Sequence[float] | None = None) -> float:
    r"""Return what low rank adds to the :math:`d + 2` of full Gaussian directions in :math:`E (z^T g)^2 \|z\|^2`.

    Each matrix has its own :math:`Z_l = L_l R_l^T / \sqrt r` with Gaussian L and R: the excess is
    :math:`\frac2r \sum_l (m_l + n_l + 1)\, \|G_l\|^2 / \|g\|^2`, small beside :math:`d = \sum_l m_l n_l`.

    Args:
        shapes: Shape :math:`(m_l, n_l)` of every matrix.
        rank: Rank r.
        shares: Share of :math:`\|g\|^2` in each matrix; its share of the parameters when not given.

    Returns:
        The excess.

    Raises:
        UsageError: If there is no matrix, a share for some of them only, or the rank is no positive whole number.

    Example:
        >>> low_rank_excess([(40, 40)], rank=1)
        162.0
    """
    sizes = [rows * columns for rows, columns in shapes]
    weights = [size / sum(sizes) for size in sizes] if shares is None else list(shares)
    check_count(rank, "rank")
    if not sizes or len(weights) != len(sizes):
        raise UsageError("The excess of low rank needs matrices, and a share for each of them.")
    return 2 / rank * sum((rows + columns + 1) * share for (rows, columns), share in zip(shapes, weights, strict=True))


def low_rank_outer_product(gradient_MN: Tensor, rank: int) -> Tensor:
    r"""Return :math:`E\, s^2\, vec(Z) vec(Z)^T` of one example and one direction :math:`Z = L R^T / \sqrt r`.

    .. math:: \|G\|^2 I + 2 g g^T + \frac2r \left[ I_m \otimes G^T G + G G^T \otimes I_n + T \right],
              \qquad T_{ef,gh} = G_{eh} G_{gf}

    with :math:`s = \langle G, Z \rangle` and Gaussian L (m, r), R (n, r).  Its trace is
    :math:`\|G\|^2 (d + 2 + \frac2r (m + n + 1))`.

    Args:
        gradient_MN: Gradient G of one matrix, (m, n).
        rank: Rank r.

    Returns:
        The second moment, (m n, m n), rows of Z one after the other, float64.

    Raises:
        UsageError: If the rank is no positive whole number.

    Example:
        >>> float(low_rank_outer_product(torch.ones(1, 1), rank=1))  # E[(l r)^4] = 9
        9.0
    """
    check_count(rank, "rank")
    grad = gradient_MN.double()
    rows, columns = grad.shape
    flat = grad.flatten()
    eye_M, eye_N = torch.eye(rows, dtype=torch.float64), torch.eye(columns, dtype=torch.float64)
    full = flat.square().sum() * torch.eye(len(flat), dtype=torch.float64) + 2 * torch.outer(flat, flat)
    twist = torch.einsum("eh,gf->efgh", grad, grad).reshape(len(flat), len(flat))
    return full + 2 / rank * (torch.kron(eye_M, grad.T @ grad) + torch.kron(grad @ grad.T, eye_N) + twist)
