"""Packages whose public names load on first use, so that importing a package imports none of its modules.

A package's names are those that its stub, ``__init__.pyi``, imports.  Type checkers and editors read the stub too, so
that every name is listed once.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Callable, Mapping


def lazy_exports(
    package: str, gone: Mapping[str, str] | None = None
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package that loads its names on first use (PEP 562).

    Args:
        package: The package's ``__name__``.
        gone: For every name that earlier versions had, what takes its place.

    Returns:
        The names of the package's stub, what loads one of them, and what lists them.

    Example:
        >>> names, load, listing = lazy_exports("zokernel.perturb")
        >>> load("InForward").__module__, "Stacked" in names, listing() == names
        ('zokernel.perturb.in_forward', True, True)
    """
    exports = stub_imports(package)
    names = sorted(exports)

    def load(name: str) -> object:
        if name in exports:
            return _load(package, exports[name], name)
        if gone and name in gone:
            raise AttributeError(f"There is no {package}.{name} since 0.2: use {gone[name]}.")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return names, load, lambda: names


def stub_imports(package: str) -> dict[str, str]:
    """Return what a package's stub imports: for every name, the module of the package that it comes from.

    Only ``from .module import name as name`` counts, and ``from . import module as module``, whose module is ``""``.

    Example:
        >>> stub_imports("zokernel")["theory"], stub_imports("zokernel.kernels")["nzk"]
        ('', 'nzk_matrix')
    """
    stub = os.path.splitext(str(sys.modules[package].__file__))[0] + ".pyi"
    with open(stub, encoding="utf-8") as file:
        statements = ast.parse(file.read()).body
    relative = [node for node in statements if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {alias.name: node.module or "" for node in relative for alias in node.names}


def _load(package: str, module: str, name: str) -> object:
    """Return a name of a module of a package, or a module itself where that is ``""``.

    Raises:
        MissingDependencyError: If it needs an extra that is not installed.
    """
    try:
        if not module:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(f"{package}.{module}"), name)
    except ModuleNotFoundError as error:
        from zokernel.errors import missing_extra  # which takes longer to import than this package

        raise missing_extra(error, f"{package}.{name}") or error from error
