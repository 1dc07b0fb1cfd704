r"""ZO-Muon: the estimate of a matrix in a random column space, with its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from zokernel.directions import Subspace
from zokernel.directions.terms import Factors
from zokernel.errors import UsageError
from zokernel.estimators import Estimate, OneSided
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.trained import Trained
from zokernel.optim.updates.base import Rule, Step
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.values import is_number, plain_number

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    r"""Bring the singular values of a matrix near one and keep its singular vectors.

    .. math:: X_0 = G / \|G\|_F, \qquad X_{k+1} = a X_k + b X_k X_k^T X_k + c X_k X_k^T X_k X_k^T X_k

    with (a, b, c) = (3.4445, -4.7750, 2.0315).  After five steps, singular values above 0.002 of the norm lie between
    0.68 and 1.21; those that are zero stay zero.

    Args:
        matrix: G, (m, n), of any floating-point dtype.
        steps: How often the polynomial is applied.

    Returns:
        (m, n) of the same dtype; zeros if G is zero.

    Example:
        >>> torch.linalg.svdvals(newton_schulz(torch.diag(torch.tensor([3.0, 1.0, 0.1])))).round(decimals=2)
        tensor([1.1300, 1.1300, 0.7500])

    References:
        Jordan et al. (2024), Muon: An optimizer for hidden layers in neural networks.
    """
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(matrix)
    x = matrix / torch.where(norm > 0, norm, 1.0)
    is_wide = x.shape[0] <= x.shape[1]
    x = x if is_wide else x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if is_wide else x.mT


class Orthogonalized(Rule):
    r"""Move matrices by :math:`P\,NS_5(G)`, with G the estimate in the column space of P, and vectors as SGD does.

    Args:
        directions: Directions whose matrices move in a random column space.
        vector_scale: Learning rate of vectors and scalars, relative to that of matrices.

    Raises:
        UsageError: If ``vector_scale`` is negative or not finite.
    """

    def __init__(self, directions: Subspace, vector_scale: float):
        vector_scale = plain_number("vector_scale", vector_scale)
        if not (is_number(vector_scale) and vector_scale >= 0):
            raise UsageError(f"vector_scale must be at least 0 and finite, not {vector_scale!r}.")
        self.directions, self.vector_scale = directions, vector_scale

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, float]:
        """Return the steps of matrices as factors, and of vectors as tensors."""
        result: dict[str, Tensor | Factors] = {}
        for name in names:
            weight = trained.named_params[name]
            if weight.ndim < 2 or not weight.numel():
                result[name] = trained.dense_estimate([name], estimate)[name].mul_(self.vector_scale)
                continue
            rows, _, rank = self.directions.shape(weight.shape)
            seed, step, device = trained.seed, trained.step_count, weight.device
            basis = self.directions.basis(name, "left", rows, rank, seed, step // self.directions.refresh, device)
            core = self.directions.combine(name, weight.shape, estimate.scaled, seed=seed, step=step, device=device)
            result[name] = Factors(basis, newton_schulz(core).float().contiguous())
        return result, 1.0


@register("zo_muon")
class ZOMuon(ZerothOrder):
    r"""Zeroth-order Muon in random column spaces.

    For every m x n matrix W, with the columns of P (m x r) orthonormal, and P redrawn every ``refresh`` steps,

    .. math:: G = \frac{1}{N} \sum_{i=1}^N \frac{L(W + \mu P \Psi_i) - L(W)}{\mu}\, \Psi_i, \qquad
        W \leftarrow W - \eta\, P\, NS_5(G)

    with :math:`\Psi_i` (r x n) Gaussian and :math:`NS_5` five Newton-Schulz steps, which bring the singular values of G
    near one.  So the learning rate is about the largest singular value of a step, whatever the scale of the loss.
    Perturbations are scaled by :math:`\sqrt{m/r}`, so that ``eps`` means the same as for
    MeZO: :math:`\mu = \epsilon \sqrt{m/r}`.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate of matrices.
        rank: r, the dimension of the column spaces; of matrices with fewer rows, their rows.
        refresh: Steps for which P stays.
        vector_scale: Learning rate of vectors and scalars relative to ``lr``; they take plain steps along the estimate.
            The published code moves them at a fixed 1e-7.
        most_square: Refold thin matrices, such as adapters, into the most square ones.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: N, directions per step; each costs one forward pass, and one more is shared by all.
        distribution: Distribution of :math:`\Psi`, and of the directions of vectors: ``gaussian``, ``rademacher`` or
            ``uniform``.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.  Bases are drawn from the seed too, so a
            resumed run has the same ones.

    Raises:
        UsageError: If a setting is out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(6, 5))
        >>> optimizer = ZOMuon([weight], lr=0.1, rank=4, refresh=10)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 0.5 < losses[0]
        True

    References:
        Lang et al. (2026), Powering Up Zeroth-Order Training via Subspace Gradient Orthogonalization, arXiv:2602.17155.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        *,
        rank: int = 64,
        refresh: int = 100,
        vector_scale: float = 1e-5,
        most_square: bool = False,
        eps: float = 1e-3,
        num_perturbations: int = 4,
        distribution: str = "gaussian",
        **options: Unpack[ZerothOrderOptions],
    ):
        directions = Subspace(rank, distribution=distribution, refresh=refresh, most_square=most_square, sides="left")
        super().__init__(
            params,
            lr,
            directions=directions,
            estimator=OneSided(eps, num_perturbations),
            update=Orthogonalized(directions, vector_scale),
            **options,
        )
