"""The figure of KerZOO's comparison on language models: the test loss of every seed, line by line."""

from __future__ import annotations

from typing import Any

import numpy as np

from zokernel.experiments.kerzoo.methods import MATCHED
from zokernel.figures import figures

HIGHEST = 4  # times the loss before training: losses above it are written at the top


def draw(grouped: dict[str, list[dict[str, Any]]]) -> Any:
    """Draw the test loss of every seed and their median, one panel per comparison.

    Args:
        grouped: The numbers of every line, by comparison.
    """
    with figures() as Figure:
        width = max(4.4, 0.9 * max(map(len, grouped.values())))
        figure = Figure(figsize=(width, 3.2 * len(grouped)), layout="constrained")
        for axis, (name, chosen) in zip(figure.subplots(len(grouped), squeeze=False).flat, grouped.items()):
            _draw_panel(axis, name, chosen)
    return figure


def _draw_panel(axis: Any, name: str, rows: list[dict[str, Any]]) -> None:
    top = HIGHEST * rows[0]["test_loss_before"]
    for position, row in enumerate(rows):
        color, losses = f"C{position % 5}", np.array(row["test_loss"])
        inside, outside = losses[losses <= top], losses[losses > top]
        axis.plot([position] * len(inside), inside, "o", color=color, alpha=0.7)
        median = np.median(losses)
        axis.plot([position - 0.2, position + 0.2], [median] * 2, color=color, scaley=median <= top)
        if len(outside):
            axis.plot(position, 0.97, "^", color=color, transform=axis.get_xaxis_transform())
            values = ", ".join(f"{loss:,.4g}" for loss in sorted(outside))
            axis.annotate(
                values,
                (position, 0.97),
                (6, -3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=7,
            )
    axis.axhline(rows[0]["test_loss_before"], color="#999999", linestyle=":", label="before training")
    costs = [f"{row['forwards']:,}" if row["forwards"] else "diverged" for row in rows]
    ticks = [f"{_two_lines(row['method'])}\n{cost}" for row, cost in zip(rows, costs)]
    axis.set_xticks(range(len(rows)), ticks, fontsize=7)
    axis.set(
        xlabel="forward passes below each name",
        ylabel="test loss",
        title=f"{name}, a dot per seed, a line at the median",
    )
    axis.legend()


def _two_lines(method: str) -> str:
    """Return the name of a line in two lines of text."""
    if method == MATCHED:
        return "MeZO-3,\nKerZOO's rate"
    name, _, best_rate = method.partition(", ")
    name, _, variant = name.partition(" as ")
    first = f"{name} as" if variant else name
    return f"{first}\n{', '.join(part for part in (variant, best_rate) if part)}"
