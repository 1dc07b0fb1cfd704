"""Pages of results have one form, a figure of their own numbers, and at most 800 words."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
PAGES = ["queries", "long-runs", "rewards", "speed", "gpu", "directions", "multi-query", "kerzoo", "entk", "nzk"]


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
        path, _, scheme = figure.partition("#only-")
        assert (RESULTS / path).is_file()
        assert not scheme or (RESULTS / path.replace("-light.", "-dark.")).is_file()
        assert scheme in ("", "light" if "-light." in path else "dark")
    assert "![" in text
    assert text.count("#only-light)") == text.count("#only-dark)")


def test_figures_show_the_numbers_of_their_pages(drawer, monkeypatch):
    drawn: dict[str, list[float]] = {}
    current = ""

    def bars(labels, series, xlabel, **options):
        assert all(len(values) == len(labels) for values in series.values())
        drawn[current] = [value for values in series.values() for value in values]
        return b""

    def curves(panels, **options):
        assert all(len(line.x) == len(line.y) > 2 for panel in panels for line in panel.lines)
        drawn[current] = [line.y[-1] for panel in panels for line in panel.lines]
        return b""

    monkeypatch.setattr(drawer, "bars", bars)
    monkeypatch.setattr(drawer, "curves", curves)
    for current, draw in drawer.FIGURES.items():  # noqa: B007, bars and curves read it
        draw()
    assert drawn["queries"] == [0.12, 0.13, 0.18, 0.11, 0.28, 0.35, 0.45, 0.36]
    assert drawn["long-runs"] == [0.79, 0.528, 0.462, 0.4524, 0.7087, 0.8045]
    assert drawn["rewards"] == [40, 40, 40, 98.7, 98.7, 75.3]
    assert max(drawn["speed"]) == 9.6
    assert max(drawn["gpu"]) == 6.0
    assert min(drawn["directions"]) == 22.3
    assert drawn["memory"] == [0.999, 1.034, 1.036, 1.018, 1.115, 1.51, 2.04, 3.14]
    assert drawn["size"] == [299, 2070, 2990, 0.0049]
    assert drawn["effective-rates"] == [0.29, 1.21, 1.57]
    assert drawn["directions-per-step"] == pytest.approx([2.2217, 1.0573, 0.5162, 0.975, 1.829, 0.119], abs=2e-3)
    # The training losses at the end that the notes print: MeZO and auto at batch 16, auto at batch 4.
    assert drawn["forwards"][:3] == pytest.approx([0.600, 0.622, 0.613], abs=6e-4)


def test_every_figure_is_committed_in_both_schemes_as_it_is_drawn(drawer):
    text = "".join(page.read_text() for page in RESULTS.parent.rglob("*.md"))
    for name, draw in drawer.FIGURES.items():
        labels = set(re.findall(r">([^<>]+)</text>", draw(dark=True).decode()))
        for scheme in ("light", "dark"):
            path = RESULTS.parent / "img" / f"{name}-{scheme}.svg"
            assert f"img/{name}-{scheme}.svg#only-{scheme})" in text, f"no page shows {path.name}"
            assert set(re.findall(r">([^<>]+)</text>", path.read_text())) == labels, f"{path.name} is old"


def test_a_figure_is_drawn_in_the_ink_of_its_scheme(drawer):
    light, dark = (
        drawer.bars(["one", "two"], {"a": [1, 2], "b": [3, 4]}, "times", dark=dark) for dark in (False, True)
    )
    assert b"#222222" in light
    assert b"#e6e6e6" in dark
    assert b"#222222" not in dark
    assert b">0.9994</text>" in drawer.bars(["one"], {"": [0.9994]}, "times")
    assert all(f">{word}</text>".encode() in dark for word in ("one", "two", "times", "a", "b"))
    with pytest.raises(ValueError, match="has a column 'nothing'"):
        drawer.table("speed", "nothing")
