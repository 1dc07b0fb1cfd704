"""Charts of the site as SVG on a transparent ground, in dark ink for the light scheme and in light ink for the dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zokernel.figures import PALETTE, figures

# The palette's blue and green are too dark on a dark ground.
DARK_PALETTE = ("#56B4E9", "#E69F00", "#33C296", "#E39AC4")


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    Args:
        name: What the legend calls it.
        x: Where its points are.
        y: Their heights.
        error: Half the height of a band around it, per point; none if empty.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Lines in one pair of axes.

    Args:
        title: Above the axes.
        lines: What is drawn.
        xlabel: What x is.
        ylabel: What y is.
        log: Whether both axes are logarithmic.
        xticks: Where the x axis is labelled, if not where matplotlib would.
        yticks: The same for the y axis.
    """

    title: str
    lines: Sequence[Line]
    xlabel: str
    ylabel: str
    log: bool = False
    xticks: Sequence[float] = ()
    yticks: Sequence[float] = ()


@contextmanager
def themed(*, dark: bool) -> Iterator[tuple[Any, Sequence[str]]]:
    """Yield the class of a figure and the colours of its series."""
    with figures() as Figure:
        import matplotlib

        ink = "#e6e6e6" if dark else "#222222"
        names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
        style: dict[str, Any] = dict.fromkeys(names, ink) | {"font.sans-serif": ["DejaVu Sans", "Arial"]}
        with matplotlib.rc_context(style):
            yield Figure, DARK_PALETTE if dark else PALETTE


def svg(figure: Any) -> bytes:
    """Return a figure as SVG, with two decimals in its coordinates and without what a browser does not need."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", stream.getvalue().decode(), flags=re.DOTALL)
    tags = re.compile(r"<[^>]*>")  # coordinates stand in tags, and labels between them
    text = tags.sub(lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), re.sub(r">\s+<", "><", text))
    return text.encode()


def bars(
    labels: Sequence[str],
    series: dict[str, Sequence[float]],
    xlabel: str,
    *,
    mark: float | None = None,
    dark: bool = False,
) -> bytes:
    """Return a chart of horizontal bars.

    Args:
        labels: One label per group of bars, from above.
        series: One number per label, by name of the series.
        xlabel: What the numbers are.
        mark: Where a dashed line is drawn.
        dark: Whether it is for the dark scheme.
    """
    height = 0.8 / len(series)
    with themed(dark=dark) as (Figure, colours):
        figure = Figure(figsize=(7.2, 0.9 + 0.36 * len(labels) * max(1, 0.75 * len(series))), layout="constrained")
        axes = figure.subplots()
        for n, (name, values) in enumerate(series.items()):
            positions = [row + (n - (len(series) - 1) / 2) * height for row in range(len(labels))]
            container = axes.barh(positions, values, 0.92 * height, color=colours[n], label=name)
            axes.bar_label(container, [f"{value:g}" for value in values], padding=3, fontsize=9)
        axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel=xlabel)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        if mark is not None:
            axes.axvline(mark, color="0.6" if dark else "0.35", linestyle="--", linewidth=1)
        if len(series) > 1:
            figure.legend(loc="outside upper center", ncols=len(series))
        return svg(figure)


def curves(panels: Sequence[Panel], *, dark: bool = False) -> bytes:
    """Return panels of lines side by side."""
    with themed(dark=dark) as (Figure, colours):
        figure = Figure(figsize=(3.7 * len(panels) if len(panels) > 1 else 6.4, 3.3), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for line, colour in zip(panel.lines, colours):
                axes.plot(line.x, line.y, color=colour, label=line.name, marker="o", markersize=3.5)
                if line.error:
                    low, high = ([y + sign * e for y, e in zip(line.y, line.error)] for sign in (-1, 1))
                    axes.fill_between(line.x, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
            axes.set_title(panel.title, fontsize=10)
            if panel.log:
                axes.set(xscale="log", yscale="log")
            for axis, ticks in ((axes.xaxis, panel.xticks), (axes.yaxis, panel.yticks)):
                if ticks:
                    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
                    axis.set_ticks([], minor=True)
            axes.legend(fontsize=9)
        return svg(figure)
