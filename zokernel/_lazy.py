"""Packages whose public names load on first use, so that importing a package imports none of its modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from zokernel.errors import missing_extra


def lazy_exports(
    package: str, exports: Mapping[str, str], gone: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package that loads its public names on first use (PEP 562).

    Args:
        package: The package's ``__name__``.
        exports: For every public name, the module of the package that defines it.
        gone: For every name that earlier versions had, what takes its place.

    Returns:
        ``__getattr__``, and a ``__dir__`` that lists ``__all__``; to be assigned to these names in the package.

    Example:
        >>> load, listing = lazy_exports("zokernel", {"UsageError": "errors"})
        >>> load("UsageError").__module__, "theory" in listing()
        ('zokernel.errors', True)
    """

    def load(name: str) -> Any:
        if name in exports:
            try:
                return getattr(importlib.import_module(f"{package}.{exports[name]}"), name)
            except ModuleNotFoundError as error:
                raise missing_extra(error, f"{package}.{name}") or error from error
        if gone and name in gone:
            raise AttributeError(f"There is no {package}.{name} since 0.2: use {gone[name]}.")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listing() -> list[str]:
        return sorted(importlib.import_module(package).__all__)

    return load, listing
