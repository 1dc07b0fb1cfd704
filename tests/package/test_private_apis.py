"""Every private API that the package relies on exists, has a test of what it does, and is used in one place only."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

import zokernel
from zokernel import private_apis

transformers = pytest.importorskip("transformers")

PACKAGE = Path(zokernel.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "private_apis")
PUBLIC_OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


# The table of hooks


def hooks() -> dict[str, private_apis.Hook]:
    return private_apis.TRAINER_HOOKS | {"save_model": private_apis.SAVE_MODEL}


@pytest.mark.parametrize("name", hooks())
def test_trainer_has_the_hook(name):
    method = getattr(transformers.Trainer, name, None)
    version = transformers.__version__
    assert method is not None, f"transformers {version} has no Trainer.{name}: {hooks()[name].reason}"
    parameters = tuple(inspect.signature(method).parameters)[1:]
    assert parameters == hooks()[name].parameters, f"Trainer.{name} of transformers {version} takes {parameters}"


@pytest.mark.parametrize("name", hooks())
def test_trainer_still_calls_the_hook(name):
    if name in ("_get_train_sampler", "_get_eval_sampler", "save_model"):
        pattern = rf"self\.{name}\b"
    else:
        pattern = rf"self\.{name}\("
    source = inspect.getsource(transformers.Trainer)
    assert re.search(pattern, source), f"Trainer of transformers {transformers.__version__} no longer calls {name}"


def our_trainers() -> list[type]:
    from zokernel.finetune.trainer.zo_trainer import ZOTrainer

    return [kind for kind in ZOTrainer.__mro__ if kind.__module__.startswith("zokernel")]


def test_our_overrides_take_the_same_parameters():
    for kind in our_trainers():
        for name in hooks().keys() & vars(kind).keys():
            parameters = tuple(inspect.signature(vars(kind)[name]).parameters)[1:]
            assert parameters == hooks()[name].parameters, f"{kind.__name__}.{name}"


def test_every_hook_is_needed():
    used = {name for kind in our_trainers() for name in private_names(ast.parse(source_of(kind)))}
    unused = private_apis.TRAINER_HOOKS.keys() - used
    assert not unused, f"not used any more: {unused}"


# Nothing private anywhere else


def source_of(kind: type) -> str:
    return textwrap.dedent(inspect.getsource(kind))


def private_names(tree: ast.AST) -> set[str]:
    """Return private names of attributes and methods."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return set(filter(is_private, attributes | methods))


def of_self(node: ast.Attribute) -> bool:
    owner = node.value
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, ast.Name) and owner.func.id == "super"
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls")


def own_names(tree: ast.AST) -> set[str]:
    """Return the names that a file defines itself: its classes' attributes and fields, functions and variables."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            names.add(node.attr)
    return names


def by_name(node: ast.AST) -> bool:
    """Return whether a node is a call such as ``getattr(model, "_name")``."""
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if called not in ("getattr", "setattr", "hasattr", "delattr") or not isinstance(node.args[1], ast.Constant):
        return False
    return is_private(node.args[1].value)


def imported(tree: ast.AST) -> list[str]:
    """Return the dotted names that a file imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def names_of_imported_files(tree: ast.AST) -> set[str]:
    """Return the names that files of this package define from which a file imports."""
    modules = {name.rpartition(".")[0] for name in imported(tree) if name.startswith("zokernel.")}
    files = [PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py") for name in modules]
    return {name for file in files if file.is_file() for name in own_names_of_file(file)}


@cache
def own_names_of_file(path: Path) -> set[str]:
    return own_names(ast.parse(path.read_text(encoding="utf-8")))


def foreign_uses(tree: ast.AST) -> list[str]:
    """Return what a file uses of others' private names, apart from what its classes inherit."""
    allowed = own_names(tree) | PUBLIC_OF_NAMED_TUPLES | names_of_imported_files(tree)
    uses = [
        name for name in imported(tree) if not name.startswith("zokernel") and any(map(is_private, name.split(".")))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not of_self(node):
            name, text = node.attr, ast.unparse(node)
        elif by_name(node):
            name, text = node.args[1].value, ast.unparse(node)
        elif (
            isinstance(node, ast.Constant) and is_private(str(node.value)) and hasattr(transformers.Trainer, node.value)
        ):
            name, text = node.value, ast.unparse(node)
        else:
            continue
        if name not in allowed and name not in private_apis.TRAINER_HOOKS:
            uses.append(text)
    return uses


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_uses_nothing_private_of_others(path):
    uses = foreign_uses(ast.parse(path.read_text(encoding="utf-8")))
    assert not uses, f"{path}: {uses} belong into zokernel/private_apis/, with a reason and a test"


@pytest.mark.parametrize(
    "code",
    [
        "from torch.utils._pytree import tree_map",
        "import torch._dynamo",
        "torch._C._functions()",
        "tensor._version",
        "getattr(config, '_attn_implementation', None)",
        "def f(trainer): trainer._tr_loss = 0",
    ],
)
def test_the_check_of_files_finds_violations(code):
    assert foreign_uses(ast.parse(code))


def classes() -> list[type]:
    kinds: list[type] = []
    for module in pkgutil.walk_packages(zokernel.__path__, "zokernel."):
        if module.name.endswith("__main__"):
            continue
        try:
            loaded = importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name == "triton":  # only on Linux
                continue
            raise
        kinds += [kind for kind in vars(loaded).values() if inspect.isclass(kind) and kind.__module__ == module.name]
    return kinds


@cache
def names_of(base: type) -> set[str]:
    """Return all names of a class of another package: its own and inherited ones, and those that its methods set."""
    return set(dir(base)) | own_names(ast.parse(source_of(base)))


def inherited_private_names(kind: type) -> set[str]:
    """Return the private names in a class that a class of another package, which it derives from, has as well."""
    packages = {base: base.__module__.split(".")[0] for base in kind.__mro__}
    foreign = [base for base, name in packages.items() if name != "zokernel" and name not in sys.stdlib_module_names]
    inherited: set[str] = set()
    for base in foreign:
        inherited |= names_of(base)
    return private_names(ast.parse(source_of(kind))) & inherited


def test_classes_inherit_nothing_private_but_the_hooks():
    inherited = {kind: inherited_private_names(kind) for kind in classes() if "<locals>" not in kind.__qualname__}
    assert sum(issubclass(kind, torch.optim.Optimizer) for kind in inherited) > 5
    for kind, names in inherited.items():
        allowed = set(private_apis.TRAINER_HOOKS) if issubclass(kind, transformers.Trainer) else set()
        assert names <= allowed, f"{kind.__name__} overrides or uses {names - allowed} of the class it derives from"


def test_the_check_of_classes_finds_violations():
    class Overrides(torch.optim.SGD):
        def _init_group(self, *args):
            return super()._init_group(*args)

    assert inherited_private_names(Overrides) == {"_init_group"}


def private_api_modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(private_apis.__path__, f"{private_apis.__name__}.")]
    return [importlib.import_module(name) for name in names]


@pytest.mark.parametrize("module", private_api_modules(), ids=lambda module: module.__name__)
def test_every_name_of_a_dependency_is_exported(module):
    tree = ast.parse(inspect.getsource(module))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)}
    missing = {name for name in defined if not is_private(name)} - set(private_apis.__all__)
    assert not missing, f"zokernel.private_apis does not export {missing} of {module.__name__}"


def test_every_function_says_what_is_private():
    functions = [
        value
        for module in private_api_modules()
        for value in vars(module).values()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    tests = Path(__file__).with_name("test_private_behaviour.py").read_text(encoding="utf-8")
    assert len(functions) > 20
    for function in functions:
        assert "Private: " in (function.__doc__ or ""), function.__name__
        assert f"private_apis.{function.__name__}(" in tests, f"{function.__name__} has no test"
