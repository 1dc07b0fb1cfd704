"""The series of a figure can be told apart: by colour and by dash or marker, on light and on dark paper."""

from __future__ import annotations

import re
import shutil
from collections import Counter

import pytest
from kinds import KINDS

from zokernel.commands.report import read
from zokernel.figures import PALETTE, figures
from zokernel.reporting.html import read_asset
from zokernel.reporting.page import Series
from zokernel.reporting.series import look, series_of
from zokernel.reporting.svg import draw


def told_apart(pictures):
    """Assert that no two series of a panel share a colour, nor a dash and marker."""
    for picture in pictures:
        for panel in {one.panel for one in picture.series}:
            series = [one for one in picture.series if one.panel == panel]
            for values in ([one.color for one in series], [one.shape for one in series], [one.name for one in series]):
                assert max(Counter(values).values()) == 1, (picture.title, series)


def pictures_of(folder):
    return [picture for section in read(folder).sections for picture in section.pictures]


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_series_of_a_run_share_colour_or_dash(kind, kinds):
    pictures = pictures_of(kinds(kind))
    assert kind == "judged" or {"Loss"} <= {picture.title for picture in pictures if picture.series}
    told_apart(pictures)


def test_no_two_series_of_plans_kernels_and_predictions_look_alike(run_folders, tmp_path):
    for kind, count in (("plan", 3), ("kernel", 4), ("evolve", 4)):
        pictures = pictures_of(run_folders[kind])
        assert [len(one.series) for one in pictures if one.series] == [count], kind
        told_apart(pictures)
    folder = tmp_path / "run"
    shutil.copytree(run_folders["finetune"], folder)
    shutil.copy(run_folders["plan"] / "plan.json", folder)
    shutil.copy(run_folders["evolve"] / "evolution.json", folder)
    pictures = {picture.title: picture for picture in pictures_of(folder)}
    assert len(pictures["Loss"].series) == 6
    assert len(pictures["Projected gradient"].series) == 3
    told_apart(pictures.values())


def test_series_that_look_alike_are_found():
    with figures() as Figure:
        axes = Figure().subplots()
        axes.plot([0, 1], [0, 1], color=PALETTE[0], alpha=0.25, label="thin")
        axes.plot([0, 1], [1, 0], color=PALETTE[0], label="thick")
        axes.errorbar([0, 1], [0, 1], [1, 1], label="points", **look("test"))
        axes.plot([0, 1], [0, 1])
        series = series_of(axes.figure)
    assert series[:2] == [Series(0, "thin", "#0072b2", "-"), Series(0, "thick", "#0072b2", "-")]
    assert series[2:] == [Series(0, "points", "#009e73", "D")]
    picture = draw(lambda figure: figure.subplots(), "empty", title="t", alt="a")
    picture.series = series
    with pytest.raises(AssertionError, match="thick"):
        told_apart([picture])


def luminance(color):
    """Relative luminance by WCAG 2."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_stand_out_from_light_and_dark_paper():
    style = read_asset("style.css")
    blocks = re.findall(r"\{([^{}]*--series-1:[^{}]*)\}", style)
    assert len(blocks) == 3, "light, dark by choice, dark by the system"
    themes = [dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert themes[1] == themes[2]
    numbers = [number for number, color in enumerate(PALETTE, 1) if color != "#000000"]
    for theme in themes[:2]:
        colors = [theme[f"--series-{number}"] for number in numbers]
        assert len(set(colors)) == len(colors)
        for color in colors:
            low, high = sorted([luminance(color), luminance(theme["--paper"])])
            assert (high + 0.05) / (low + 0.05) >= 3.0, (color, theme["--paper"])


def test_a_drawing_takes_its_colours_from_the_page():
    picture = draw(
        lambda figure: figure.subplots().plot([0, 1], [1, 0], label="line", **look("validation")),
        "one",
        title="t",
        alt="a",
    )
    assert "var(--series-2)" in picture.svg
    assert "#d55e00" not in picture.svg


def test_the_live_page_has_a_distinct_look_for_each_series_of_a_chart():
    script = read_asset("live.js")
    looks = {
        name: (color, re.sub(r"\s", "", rest))
        for name, color, rest in re.findall(r"^    (\w+): \{ color: (\d), (.*?) \},$", script, re.MULTILINE)
    }
    patterns = (r"const lines = \[.*?chart\(.*?;", r"chart\([^;]*?\] : \[\].*?;", r"const gradient = .*?chart\(.*?;")
    charts = re.findall("|".join(patterns), script, re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        used = re.findall(r'look: "(\w+)"', chart)
        assert len(used) >= 3
        assert len({looks[name][0] for name in used}) == len({looks[name][1] for name in used}) == len(used), used
