"""The optimizer that transformers' loop holds while the trainer takes the steps.

The loop ends each step with ``optimizer.step()``, without a closure.  A zeroth-order step needs its closure, so
``training_step`` takes the step, and what the loop calls afterwards does nothing.
"""

from __future__ import annotations

from typing import Any

import torch


class LoopOptimizer(torch.optim.Optimizer):
    """Stands for an optimizer whose steps are taken elsewhere: it shares everything but ``step``.

    Schedules change the learning rates of the real optimizer through it, and checkpoints get the real state.

    Args:
        real: The optimizer that takes the steps.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> real = torch.optim.SGD([weight], lr=0.1)
        >>> stand_in = LoopOptimizer(real)
        >>> stand_in.param_groups[0]["lr"] = 0.2
        >>> stand_in.step(), real.param_groups[0]["lr"], bare(stand_in) is real
        (None, 0.2, True)
    """

    def __init__(self, real: torch.optim.Optimizer):
        # Not that of torch, which would make groups and state of its own.
        self.optimizer = real

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the real optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the real optimizer."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the real optimizer."""
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the step has been taken."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: there are no gradients."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the real optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the real optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the real optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


def bare(optimizer: Any) -> Any:
    """Return an optimizer without the wrappers of this module and of accelerate."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
