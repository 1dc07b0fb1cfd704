"""Figures of the site, light and dark, drawn from committed numbers: ``python docs/result_figures.py``.

Figures of results pages are read from the pages' own tables, so they cannot say anything else.
The others are read from records of experiments and from the runs in ``queries.jsonl``.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

from drawing import Line, Panel, bars, curves

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = RESULTS.parent / "img"


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


def queries(*, dark: bool = False) -> bytes:
    """Tokens and forwards of ``auto`` as shares of MeZO's."""
    rows = table("queries", "tokens, batch 4")
    shares = {name: [numbers(row[name])[0] for row in rows] for name in ("tokens, batch 4", "forwards, batch 16")}
    return bars([row[""] for row in rows], shares, "share of what MeZO spends at batch 16", mark=1, dark=dark)


def speed(*, dark: bool = False) -> bytes:
    """Steps per second against the public step, on a CPU."""
    rows = table("speed", "times as fast")
    times = [numbers(row["times as fast"])[0] for row in rows]
    return bars(
        [plain(row["step"]) for row in rows], {"": times}, "times as fast as the public step in fp32", mark=1, dark=dark
    )


def gpu(*, dark: bool = False) -> bytes:
    """Steps per second against the public step, on a GPU."""
    rows = table("gpu", "times as fast")
    series = {
        "SmolLM2-135M": [numbers(row["times as fast"])[0] for row in rows],
        "Llama 1B": [numbers(row["times as fast 2"])[0] for row in rows],
    }
    return bars(
        [plain(row["step, ms"]) for row in rows], series, "times as fast as the public step in bf16", mark=1, dark=dark
    )


def directions(*, dark: bool = False) -> bytes:
    """Milliseconds of a sweep."""
    rows = table("directions", "median ms")
    times = [numbers(row["median ms"])[0] for row in rows]
    labels = [plain(next(iter(row.values()))) for row in rows]
    return bars(labels, {"": times}, "milliseconds for a sweep over 134.5M weights", dark=dark)


def rewards(*, dark: bool = False) -> bytes:
    """Pass rates before and after."""
    rows = table("rewards", "after, by seed")
    after = [numbers(row["after, by seed"]) for row in rows]
    series = {
        "before": [numbers(row["pass rate before"])[0] for row in rows],
        "after, mean of the seeds": [round(sum(seeds) / len(seeds), 1) for seeds in after],
    }
    labels = [f"{plain(row['method'])} ({row['trains']})" for row in rows]
    return bars(labels, series, "unseen prompts that pass (%)", dark=dark)


def record(name: str) -> dict[str, Any]:
    """Return the numbers of a committed experiment."""
    text = (RESULTS / name / "result.json").read_text(encoding="utf-8")
    return json.loads(text)["numbers"]  # type: ignore[no-any-return]


def memory(*, dark: bool = False) -> bytes:
    """Peak memory of a step over that of an evaluation, at the upper end where the table has a range."""
    rows = table("speed", "peak / evaluating")
    ratios = [max(numbers(row["peak / evaluating"])) for row in rows]
    labels = [textwrap.fill(plain(row["method"]), 34) for row in rows]
    return bars(labels, {"": ratios}, "peak memory over evaluating", mark=1, dark=dark)


def size(*, dark: bool = False) -> bytes:
    """Milliseconds of the parts of a run against the number of weights."""
    rows = table("notes/speed", "1040M")
    weights = [8.7e6, 97.5e6, 1040e6]
    labels = {
        "MeZO step": "MeZO step",
        "two forwards of 16 tokens": "two forwards of 16 tokens",
        "sweep": "one move of all weights",
        "journal record": "journal record",
    }
    lines = [
        Line(labels[row["ms"]], weights, [float(row[column].replace(",", "")) for column in ("8.7M", "97.5M", "1040M")])
        for row in rows
        if row["ms"] in labels
    ]
    panel = Panel("cost against model size", lines, "weights", "milliseconds, two CPU cores", log=True)
    return curves([panel], dark=dark)


def effective(*, dark: bool = False) -> bytes:
    """KerZOO's iterations over MeZO's to one loss, by what is made equal."""
    ratios = record("kerzoo/loss_curves")["iteration_ratios"]
    compared = {
        "the same learning rate": "same lr, over MeZO-3",
        "the same effective rate": "same effective lr, over MeZO-3",
        "each at its best rate": "best lrs and best variant, over MeZO-3",
    }
    values = [round(ratios[name][0], 2) for name in compared.values()]
    return bars(list(compared), {"": values}, "KerZOO's iterations over MeZO's to the same loss", mark=1, dark=dark)


def directions_per_step(*, dark: bool = False) -> bytes:
    """What P does: to the error of a run, and to its progress at equal forwards."""
    gaps = record("entk/horizon")["rows"]
    steps = sorted({row["T"] for row in gaps})
    errors = [
        Line(
            f"{count} step{'s' * (count > 1)}",
            [row["P"] for row in gaps if row["T"] == count],
            [row["gap"] for row in gaps if row["T"] == count],
        )
        for count in steps
    ]
    budget = [row for row in record("multi_query/budget")["rows"] if row["problem"] == "large quadratic"]
    labels = {("two-point", "best"): "best rate for each P", ("one-sided", "best"): "the same, one-sided"}
    labels[("two-point", "equal_rate")] = "the same rate for all P"
    progress = []
    for (scheme, column), name in labels.items():
        rows = [row for row in budget if row["scheme"] == scheme]
        progress.append(Line(name, [row["P"] for row in rows], [row[column][0] for row in rows]))
    shared: dict[str, Any] = {"xlabel": "directions per step, P", "log": True, "xticks": [1, 2, 4, 8, 16]}
    return curves(
        [
            Panel("distance to gradient descent", errors, ylabel="relative error", yticks=[0.5, 1, 2, 4, 8], **shared),
            Panel("equal forwards", progress, ylabel="progress over P = 1", yticks=[0.125, 0.25, 0.5, 1, 2], **shared),
        ],
        dark=dark,
    )


def forwards(*, dark: bool = False) -> bytes:
    """Training loss against forward passes, mean over seeds with the standard error."""
    runs = [json.loads(line) for line in (RESULTS / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    panels = []
    for task, title in {"sst2": "SST-2, all weights", "trec": "TREC, all weights"}.items():
        lines = []
        for method, rate in {"MeZO, batch 16": 3e-5, "auto, batch 16": None, "auto": None}.items():
            courses = [
                run[5] for run in runs if run[:3] == [task, "full", method] and run[4] > 0 and rate in (None, run[3])
            ]
            points = list(zip(*courses))
            lines.append(
                Line(
                    method if "batch" in method else f"{method}, batch 4",
                    [point[0][0] for point in points],
                    [statistics.mean(p[3] for p in point) for point in points],
                    [statistics.stdev(p[3] for p in point) / len(point) ** 0.5 for point in points],
                )
            )
        panels.append(Panel(title, lines, "forward passes of a batch", "training loss"))
    return curves(panels, dark=dark)


def long_runs(*, dark: bool = False) -> bytes:
    """Accuracy and loss on the validation headlines against example-forwards."""
    runs = [json.loads(line) for line in (RESULTS / "long_runs.jsonl").read_text(encoding="utf-8").splitlines()]
    panels = []
    for column, ylabel in {1: "accuracy", 2: "loss"}.items():
        lines = []
        for run in runs:
            per_step = run["budget"] / run["steps"]
            points = [(step * per_step, *values) for step, *values in run["validation"]]
            x, y = ([point[n] for point in points] for n in (0, column))
            lines.append(Line(run["method"], x, y))
        ticks = (0, 12_000, 24_000, 36_000)
        panels.append(Panel(f"validation {ylabel}", lines, "example-forwards", ylabel, xticks=ticks))
    return curves(panels, dark=dark)


FIGURES = {
    "queries": queries,
    "forwards": forwards,
    "long-runs": long_runs,
    "speed": speed,
    "memory": memory,
    "size": size,
    "gpu": gpu,
    "directions": directions,
    "rewards": rewards,
    "effective-rates": effective,
    "directions-per-step": directions_per_step,
}


def main() -> None:
    """Draw every figure, or those that are named."""
    for name in sys.argv[1:] or FIGURES:
        for dark in (False, True):
            path = IMAGES / f"{name}-{'dark' if dark else 'light'}.svg"
            path.write_bytes(FIGURES[name](dark=dark))
            print(path.relative_to(IMAGES.parents[1]))


if __name__ == "__main__":
    main()
