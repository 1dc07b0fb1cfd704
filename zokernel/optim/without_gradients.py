"""Steps without gradients: nothing records them, and a closure that calls backward is refused.

torch's own optimizers want backward passes in the closure, and a step made of losses does not.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.private_apis import write_count

P = ParamSpec("P")
R = TypeVar("R")

_CALLS_BACKWARD = (
    "{who} must not call backward, because a zeroth-order step takes losses alone: return the loss, and leave "
    "out loss.backward() and zero_grad()."
)
_CALLS_GRAD = (
    "{who} calls torch.autograd.grad, and a zeroth-order step runs it under no_grad: compute that part of the "
    "loss under torch.enable_grad()."
)


def without_gradients(step: Callable[P, R]) -> Callable[P, R]:
    """Decorate a step to run under ``no_grad``, and out of inference mode.

    What is made in that mode and kept, such as momentum, could not be changed out of it.
    """

    @wraps(step)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return step(*args, **kwargs)

    return run


@contextmanager
def refuse_backward(parameters: Mapping[str, Tensor], who: str = "The closure") -> Iterator[None]:
    """Refuse backward passes in a ``with`` block: those that fail for want of a gradient, and those that succeed.

    Args:
        parameters: Trained parameters by name, whose gradients tell of a backward pass under ``enable_grad``.
        who: What runs in the block, for the message.

    Raises:
        UsageError: If there is one, or ``torch.autograd.grad`` fails.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> with torch.no_grad(), refuse_backward({"weight": weight}):
        ...     weight.sum().backward()
        Traceback (most recent call last):
        zokernel.errors.UsageError: The closure must not call backward, because a zeroth-order step takes losses ...
    """
    before = _gradients(parameters)
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        if _went_through(error, torch.autograd.backward):
            raise UsageError(_CALLS_BACKWARD.format(who=who)) from error
        if _went_through(error, torch.autograd.grad):
            raise UsageError(_CALLS_GRAD.format(who=who)) from error
        raise
    for name, (gradient, writes) in _gradients(parameters).items():
        old, old_writes = before.get(name, (None, None))
        if gradient is not old or writes != old_writes:
            raise UsageError(_CALLS_BACKWARD.format(who=who))


def _gradients(parameters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int | None]]:
    """Return the gradients that parameters hold by name, each with how often it was written to."""
    found = ((name, tensor.grad) for name, tensor in parameters.items())
    return {name: (gradient, write_count(gradient)) for name, gradient in found if gradient is not None}


def _went_through(error: BaseException, function: Callable[..., Any]) -> bool:
    """Return whether a function was running when an error was raised."""
    code = getattr(function, "__code__", None)
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))
