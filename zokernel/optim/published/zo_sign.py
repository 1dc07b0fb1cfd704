"""ZO-signSGD: every weight moves by the learning rate, in the direction of the estimate's sign."""

from __future__ import annotations

import math

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.estimators.two_point import TwoPoint
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer


@register("zo_sign")
class ZOSign(ZerothOrderOptimizer):
    r"""Sign descent on a two-point estimate.

    .. math:: \theta \leftarrow \theta - \eta\, \mathrm{sign}(\hat g) \qquad\text{or}\qquad
        \theta \leftarrow \theta - \frac{\eta}{P} \sum_p \mathrm{sign}(c_p)\, z_p

    The first is ZO-signSGD; the second, which benchmarks of language models run under that name, keeps the update a few
    scalars.  They are the same for one Rademacher direction.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate: how far each weight moves.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs two forward passes.
        sign_of: ``estimate`` or ``projection``.
        distribution: Law of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ZOSign([weight], lr=0.02)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(300)]
        >>> losses[-1] < 1e-2 < losses[0]
        True
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        sign_of: str = "estimate",
        distribution: str = "rademacher",
        seed: int = 0,
        weight_decay: float = 0.0,
        restore: str = "fold",
    ):
        if sign_of not in ("estimate", "projection"):
            raise UsageError(f"There is no sign_of {sign_of!r}: choose estimate or projection.")
        self.of_projections = sign_of == "projection" or (num_perturbations == 1 and distribution == "rademacher")
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
        """Whether the update is a few signs times directions."""
        return self.of_projections

    def effective_lr(self) -> float:
        """Return the learning rate; sign descent normalises the gradient, so it does not compare with SGD's."""
        return self.param_groups[0]["lr"]

    def update(self, estimate: Estimate) -> None:
        """Move every weight by the learning rate."""
        if self.of_projections:
            signs = {
                i: math.copysign(1.0, c) / len(estimate.coefficients) if c else 0.0
                for i, c in estimate.coefficients.items()
            }
            self.move([{i: -group["lr"] * s for i, s in signs.items()} for group in self.param_groups])
            return
        self.move([{} for _ in self.param_groups])
        rates = {name: -group["lr"] for group, names in self.groups() for name in names}
        for batch in self.batches(list(rates)):
            gradients = self.dense_estimate(batch, estimate)
            self.add_values({name: gradient.sign_() for name, gradient in gradients.items()}, rates)
