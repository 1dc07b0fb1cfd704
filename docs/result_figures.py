"""Figures of the results pages, drawn from the pages' own tables: ``python docs/result_figures.py``.

A figure cannot say anything else than the table below it, because it is read from there.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from zokernel.figures import PALETTE, figures

RESULTS = Path(__file__).resolve().parent / "results"


def table(page: str, column: str) -> list[dict[str, str]]:
    """Return the rows of the first table of a page that has a column of that name.

    Args:
        page: A page of ``docs/results``, without its ending.
        column: A heading.

    Returns:
        Cells by heading; two headings that are alike get a number.

    Raises:
        ValueError: If no table has such a column.
    """
    text = (RESULTS / f"{page}.md").read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        head = [name if name not in rows[0][:n] else f"{name} 2" for n, name in enumerate(rows[0])]
        if column in head:
            return [dict(zip(head, row)) for row in rows[2:]]
    raise ValueError(f"No table of {page}.md has a column {column!r}.")


def numbers(cell: str) -> list[float]:
    """Return the numbers of a cell.

    Example:
        >>> numbers("98, 98, 100 %")
        [98.0, 98.0, 100.0]
    """
    return [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?", cell)]


def plain(text: str) -> str:
    """Return a cell as words of a figure."""
    return text.replace("`", "")


def bars(
    labels: Sequence[str],
    series: dict[str, Sequence[float]],
    xlabel: str,
    *,
    mark: float | None = None,
) -> bytes:
    """Return a chart of horizontal bars as PNG.

    Args:
        labels: One label a group of bars, from above.
        series: One number a label, by name of the series.
        xlabel: What the numbers are.
        mark: Where a dashed line is drawn.
    """
    height = 0.8 / len(series)
    with figures() as Figure:
        figure = Figure(figsize=(7.2, 0.9 + 0.36 * len(labels) * max(1, 0.75 * len(series))), layout="constrained")
        axes = figure.subplots()
        for n, (name, values) in enumerate(series.items()):
            where = [row + (n - (len(series) - 1) / 2) * height for row in range(len(labels))]
            drawn = axes.barh(where, values, 0.92 * height, color=PALETTE[n], label=name)
            axes.bar_label(drawn, [f"{value:g}" for value in values], padding=3, fontsize=9)
        axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel=xlabel)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        if mark is not None:
            axes.axvline(mark, color="0.35", linestyle="--", linewidth=1)
        if len(series) > 1:
            figure.legend(loc="outside upper center", ncols=len(series))
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return small(stream)


def small(stream: io.BytesIO) -> bytes:
    """Return a PNG of at most 64 colours."""
    from PIL import Image

    stream.seek(0)
    with Image.open(stream) as image:
        flat = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    packed = io.BytesIO()
    flat.save(packed, "PNG", optimize=True)
    return packed.getvalue()


def queries() -> bytes:
    """Tokens and forwards of ``auto`` as shares of MeZO's."""
    rows = table("queries", "tokens, batch 4")
    shares = {name: [numbers(row[name])[0] for row in rows] for name in ("tokens, batch 4", "forwards, batch 16")}
    return bars([row[""] for row in rows], shares, "share of what MeZO spends at batch 16", mark=1)


def speed() -> bytes:
    """Steps per second against the public step, on a CPU."""
    rows = table("speed", "times as fast")
    times = [numbers(row["times as fast"])[0] for row in rows]
    return bars([plain(row["step"]) for row in rows], {"": times}, "times as fast as the public step in fp32", mark=1)


def gpu() -> bytes:
    """Steps per second against the public step, on a GPU."""
    rows = table("gpu", "times as fast")
    series = {
        "SmolLM2-135M": [numbers(row["times as fast"])[0] for row in rows],
        "Llama 1B": [numbers(row["times as fast 2"])[0] for row in rows],
    }
    return bars([plain(row["step, ms"]) for row in rows], series, "times as fast as the public step in bf16", mark=1)


def directions() -> bytes:
    """Milliseconds of a sweep."""
    rows = table("directions", "median ms")
    times = [numbers(row["median ms"])[0] for row in rows]
    labels = [plain(next(iter(row.values()))) for row in rows]
    return bars(labels, {"": times}, "milliseconds for a sweep over 134.5M weights")


def rewards() -> bytes:
    """Pass rates before and after."""
    rows = table("rewards", "after, by seed")
    after = [numbers(row["after, by seed"]) for row in rows]
    series = {
        "before": [numbers(row["pass rate before"])[0] for row in rows],
        "after, mean of the seeds": [round(sum(seeds) / len(seeds), 1) for seeds in after],
    }
    labels = [f"{plain(row['method'])} ({row['trains']})" for row in rows]
    return bars(labels, series, "unseen prompts that pass (%)")


FIGURES = {"queries": queries, "speed": speed, "gpu": gpu, "directions": directions, "rewards": rewards}


def main() -> None:
    """Draw every figure, or those that are named."""
    for name in sys.argv[1:] or FIGURES:
        (RESULTS / f"{name}.png").write_bytes(FIGURES[name]())
        print(f"docs/results/{name}.png")


if __name__ == "__main__":
    main()
