"""Every package's public names: listed once, in its stub, loaded on first use, and typed for those who use them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zokernel as zk
from zokernel.optim.updates.base import Update

ROOT = Path(__file__).resolve().parents[2]
STUBS = {".".join(stub.parent.relative_to(ROOT).parts): stub for stub in (ROOT / "zokernel").rglob("__init__.pyi")}


def imports(stub):
    """Return what a stub imports: the module of each name, the name there and the name here."""
    statements = ast.parse(stub.read_text()).body
    assert all(isinstance(statement, ast.ImportFrom) and statement.level == 1 for statement in statements)
    return [(node.module, alias.name, alias.asname) for node in statements for alias in node.names]


def test_every_lazy_package_has_a_stub():
    lazy = {path for path in (ROOT / "zokernel").rglob("__init__.py") if "lazy_exports(" in path.read_text()}
    assert lazy == {stub.with_suffix(".py") for stub in STUBS.values()}
    assert {"zokernel", "zokernel.optim", "zokernel.optim.updates", "zokernel.finetune", "zokernel.theory"} <= set(
        STUBS
    )


@pytest.mark.parametrize("package", sorted(STUBS))
def test_a_stub_lists_all_names_of_its_package_and_each_loads(package):
    module, found = importlib.import_module(package), imports(STUBS[package])
    assert sorted(here for _, _, here in found) == module.__all__ == dir(module)
    for origin, name, here in found:
        assert name == here  # 'import x as x' is what makes a name of a stub public
        if origin is None:
            expected = importlib.import_module(f"{package}.{name}")
        else:
            expected = getattr(importlib.import_module(f"{package}.{origin}"), name)
            if inspect.isclass(expected) or inspect.isfunction(expected):
                assert expected.__module__ == f"{package}.{origin}"
        assert getattr(module, name) is expected


@pytest.mark.parametrize("package", sorted(STUBS))
def test_a_lazy_package_defines_no_public_name_beside_its_stub(package):
    statements = ast.parse(STUBS[package].with_suffix(".py").read_text()).body[1:]  # after the docstring
    assert {type(statement) for statement in statements} == {ast.ImportFrom, ast.Assign}
    imported = {alias.name for node in statements if isinstance(node, ast.ImportFrom) for alias in node.names}
    targets = [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    assigned = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    assert imported == {"annotations", "lazy_exports"}
    assert all(name.startswith("_") for name in assigned)


def test_names_of_earlier_versions_say_what_takes_their_place():
    for name in ("Adam", "Sign", "Clip", "Normalized", "iterate_average"):
        with pytest.raises(AttributeError, match=rf"^There is no zokernel.optim.{name} since 0.2: use zokernel.optim"):
            getattr(zk.optim, name)
        assert callable(getattr(zk.optim.updates, name))
    with pytest.raises(AttributeError, match=r"use zokernel\.perturb\.Stacked"):
        zk.optim.Stacked  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'zokernel\.theory' has no attribute 'practice'"):
        zk.theory.practice  # noqa: B018


def updates_in(package):
    named = {name: getattr(package, name) for name in package.__all__}
    return {name for name, value in named.items() if isinstance(value, type) and issubclass(value, Update)}


def test_optim_holds_optimizers_and_updates_their_parts():
    assert updates_in(zk.optim) == set()
    assert updates_in(zk.optim.updates) == {
        "Adam", "Clip", "ClipSlopes", "CurvatureWeights", "IterateAverage", "Normalized", "PolyakBound", "Rule", "SGD",
        "Sign", "SignOfProjections", "Update",
    }  # fmt: skip
    assert zk.optim.updates.SGD is not zk.optim.SGD


USER = """
from torch import nn

import zokernel as zk
from zokernel.optim import MeZO
from zokernel.optim.updates import Adam

model = nn.Linear(2, 2)
reveal_type(MeZO)
reveal_type(zk.optim.MeZO(model))
reveal_type(Adam(beta1=0.5))
reveal_type(zk.theory.optimal_eps)
reveal_type(zk.__version__)
MeZO(model, lrr="oops")
MeZO(model, pertrub="in_forward")
zk.optim.Adam
"""

# The types of other packages are left out, which takes a sixth of the time.
SETTINGS = """
[mypy]
[mypy-torch.*,numpy.*,numba.*,triton.*,transformers.*,datasets.*]
follow_imports = skip
"""


def test_type_checkers_see_the_types_of_public_names(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "user.py", "--no-error-summary", "--cache-dir", "cache"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False).stdout
    revealed = re.findall(r'Revealed type is "(.*)"', printed)
    assert len(revealed) == 5, printed
    assert revealed[0].startswith("def (params: ")
    assert "eps: float =" in revealed[0]
    assert revealed[1:3] == ["zokernel.optim.published.mezo.MeZO", "zokernel.optim.updates.adam.Adam"]
    assert revealed[3:] == ["def (loss_noise: float, third_derivative: float) -> float", "str"]
    refused = re.findall(r"error: (.*)", printed)
    assert len(refused) == 3, printed
    for error, name in zip(refused, ("lrr", "pertrub", "Adam"), strict=True):
        assert f'"{name}"' in error
