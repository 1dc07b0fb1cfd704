"""First-order baselines behind the same names and flags: they need gradients, and the memory that goes with them."""

from __future__ import annotations

import torch

from zokernel.optim.parameters import Params, trainable
from zokernel.optim.registry import register


@register("sgd")
class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` on a module or named parameters."""

    first_order = True

    def __init__(self, params: Params, lr: float = 1e-3, *, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(trainable(params), lr=lr, momentum=momentum, weight_decay=weight_decay)

    def effective_lr(self) -> float:
        """Return the learning rate, over ``1 - momentum``."""
        group = self.param_groups[0]
        return group["lr"] / (1.0 - group["momentum"])


@register("adamw")
class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` on a module or named parameters."""

    first_order = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-5,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ):
        super().__init__(trainable(params), lr=lr, betas=betas, weight_decay=weight_decay)

    def effective_lr(self) -> float:
        """Return the learning rate; AdamW normalises the gradient, so it does not compare with SGD's."""
        return self.param_groups[0]["lr"]
