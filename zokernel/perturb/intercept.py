"""See every operation on some tensors, at no cost to the others.

A mode of torch sees all operations, thousands in a forward, and its two microseconds for each add up to several percent
of a short one.  Here the tensors are for a while of a class with a ``__torch_function__`` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

# What reads a tensor's shape, type or place, not its values; attributes come as ``__get__``.
_READS = {"__get__", "size", "dim", "numel", "is_floating_point", "stride", "type", "element_size", "__hash__"}


class Intercepted:
    """Context in which a handler carries out the operations on some tensors.

    Reading shapes and types goes past it, and so do the operations within it.

    Args:
        tensors: Tensors or parameters, changed in class only.
        handler: ``handler(func, args, kwargs)`` returns the result.

    Example:
        >>> weight, seen = torch.ones(2), []
        >>> with Intercepted([weight], lambda func, args, kwargs: seen.append(func.__name__) or func(*args, **kwargs)):
        ...     total = (weight * 2).sum()
        >>> seen
        ['mul']
    """

    def __init__(self, tensors: Iterable[Tensor], handler: Handler):
        self._tensors, self._handler = {id(tensor): tensor for tensor in tensors}, handler
        self._classes: list[tuple[Tensor, type]] = []

    def __enter__(self) -> None:
        intercepted = {kind: self._subclass(kind) for kind in set(map(type, self._tensors.values()))}
        for tensor in self._tensors.values():
            self._classes.append((tensor, type(tensor)))
            tensor.__class__ = intercepted[type(tensor)]

    def __exit__(self, *exc_info: object) -> None:
        for tensor, kind in self._classes:
            tensor.__class__ = kind
        self._classes.clear()

    def _subclass(self, kind: type) -> type:
        def __torch_function__(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch.DisableTorchFunctionSubclass():
                if func.__name__ in _READS:
                    return func(*args, **(kwargs or {}))
                return self._handler(func, args, kwargs or {})

        return type(f"Intercepted{kind.__name__}", (kind,), {"__torch_function__": classmethod(__torch_function__)})


__all__ = ["Intercepted"]
