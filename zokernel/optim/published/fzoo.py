"""FZOO: batched one-sided differences, normalised by the spread of the losses."""

from __future__ import annotations

from zokernel.directions import Dense
from zokernel.estimators.one_sided import OneSided
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import ZerothOrderOptimizer


@register("fzoo")
class FZOO(ZerothOrderOptimizer):
    r"""Normalised zeroth-order SGD from one-sided differences.

    .. math:: \theta \leftarrow \theta - \eta \sum_{p=1}^P \frac{L(\theta + \epsilon z_p) - L(\theta)}{P\,\sigma}\, z_p

    with :math:`\sigma` the standard deviation of the P perturbed losses.  Since
    :math:`\sigma \approx \epsilon \|\nabla L\|`, this is normalised gradient descent and the learning rate is a
    distance.  When all losses are equal, the weights stay.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs one forward pass, and one more is shared by all.
        distribution: Law of the directions; the method uses ``rademacher``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = FZOO([weight], lr=0.02)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-2 < losses[0]
        True
    """

    estimator: OneSided

    def __init__(
        self,
        params: Params,
        lr: float = 5e-5,
        *,
        eps: float = 1e-4,
        num_perturbations: int = 8,
        distribution: str = "rademacher",
        seed: int = 0,
        weight_decay: float = 0.0,
        restore: str = "fold",
    ):
        super().__init__(
            params,
            estimator=OneSided(eps, num_perturbations, normalize=True),
            directions=Dense(distribution),
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            restore=restore,
        )

    def effective_lr(self) -> float:
        r"""Return :math:`\eta\,\epsilon/\sigma` of the last step: MeZO moves as far on average at this learning rate.

        It changes with the gradient's length; NaN before the first step.
        """
        if self.last_estimate is None:
            return float("nan")
        return self.param_groups[0]["lr"] * self.estimator.measured_gain(self.last_estimate)
