"""Notices losses that are not those of one function of the weights: new batches, dropout, batch statistics.

Differences of such losses say little about the weights, and nothing else would show it.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from zokernel.estimators.base import Offsets
from zokernel.optim.layers import BATCH_NORMS, DROPOUTS
from zokernel.optim.random_state import random_state, same_random_state
from zokernel.perturb import Perturb, Recorded
from zokernel.perturb.base import Closure

# Losses of a step closer to each other than this share of their size are not looked at again.
SPREAD = 0.01
# A loss taken again may differ by this share of what the perturbations do to it.
REPEAT_TOLERANCE = 0.1


class LossWatch:
    """Warns, once, of a closure whose losses cannot be compared with each other.

    Args:
        params: The optimizer's ``params``; if they are a module, its layers are checked.
    """

    def __init__(self, params: Any = None):
        self._layers = list(_layers(params)) if isinstance(params, nn.Module) else []
        self._has_searched, self._warned = False, False

    def __getstate__(self) -> dict[str, Any]:
        return vars(LossWatch()) | {"_has_searched": self._has_searched, "_warned": self._warned}

    def around(self, perturb: Perturb, parameters: Mapping[str, Tensor]) -> Callable[..., list[float]]:
        """Return how losses are taken and watched: see :meth:`losses`."""
        return partial(self.losses, perturb, parameters=parameters)

    def losses(
        self,
        perturb: Perturb,
        closure: Closure,
        points: Sequence[Offsets],
        *,
        parameters: Mapping[str, Tensor],
        step: int,
    ) -> list[float]:
        """Return the losses at some points, after a look at how they were taken.

        If those of the first step differ by more than a percent of their size, the last is taken again, to see whether
        the closure draws new batches: one more forward per run, which is not counted.

        Args:
            perturb: Takes the losses.
            closure: Returns the loss at the weights as they are.
            points: Where the losses are wanted.
            parameters: Trained parameters by name.
            step: Step of the run.
        """
        if isinstance(perturb, Recorded):
            return perturb.losses(closure, points, step=step)
        if not self._warned:
            self._check_layers(closure, parameters)
        ends: list[Any] = []

        def watched() -> Tensor | float:
            loss = closure()
            if len(ends) < 2:
                ends.append(random_state())
            return loss

        before = [] if self._warned else [random_state()]
        losses = perturb.losses(closure if self._warned else watched, points, step=step)
        # A closure that seeds itself ends every call in the same state.
        ends = ends or ([*before, random_state()] if before else [])
        if len(ends) == 2 and not same_random_state(*ends):
            self._warn(
                "The loss draws random numbers (dropout in train mode, noise or a new batch), so the losses of one "
                "step differ by more than the weights: call model.eval(), and draw the batch before optimizer.step."
            )
        # All processes must come to the same decision, so it depends on the losses alone.
        spread = max(losses) - min(losses)
        if step == 0 and len(losses) == len(points) > 1 and spread > SPREAD * max(map(abs, losses)):
            (repeated,) = perturb.losses(closure, points[-1:], step=step)
            # Not "> tolerance", which a NaN would pass.
            if not abs(repeated - losses[-1]) <= REPEAT_TOLERANCE * spread:
                self._warn(
                    f"The same weights gave the loss {losses[-1]:.6g} and then {repeated:.6g}: the closure must return "
                    "the loss of one fixed batch, drawn before optimizer.step, by a deterministic model (model.eval())."
                )
        return losses

    def _check_layers(self, closure: Closure, parameters: Mapping[str, Tensor]) -> None:
        """Warn of layers in train mode, in the optimizer's module or those that the closure refers to."""
        if not self._has_searched:
            owned = {id(tensor) for tensor in parameters.values()}
            for module in _modules_of(closure):
                if any(id(tensor) in owned for tensor in module.parameters()):
                    self._layers += _layers(module)
            self._has_searched = True
        active = [layer for layer in self._layers if layer.training]
        if active:
            dropout = "dropout is drawn anew in every forward" if any(isinstance(x, DROPOUTS) for x in active) else ""
            norm = "batch norm couples the examples and moves its statistics" if not dropout else ""
            kinds = " and ".join(sorted({type(layer).__name__ for layer in active}))
            self._warn(
                f"The model has {kinds} in train mode, where {dropout or norm}: call model.eval() before "
                "optimizer.step.",
                1,
            )

    def _warn(self, message: str, depth: int = 0) -> None:
        if not self._warned:
            warnings.warn(message, UserWarning, stacklevel=7 + depth)
        self._warned = True


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a module whose train mode changes its loss."""
    for layer in module.modules():
        if isinstance(layer, BATCH_NORMS) or (isinstance(layer, DROPOUTS) and layer.p > 0):
            yield layer


def _modules_of(closure: Callable[..., Any], depth: int = 3) -> Iterator[nn.Module]:
    """Yield the modules that a function refers to: in its cells and globals, and through functions among these."""
    visited: set[int] = set()
    frontier: list[Any] = [closure]
    for _ in range(depth):
        values = [value for item in frontier for value in _referred(item) if id(value) not in visited]
        visited |= set(map(id, values))
        yield from (value for value in values if isinstance(value, nn.Module))
        frontier = [value for value in values if not isinstance(value, nn.Module)]


def _referred(value: Any) -> Iterable[Any]:
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        contents = [content for cell in value.__closure__ or () for content in _contents(cell)]
        return contents + [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
    if isinstance(value, (types.ModuleType, type, str, bytes, Tensor)):
        return []
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def _contents(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a name that has no value yet
        return []


def _names(code: types.CodeType) -> set[str]:
    """Return the global names that a function uses, in the functions inside it too."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)
