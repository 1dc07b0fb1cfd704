r"""SubZero+: many one-sided differences in SubZero's subspaces, and Adam on the small matrices that they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from zokernel.directions import Subspace
from zokernel.directions.terms import Factors
from zokernel.estimators import Estimate, OneSided
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.trained import Trained
from zokernel.optim.updates.adam import Adam
from zokernel.optim.updates.base import Step
from zokernel.optim.zeroth_order import ZerothOrder


class SubspaceAdam(Adam):
    r"""Adam on the estimates of matrices in their subspaces, r x r; vectors as :class:`Adam`.

    The coordinates mean something else once U and V are redrawn, so the moments of a matrix start from zero then.

    Args:
        directions: Directions whose matrices move in random row and column spaces.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        delta: Added to the root of the second moment.
    """

    def __init__(self, directions: Subspace, beta1: float, beta2: float, delta: float):
        super().__init__(beta1, beta2, delta)
        self.directions = directions

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, dict[str, float]]:
        """Return the steps of matrices as factors, and of vectors as tensors."""
        small = [n for n in names if trained.named_params[n].ndim < 2 or not trained.named_params[n].numel()]
        result: dict[str, Tensor | Factors] = {}
        divisors: dict[str, float] = {}
        if small:
            vectors, divisors = super().step(trained, small, estimate)
            result |= vectors
        for name in names:
            if name not in result:
                result[name], divisors[name] = self._matrix(trained, name, estimate), 1.0
        return result, divisors

    def _matrix(self, trained: Trained, name: str, estimate: Estimate) -> Factors:
        weight, seed, step = trained.named_params[name], trained.seed, trained.step_count
        rows, columns, rank = self.directions.shape(weight.shape)
        epoch, device = step // self.directions.refresh, weight.device
        core = self.directions.combine(name, weight.shape, estimate.scaled, seed=seed, step=step, device=device)
        state = trained.state[weight]
        if state.get("epoch") != epoch:
            state |= {
                "epoch": epoch,
                "steps": 0,
                "exp_avg": torch.zeros_like(core),
                "exp_avg_sq": torch.zeros_like(core),
            }
        state["steps"] += 1
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first_bias = self.advance(core, first, second, second, steps=state["steps"])  # core is their ratio now
        left = self.directions.basis(name, "left", rows, rank, seed, epoch, device)
        right = self.directions.basis(name, "right", columns, rank, seed, epoch, device)
        scale = math.sqrt(rows * columns) / rank
        return Factors((left.double() @ (core / first_bias)).float(), right.T.contiguous(), scale)


@register("subzero_plus")
class SubZeroPlus(ZerothOrder):
    r"""Adam in SubZero's subspaces, on the average of many one-sided differences.

    Every m x n matrix W has U (m x r) and V (n x r) with orthonormal columns, redrawn every ``refresh`` steps.  With
    :math:`Z_k` (r x r) Gaussian,

    .. math:: \bar Z = \frac{1}{K} \sum_{k=1}^K \frac{L(W + \epsilon s\, U Z_k V^T) - L(W)}{\epsilon}\, Z_k, \qquad
        W \leftarrow W - \eta s\, U\, \mathrm{Adam}(\bar Z)\, V^T, \qquad s = \frac{\sqrt{mn}}{r}

    With the scale s, that of :class:`~zokernel.optim.SubZero`, ``eps`` means the same as for MeZO, and ``lr`` is about
    how far each weight moves in a step, as for :class:`~zokernel.optim.ZOAdam`.  In the published formula s is one: its
    learning rate corresponds to :math:`\eta s`.  Vectors and scalars take Adam's step on their own estimates.  The
    moments of a matrix are two r x r matrices, and start from zero when U and V are redrawn.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate: about how far each weight moves in a step.
        rank: r, the dimension of the row and column spaces.
        refresh: Steps for which U and V stay.
        most_square: Refold thin matrices, such as adapters, into the most square ones.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        delta: Added to the root of the second moment (Adam's own epsilon).
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: K, directions per step; each costs one forward pass, and one more is shared by all.
        distribution: Distribution of Z, and of the directions of vectors: ``gaussian``, ``rademacher`` or ``uniform``.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.  Bases are drawn from the seed too, so a
            resumed run has the same ones.

    Raises:
        UsageError: If a setting is out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(6, 5))
        >>> optimizer = SubZeroPlus([weight], lr=0.05, rank=2, refresh=10, num_perturbations=8)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 0.1 * losses[0]
        True

    References:
        Yu et al. (2024), Zeroth-Order Fine-Tuning of LLMs in Random Subspaces, arXiv:2410.08989, for the subspaces;
        Kingma and Ba (2015), arXiv:1412.6980.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-5,
        *,
        rank: int = 8,
        refresh: int = 100,
        most_square: bool = False,
        beta1: float = 0.9,
        beta2: float = 0.95,
        delta: float = 1e-8,
        eps: float = 1e-3,
        num_perturbations: int = 99,
        distribution: str = "gaussian",
        **options: Unpack[ZerothOrderOptions],
    ):
        directions = Subspace(rank, distribution=distribution, refresh=refresh, most_square=most_square)
        super().__init__(
            params,
            lr,
            directions=directions,
            estimator=OneSided(eps, num_perturbations),
            update=SubspaceAdam(directions, beta1, beta2, delta),
            **options,
        )
