r"""Adam on a zeroth-order estimate: ZO-Adam (MeZO-Adam) and ZO-AdaMM (AMSGrad).

.. math:: m \leftarrow \beta_1 m + (1-\beta_1)\hat g,\quad v \leftarrow \beta_2 v + (1-\beta_2)\hat g^2,\quad
    \theta \leftarrow \theta - \eta\, \frac{m/(1-\beta_1^t)}{\sqrt{\bar v/(1-\beta_2^t)} + \delta}

with :math:`\bar v = v` (Adam) or its running maximum (AdaMM).  Moments are kept in fp32: two copies of the parameters,
three for AdaMM.
"""

from __future__ import annotations

import torch

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.estimators.two_point import TwoPoint
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer


@register("zo_adam")
class ZOAdam(ZerothOrderOptimizer):
    """Adam on the average of two-point estimates.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs two forward passes.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        delta: Added to the root of the second moment (Adam's own epsilon).
        distribution: Law of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay.
        restore: ``fold`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ZOAdam([weight], lr=0.05)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(300)]
        >>> losses[-1] < 1e-2 < losses[0]
        True
    """

    memory_copies = 2.0

    keeps_maximum = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-5,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        beta1: float = 0.9,
        beta2: float = 0.999,
        delta: float = 1e-8,
        distribution: str = "rademacher",
        seed: int = 0,
        weight_decay: float = 0.0,
        restore: str = "fold",
    ):
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and delta > 0):
            raise UsageError(f"beta1 and beta2 must be in [0, 1) and delta positive, not {beta1}, {beta2}, {delta}.")
        self.beta1, self.beta2, self.delta = beta1, beta2, delta
        super().__init__(
            params,
            estimator=TwoPoint(eps, num_perturbations),
            directions=Dense(distribution),
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            restore=restore,
        )

    @property
    def is_replayable(self) -> bool:
        """Never: the update is divided coordinate by coordinate."""
        return False

    def effective_lr(self) -> float:
        """Return the learning rate; Adam normalises the gradient, so it does not compare with SGD's."""
        return self.param_groups[0]["lr"]

    def update(self, estimate: Estimate) -> None:
        """Advance both moments and step."""
        self.move([{} for _ in self.param_groups])
        rates = {name: -group["lr"] for group, names in self.groups() for name in names}
        first_bias, second_bias = 1 - self.beta1 ** (self.step_count + 1), 1 - self.beta2 ** (self.step_count + 1)
        for batch in self.batches(list(rates)):
            gradients = self.dense_estimate(batch, estimate)
            firsts, seconds = self.buffers("exp_avg", batch), self.buffers("exp_avg_sq", batch)
            maxima = self.buffers("max_exp_avg_sq", batch) if self.keeps_maximum else seconds
            for name, gradient in gradients.items():
                firsts[name].lerp_(gradient.to(firsts[name].dtype), 1 - self.beta1)
                seconds[name].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
                if self.keeps_maximum:
                    torch.maximum(maxima[name], seconds[name], out=maxima[name])
                root = torch.div(maxima[name], second_bias, out=gradient).sqrt_().add_(self.delta)
                torch.div(firsts[name], root, out=gradient)
            self.add_values(gradients, {name: rate / first_bias for name, rate in rates.items()})


@register("zo_adamm")
class ZOAdaMM(ZOAdam):
    """ZO-AdaMM: the same with the running maximum of the second moment, as AMSGrad; one more copy of the parameters."""

    memory_copies = 3.0

    keeps_maximum = True
