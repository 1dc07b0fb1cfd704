"""The sources of the site have one sentence per line, so that a change shows which sentence it changed."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "guide").glob("*.md"), *(DOCS / "methods").glob("*.md")])
RESULTS = sorted((DOCS / "results").glob("*.md"))


@pytest.fixture
def sentences(monkeypatch):
    """``docs/sentences.py`` as a module."""
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.delitem(sys.modules, "sentences", raising=False)
    return importlib.import_module("sentences")


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: str(page.relative_to(DOCS)))
def test_a_line_is_a_sentence(page, sentences):
    assert sentences.faults(page.read_text(encoding="utf-8")) == []


def test_what_is_a_sentence(sentences):
    assert doctest.testmod(sentences).failed == 0
    assert sentences.faults("One (see Fig. 4). Two.\n") == ["line 1: One (see Fig. 4). Two."]
    assert sentences.faults("- **Words.** One sentence\n  goes on.\n") == ["line 2:   goes on."]
    unharmed = "# A. B\n\n```\nA. B\n```\n\n| A. B |\n\n1. See `a. B`, e.g. Li et al. 2026.\n2. Two:\n\n    A. B\n"
    assert sentences.faults(unharmed) == []
