"""Pages of results have one form, a figure of their own numbers, and at most 800 words."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
PAGES = ["queries", "rewards", "speed", "gpu", "directions", "multi-query"]


@pytest.fixture
def drawer(monkeypatch):
    """``docs/result_figures.py`` as a module."""
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    monkeypatch.delitem(sys.modules, "result_figures", raising=False)
    return importlib.import_module("result_figures")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_form_of_all(page):
    text = (RESULTS / f"{page}.md").read_text()
    parts = ["\n**Question.**", "\n**Answer.**", "\n1. ", "\n2. ", "\n3. ", "](", "\n| ", "Repeat it", "Limits"]
    assert [part for part in parts if part not in text] == []
    assert text.index("**Question.**") < text.index("**Answer.**") < text.index("\n|")
    assert text.index("Repeat it") < text.index("Limits")
    prose = re.sub(r"[|\-:]{2,}|\|", " ", text)
    assert len(prose.split()) <= 800
    for figure in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
        assert (RESULTS / figure).is_file()
    assert "![" in text


def test_figures_show_the_numbers_of_their_pages(drawer, monkeypatch):
    shown: dict[str, list[float]] = {}
    current = ""

    def record(labels, series, xlabel, **options):
        assert all(len(values) == len(labels) for values in series.values())
        shown[current] = [value for values in series.values() for value in values]
        return b""

    monkeypatch.setattr(drawer, "bars", record)
    for current, draw in drawer.FIGURES.items():  # noqa: B007, record reads it
        draw()
    assert shown["queries"] == [0.12, 0.13, 0.18, 0.11, 0.28, 0.35, 0.45, 0.36]
    assert shown["rewards"] == [40, 40, 40, 98.7, 98.7, 75.3]
    assert max(shown["speed"]) == 9.6
    assert max(shown["gpu"]) == 6.0
    assert min(shown["directions"]) == 22.3


def test_a_figure_is_drawn(drawer):
    data = drawer.bars(["one", "two"], {"a": [1, 2], "b": [3, 4]}, "times")
    assert data.startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has a column 'nothing'"):
        drawer.table("speed", "nothing")
