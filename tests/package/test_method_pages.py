"""The pages of the methods say what the code says: written from it, complete, with costs that are counted."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from zokernel.optim.registry import get_method, methods

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = yaml.safe_load((ROOT / "docs" / "methods.yaml").read_text())
COUNTED = [
    (method, entry["forwards"])
    for entry in ENTRIES.values()
    for method in entry["methods"]
    if re.fullmatch(r"\d?P( \+ 1)?", entry["forwards"])
]
COPIES = {"one": 1, "two": 2, "three": 3}


@pytest.fixture
def writer(monkeypatch):
    """``docs/methods.py`` as a module."""
    pytest.importorskip("griffe", reason="griffe is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "methods", raising=False)
    return importlib.import_module("methods")


def test_pages_are_what_docstrings_and_defaults_say(writer):
    pages = writer.pages()
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"run python docs/methods.py: {path.name} is old"
    assert set((ROOT / "docs" / "methods").glob("*.md")) == set(pages)
    assert doctest.testmod(writer).failed == 0


def test_docstrings_become_markdown(writer):
    """Formulas, names and tables, as the examples of the module say."""
    roles = importlib.import_module("griffe_roles")
    assert doctest.testmod(roles, optionflags=doctest.NORMALIZE_WHITESPACE) == (0, 3)


def test_a_page_follows_a_changed_default(writer, monkeypatch):
    from zokernel.optim.published.mezo import MeZO

    monkeypatch.setitem(MeZO.__init__.__kwdefaults__, "eps", 5e-4)
    assert "| `eps` | `5e-4` |" in writer.page("mezo", ENTRIES["mezo"])


def test_every_method_has_a_page_in_the_site():
    entries = [method for entry in ENTRIES.values() for method in entry["methods"]]
    assert sorted(entries) == sorted(methods())
    pages = set(re.findall(r"methods/(\w+)\.md", (ROOT / "mkdocs.yml").read_text()))
    assert pages == {*ENTRIES, "index"}


def test_every_page_has_its_parts():
    for name in ENTRIES:
        text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        assert "## When to use it" in text
        assert text.count("| option | default | meaning |") == len(ENTRIES[name]["methods"])
        if name not in ("zeroth_order", "first_order"):
            assert "$" in text, f"{name} has no formula"
            assert "## Reference" in text, f"{name} has no source"
        options = re.findall(r"^\| `(\w+)` \| `[^|]*` \| (.*)\|$", text, re.MULTILINE)
        assert options, f"{name} has no table of options"
        for option, meaning in options:
            assert meaning.strip() or name == "first_order", f"{name} does not say what {option} means"


@pytest.mark.parametrize(("method", "forwards"), COUNTED, ids=[method for method, _ in COUNTED])
def test_the_forwards_of_a_step_are_counted(method, forwards):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 5), torch.randn(4, 6)
    per_example = method == "grzo"
    optimizer = get_method(method)(model, num_perturbations=3, **({"whiten": False} if per_example else {}))
    optimizer.step(lambda: model(x).square().mean(1) if per_example else model(x).square().mean())
    expected = eval(forwards.replace("P", "*3").removeprefix("*"))
    assert optimizer.num_forwards == expected


def test_copies_of_the_weights_are_those_that_memory_is_planned_with():
    num_checked = 0
    for entry in ENTRIES.values():
        match = re.match(r"(one|two|three) fp32 cop", entry["state"])
        for method in entry["methods"]:
            copies = getattr(get_method(method), "memory_copies", None)
            if match:
                last_method = re.search(r", (one|two|three)\)", entry["state"])
                word = last_method.group(1) if last_method and method == entry["methods"][-1] else match.group(1)
                assert copies == COPIES[word], method
                num_checked += 1
            elif entry["state"].startswith("none"):
                assert copies == 0, method
                num_checked += 1
    assert num_checked >= 15
