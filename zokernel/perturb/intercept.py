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

# What reads a tensor's shape, type or place, not its values.
_READS = {"size", "dim", "numel", "is_floating_point", "stride", "element_size", "__hash__"}
# Attributes that share a tensor's memory, so that who reads them reads its values.
VALUES = {"T", "mT", "H", "mH", "real", "imag", "data", "__cuda_array_interface__"}


class Intercepted:
    """Context in which a handler carries out the operations on some tensors.

    Reading shapes and types goes past it, and so do the operations within it.  Attributes that show the values, such as
    ``weight.T`` and ``weight.data``, are operations.

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
                if _reads_no_values(func, args, kwargs):
                    return func(*args, **(kwargs or {}))
                return self._handler(func, args, kwargs or {})

        return type(f"Intercepted{kind.__name__}", (kind,), {"__torch_function__": classmethod(__torch_function__)})


def attribute_of(func: Any) -> str | None:
    """Return the attribute that an operation reads or sets; None of any other operation.

    Example:
        >>> attribute_of(torch.Tensor.T.__get__), attribute_of(torch.add)
        ('T', None)
    """
    if func.__name__ not in ("__get__", "__set__"):
        return None
    owner = func.__self__
    return getattr(owner, "fget", owner).__name__


def _reads_no_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Return whether an operation neither reads nor replaces the values of a tensor."""
    attribute = attribute_of(func)
    if attribute is not None:
        return attribute not in VALUES
    return func.__name__ in _READS or (func.__name__ == "type" and len(args) == 1 and not kwargs)  # else it converts


__all__ = ["VALUES", "Intercepted", "attribute_of"]
