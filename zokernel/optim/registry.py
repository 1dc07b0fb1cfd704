"""Every method by name.  A new method adds one file to this folder; nothing else changes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

import torch

from zokernel.errors import UsageError

OptimizerClass = TypeVar("OptimizerClass", bound=type[torch.optim.Optimizer])

_METHODS: dict[str, type[torch.optim.Optimizer]] = {}


def register(name: str) -> Callable[[OptimizerClass], OptimizerClass]:
    """Make an optimizer class known as ``--method name``."""

    def add(cls: OptimizerClass) -> OptimizerClass:
        _METHODS[name] = cls
        return cls

    return add


def methods() -> dict[str, type[torch.optim.Optimizer]]:
    """Return every registered method by name, zeroth-order and first-order.

    Example:
        >>> "mezo" in methods()
        True
    """
    package = importlib.import_module("zokernel.optim.published")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"zokernel.optim.published.{module.name}")
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> type[torch.optim.Optimizer]:
    """Look a method up by name.

    Raises:
        UsageError: If there is no method of that name.
    """
    known = methods()
    if name not in known:
        raise UsageError(f"There is no method {name!r}: choose one of {', '.join(known)}.")
    return known[name]
