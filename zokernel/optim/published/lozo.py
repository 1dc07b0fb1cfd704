r"""LOZO and LOZO-M: low-rank directions, and momentum kept in their factors.

With :math:`z = U V^T/\sqrt r`, V fixed for ``refresh`` steps, the estimate of every matrix is :math:`G V^T` with
:math:`G = \sum_p c_p U_p/\sqrt r` (m x r), so its moving average is an m x r matrix too.  When V changes, the
average is carried over by :math:`V_{old}^T V_{new}/n`.
"""

from __future__ import annotations

import functools
import math

from torch import Tensor

from zokernel.directions import LowRank
from zokernel.directions.terms import Factors
from zokernel.estimators.base import Estimate
from zokernel.estimators.two_point import TwoPoint
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer


@register("lozo")
class LOZO(ZerothOrderOptimizer):
    r"""MeZO on low-rank directions :math:`z = U V^T/\sqrt r`.

    The published code has no :math:`1/\sqrt r`: its ``eps`` and ``lr`` correspond to :math:`\epsilon\sqrt r` and
    :math:`\eta r` here, for matrices (methods 2.5).  The scale here makes both mean the same as for MeZO.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        rank: r.
        refresh: Steps for which V stays.
        most_square: Refold thin matrices, such as adapters, into the most square ones.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs two forward passes.
        distribution: Law of the factors, and of the directions of vectors: ``gaussian``, ``rademacher`` or ``uniform``.
        seed: Seed of all directions of the run; V is drawn from it too, so a resumed run finds it again.
        weight_decay: Decoupled weight decay.
        momentum: :math:`\beta` of the average :math:`M \leftarrow \beta M + (1-\beta) G`; zero is LOZO, more LOZO-M.
            Matrices need m r more numbers each.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(6, 5))
        >>> optimizer = LOZO([weight], lr=0.005, rank=2, refresh=10)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(600)]
        >>> losses[-1] < 0.3 < losses[0]
        True
    """

    directions: LowRank

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        rank: int = 2,
        refresh: int = 50,
        most_square: bool = False,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        distribution: str = "gaussian",
        seed: int = 0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        restore: str = "fold",
    ):
        super().__init__(
            params,
            estimator=TwoPoint(eps, num_perturbations),
            directions=LowRank(distribution, rank=rank, refresh=refresh, most_square=most_square),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            seed=seed,
            restore=restore,
        )

    def effective_lr(self) -> float:
        """Return the learning rate: the momentum is an average, so it does not lengthen the mean step."""
        return self.param_groups[0]["lr"]

    def update(self, estimate: Estimate) -> None:
        """Step along the estimate, or along its average kept in factors."""
        if self.is_replayable:
            super().update(estimate)
            return
        self.move([{} for _ in self.param_groups])
        for group, names in self.groups():
            for name in names:
                weight = self.named_params[name]
                if weight.ndim < 2:
                    average = self._average_vector(name, estimate, group["momentum"])
                    self.add_values({name: average}, -group["lr"])
                else:
                    average = self._average_factor(name, estimate, group["momentum"])
                    self.add_terms({name: Factors(average, self._right(name, self.step_count))}, -group["lr"])

    def _right(self, name: str, step: int) -> Tensor:
        weight = self.named_params[name]
        return self.directions.right(name, weight.shape, seed=self.seed, step=step, device=weight.device)

    def _average_vector(self, name: str, estimate: Estimate, beta: float) -> Tensor:
        return self._average(name, self.dense_estimate([name], estimate)[name], beta)

    def _average_factor(self, name: str, estimate: Estimate, beta: float) -> Tensor:
        weight = self.named_params[name]
        rank = self.directions.shape(weight.shape)[2]
        fresh: Tensor | None = None
        for index, coefficient in estimate.coefficients.items():
            left = self.directions.left(
                name, weight.shape, seed=self.seed, step=self.step_count, index=index, device=weight.device
            )
            term = left * (coefficient / math.sqrt(rank))
            fresh = term if fresh is None else fresh.add_(term)
        assert fresh is not None
        state = self.state[weight]
        if "average" in state and self.step_count % self.directions.refresh == 0:
            old, new = self._right(name, self.step_count - 1), self._right(name, self.step_count)
            state["average"] = state["average"] @ (old @ new.T) / new.shape[1]
        return self._average(name, fresh, beta)

    def _average(self, name: str, fresh: Tensor, beta: float) -> Tensor:
        """Advance and return the moving average, which starts at the first estimate."""
        state = self.state[self.named_params[name]]
        state["average"] = state["average"].lerp_(fresh, 1 - beta) if "average" in state else fresh
        return state["average"]


@register("lozo_m")
class LOZOM(LOZO):
    """LOZO with momentum 0.9; see :class:`LOZO`."""

    __init__ = functools.partialmethod(LOZO.__init__, momentum=0.9)
