"""Every method by name.  A new method adds one file to ``published/``; nothing else changes."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from zokernel.errors import UsageError
from zokernel.optim.options import constructor_options

OptimizerClass = TypeVar("OptimizerClass", bound=type[torch.optim.Optimizer])

_METHODS: dict[str, type[torch.optim.Optimizer]] = {}
PLUGINS = "zokernel.methods"
"""Entry points of this group are methods that live elsewhere, in other packages too; they are loaded when requested."""


def register(name: str) -> Callable[[OptimizerClass], OptimizerClass]:
    """Make an optimizer class known as ``--method name``."""

    def add(cls: OptimizerClass) -> OptimizerClass:
        _METHODS[name] = cls
        return cls

    return add


def methods() -> dict[str, type[torch.optim.Optimizer]]:
    """Return every method of this package by name, zeroth-order and first-order.

    Example:
        >>> "mezo" in methods()
        True
    """
    package = importlib.import_module("zokernel.optim.published")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"zokernel.optim.published.{module.name}")
    return {name: cls for name, cls in sorted(_METHODS.items()) if cls.__module__.startswith("zokernel.optim.")}


def get_method(name: str) -> type[torch.optim.Optimizer]:
    """Look a method up by name: one of this package, or one that a plugin offers.

    Raises:
        UsageError: If there is no method of that name.
    """
    classes = methods()
    if name not in classes:
        for plugin in importlib.metadata.entry_points(group=PLUGINS, name=name):
            return plugin.load()
        raise UsageError(f"There is no method {name!r}: choose one of {', '.join(classes)}.")
    return classes[name]


def is_plugin(name: str) -> bool:
    """Return whether a plugin offers a method of that name.

    Example:
        >>> is_plugin("mezo")
        False
    """
    return any(True for _ in importlib.metadata.entry_points(group=PLUGINS, name=name))


def method_options(name: str) -> dict[str, Any]:
    """Return the options of a method with their defaults.

    Raises:
        UsageError: If there is no method of that name.

    Example:
        >>> method_options("lozo")["rank"]
        2
    """
    return constructor_options(get_method(name))
