r"""LOZO and LOZO-M: low-rank directions, and momentum kept in their factors.

With :math:`z = U V^T/\sqrt r`, V fixed for ``refresh`` steps, the estimate of every matrix is :math:`G V^T` with
:math:`G = \sum_p c_p U_p/\sqrt r` (m x r), so its moving average is an m x r matrix too.  When V changes, the
average is carried over by :math:`V_{old}^T V_{new}/n`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from torch import Tensor

from zokernel.directions import LowRank
from zokernel.directions.terms import Factors
from zokernel.errors import UsageError
from zokernel.estimators import Estimate, TwoPoint
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.trained import Trained
from zokernel.optim.updates.base import Step
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder


class FactoredMomentum(SGD):
    r"""The moving average :math:`M \leftarrow \beta M + (1-\beta) G` of the estimate's left factors.

    Args:
        directions: The low-rank directions, whose right factors are shared by the steps of an epoch.
        momentum: :math:`\beta`; zero is a plain step.

    Raises:
        UsageError: If the right factors are new in every direction, or the momentum is out of range.
    """

    def __init__(self, directions: LowRank, momentum: float):
        super().__init__(momentum)
        if directions.refresh < 1:
            raise UsageError("LOZO keeps V for some steps: refresh must be a whole number of at least 1, not 0.")
        self.directions = directions

    def effective_lr(self, group: Mapping[str, Any], gain: float) -> float:
        """Return the learning rate: the momentum is an average, so it does not lengthen the mean step."""
        return group["lr"] * gain

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, float]:
        """Return the average of vectors, and of matrices as factors."""
        momenta = {name: group["momentum"] for group, members in trained.groups() for name in members}
        result: dict[str, Tensor | Factors] = {}
        for name in names:
            if trained.named_params[name].ndim < 2 or not trained.named_params[name].numel():
                fresh = trained.dense_estimate([name], estimate)[name]
                result[name] = _average(trained, name, fresh, momenta[name])
            else:
                average = self._average_factor(trained, name, estimate, momenta[name])
                result[name] = Factors(average, self._right(trained, name, trained.step_count))
        return result, 1.0

    def _right(self, trained: Trained, name: str, step: int) -> Tensor:
        weight = trained.named_params[name]
        return self.directions.right(name, weight.shape, seed=trained.seed, step=step, device=weight.device)

    def _average_factor(self, trained: Trained, name: str, estimate: Estimate, beta: float) -> Tensor:
        weight, step = trained.named_params[name], trained.step_count
        rank = self.directions.shape(weight.shape)[2]
        fresh: Tensor | None = None
        for index, coefficient in estimate.scaled.items():
            left = self.directions.left(
                name, weight.shape, seed=trained.seed, step=step, index=index, device=weight.device
            )
            term = left * (coefficient / math.sqrt(rank))
            fresh = term if fresh is None else fresh.add_(term)
        assert fresh is not None
        state = trained.state[weight]
        last, refresh = state.get("average_step", step - 1), self.directions.refresh  # it may have rested since
        if "average" in state and step // refresh != last // refresh:
            old, new = self._right(trained, name, last), self._right(trained, name, step)
            state["average"] = state["average"] @ (old @ new.T) / new.shape[1]
        state["average_step"] = step
        return _average(trained, name, fresh, beta)


def _average(trained: Trained, name: str, fresh: Tensor, beta: float) -> Tensor:
    """Advance and return the moving average, which starts at the first estimate."""
    state = trained.state[trained.named_params[name]]
    state["average"] = state["average"].lerp_(fresh, 1 - beta) if "average" in state else fresh
    return state["average"]


@register("lozo")
class LOZO(ZerothOrder):
    r"""MeZO on low-rank directions :math:`z = U V^T/\sqrt r`.

    The published code has no :math:`1/\sqrt r`: its ``eps`` and ``lr`` correspond to :math:`\epsilon\sqrt r` and
    :math:`\eta r` here, for matrices.  The scale here makes both mean the same as for MeZO.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        rank: r.
        refresh: Steps for which V stays, at least 1.
        most_square: Refold thin matrices, such as adapters, into the most square ones.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step; each costs two forward passes.
        distribution: Distribution of the factors, and of the directions of vectors: ``gaussian``, ``rademacher`` or
            ``uniform``.
        momentum: :math:`\beta` of the average :math:`M \leftarrow \beta M + (1-\beta) G`; zero is LOZO, more LOZO-M.
            Matrices need m r more numbers each.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.  V is drawn from the seed too, so a resumed
            run has the same one.

    Raises:
        UsageError: If a setting is out of range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(6, 5))
        >>> optimizer = LOZO([weight], lr=0.005, rank=2, refresh=10)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(600)]
        >>> losses[-1] < 0.3 < losses[0]
        True

    References:
        Chen et al. (2024), Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures,
        arXiv:2410.07698.
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
        momentum: float = 0.0,
        **options: Unpack[ZerothOrderOptions],
    ):
        directions = LowRank(distribution=distribution, rank=rank, refresh=refresh, most_square=most_square)
        super().__init__(
            params,
            lr,
            directions=directions,
            estimator=TwoPoint(eps, num_perturbations),
            update=FactoredMomentum(directions, momentum),
            **options,
        )


@register("lozo_m")
class LOZOM(LOZO):
    """LOZO with momentum 0.9; see :class:`LOZO`."""

    __init__ = functools.partialmethod(LOZO.__init__, momentum=0.9)
