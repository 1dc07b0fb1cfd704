"""First-order baselines behind the same interface: they need gradients, and the memory that goes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.optim.copies import Copied
from zokernel.optim.parameters import (
    Origin,
    Params,
    check_group,
    check_group_settings,
    name_parameters,
    trainable,
    trainable_group,
)
from zokernel.optim.registry import register
from zokernel.optim.saved_state import check_first_order_state
from zokernel.perturb.in_place import loss_value
from zokernel.values import check_shares


class FirstOrder(Copied):
    """What torch's optimizers lack to stand in for zeroth-order ones: names, and a closure that only evaluates."""

    first_order = True
    forwards_per_step = 1
    _origin = Origin()

    def _adopt(self, params: Params) -> None:
        self._origin = Origin(params)
        self.named_params = name_parameters(self.param_groups)
        self.num_forwards = 0
        self.step_count = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters from the next step on: a module, tensors or ``(name, tensor)`` pairs.

        Raises:
            UsageError: If the group does not fit the others, or has a setting that holds for all groups.
        """
        count = len(self.param_groups)
        group = trainable_group(param_group, self.param_groups, self._origin)
        check_group_settings(group, cast(torch.optim.Optimizer, self))
        super().add_param_group(group)
        try:
            self.param_groups[-1] |= check_group(self.param_groups[-1])
            names = name_parameters(self.param_groups)
        except UsageError:
            del self.param_groups[count:]
            raise
        if hasattr(self, "named_params"):
            self.named_params = names

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            UsageError: If another optimizer saved it, or it is of other parameters.
        """
        check_first_order_state(state_dict, cast(torch.optim.Optimizer, self))
        super().load_state_dict(state_dict)

    def ask(self, *_: Any) -> NoReturn:
        """Refuse: this method takes gradients, which losses do not give.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            f"{type(self).__name__} takes gradients, so it has no ask and tell: use a zeroth-order method such as mezo."
        )

    weights_at = at = tell = ask

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Returns the loss as a tensor; this method differentiates it.  One that calls ``backward`` itself,
                as torch's convention has it, works too.  Without a closure, gradients must be there already.

        Returns:
            The loss as a float, or None without a closure.

        Raises:
            UsageError: If the loss cannot be differentiated.
        """
        if closure is None:
            self.step_count += 1
            return super().step()
        self.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = closure()
            value = loss_value(loss)
            if all(tensor.grad is None for tensor in self.named_params.values()):
                if not (isinstance(loss, Tensor) and loss.requires_grad):
                    raise UsageError(
                        f"{type(self).__name__} needs a closure that returns a loss with a gradient: compute it in "
                        "PyTorch, not under no_grad, from parameters with requires_grad=True."
                    )
                loss.backward()
        self.num_forwards += 1
        self.step_count += 1
        super().step()
        return value


@register("sgd")
class SGD(FirstOrder, torch.optim.SGD):
    """``torch.optim.SGD`` on a module or named parameters.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        momentum: Weight of the last step in the next one.
        weight_decay: Added to the gradient, times the weights.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = SGD([weight], lr=0.1)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(50)]
        >>> losses[-1] < 1e-3 < losses[0]
        True
    """

    memory_copies = 1.0

    def __init__(self, params: Params, lr: float = 1e-3, *, momentum: float = 0.0, weight_decay: float = 0.0):
        check_group({"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        torch.optim.SGD.__init__(self, trainable(params), lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._adopt(params)

    def effective_lr(self) -> float:
        """Return the learning rate, over ``1 - momentum``."""
        group = self.param_groups[0]
        return group["lr"] / (1.0 - group["momentum"])


@register("adamw")
class AdamW(FirstOrder, torch.optim.AdamW):
    """``torch.optim.AdamW`` on a module or named parameters.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate: about how far each weight moves in a step.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        weight_decay: Share of each weight that a step of rate 1 takes away.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = AdamW([weight], lr=0.1)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(100)]
        >>> losses[-1] < 1e-2 < losses[0]
        True

    References:
        Loshchilov and Hutter (2019), Decoupled weight decay regularization, arXiv:1711.05101.
    """

    memory_copies = 3.0

    def __init__(
        self,
        params: Params,
        lr: float = 1e-5,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
    ):
        check_group({"lr": lr, "weight_decay": weight_decay})
        check_shares(beta1=beta1, beta2=beta2)
        betas = (float(beta1), float(beta2))
        torch.optim.AdamW.__init__(self, trainable(params), lr=lr, betas=betas, weight_decay=weight_decay)
        self._adopt(params)

    def effective_lr(self) -> float:
        """Return the learning rate; AdamW normalises the gradient, so it does not compare with SGD's."""
        return self.param_groups[0]["lr"]
