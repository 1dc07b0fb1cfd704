"""Forward-gradient descent: exact directional derivatives by forward-mode differentiation instead of differences."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.estimators import ForwardDerivative
from zokernel.optim.options import ZerothOrderOptions, requested_perturb
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.perturb import Tangents
from zokernel.perturb.in_place import IN_PLACE


@register("forward_gradient")
class ForwardGradient(ZerothOrder):
    r"""Zeroth-order SGD in the limit :math:`\epsilon \to 0`.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P \langle \nabla L(\theta), z_p\rangle\, z_p

    Each derivative is one forward pass that carries tangents along.  It has no bias and no round-off from differences,
    but takes one copy of the parameters for the direction, and about twice the activations.  The closure must return
    the loss as a tensor, computed from the parameters by operations that have a forward derivative.  Fused attention
    has none: load transformers with ``attn_implementation="eager"``.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        num_perturbations: Directions per step; each costs one forward pass with tangents.
        distribution: Distribution of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`; ``perturb`` cannot be chosen, since nothing
            is perturbed.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ForwardGradient([weight], lr=0.05)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True

    References:
        Baydin et al. (2022), Gradients without Backpropagation, arXiv:2202.08587.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        num_perturbations: int = 1,
        distribution: str = "rademacher",
        momentum: float = 0.0,
        **options: Unpack[ZerothOrderOptions],
    ):
        # Nothing is perturbed, so every way of restoring comes to the same; in_place is what generic code passes.
        perturb = requested_perturb(options, stacklevel=3)
        if not (isinstance(perturb, Tangents) or perturb in IN_PLACE):
            raise UsageError("forward_gradient differentiates at the weights themselves: leave out perturb.")
        options["perturb"] = perturb if isinstance(perturb, Tangents) else Tangents()
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=ForwardDerivative(num_perturbations),
            update=SGD(momentum),
            **options,
        )
