"""Every method by name.  A new method adds one file to ``published/``; nothing else changes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from zokernel.errors import UsageError
from zokernel.optim.options import constructor_options

OptimizerClass = TypeVar("OptimizerClass", bound=type[torch.optim.Optimizer])

_METHODS: dict[str, type[torch.optim.Optimizer]] = {}
# Methods that only reproduce a paper live beside its experiments, and are loaded when asked for by name.
_BESIDE_EXPERIMENTS = {"kerzoo_printed": "zokernel.experiments.kerzoo.printed"}


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
    return {name: cls for name, cls in sorted(_METHODS.items()) if name not in _BESIDE_EXPERIMENTS}


def get_method(name: str) -> type[torch.optim.Optimizer]:
    """Look a method up by name.

    Raises:
        UsageError: If there is no method of that name.
    """
    if name in _BESIDE_EXPERIMENTS:
        importlib.import_module(_BESIDE_EXPERIMENTS[name])
        return _METHODS[name]
    known = methods()
    if name not in known:
        raise UsageError(f"There is no method {name!r}: choose one of {', '.join(known)}.")
    return known[name]


def method_options(name: str) -> dict[str, Any]:
    """Return the options of a method with their defaults.

    Raises:
        UsageError: If there is no method of that name.

    Example:
        >>> method_options("lozo")["rank"]
        2
    """
    return constructor_options(get_method(name))
