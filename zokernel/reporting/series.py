"""How the series of a figure are told apart: each has a colour of its own, and a dash or a marker of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zokernel.figures import PALETTE
from zokernel.reporting.page import Series

# What a series is -> its colour's place in the palette, its dash, its marker. A band has dashed edges and no marker.
_LOOKS: dict[str, tuple[int, str, str]] = {
    "training": (0, "-", ""),
    "batches": (5, "", "."),
    "validation": (1, "--", "o"),
    "test": (2, "", "D"),
    "predicted": (3, "-.", ""),
    "predicted band": (4, ":", ""),
    "median": (6, "-", ""),
    "half": (0, "--", ""),
    "all": (5, ":", ""),
    "bound": (0, ":", ""),
}


def look(role: str) -> dict[str, Any]:
    """Return how matplotlib draws a series.

    Args:
        role: What it is: ``training``, ``validation`` and so on.

    Example:
        >>> look("validation")
        {'color': '#D55E00', 'linestyle': '--', 'marker': 'o'}
    """
    color, dash, marker = _LOOKS[role]
    return {"color": PALETTE[color], "linestyle": dash or "none", "marker": marker or "none"}


def band_look(role: str) -> dict[str, Any]:
    """Return how matplotlib fills between two lines, whose edges are dashed.

    Example:
        >>> band_look("all")["linestyle"]
        ':'
    """
    color, dash, _ = _LOOKS[role]
    return {"facecolor": f"{PALETTE[color]}4d", "edgecolor": PALETTE[color], "linestyle": dash, "linewidth": 1.0}


def series_of(figure: Any) -> list[Series]:
    """Return the series that a figure names, as they are drawn.

    Args:
        figure: A ``matplotlib.figure.Figure``.

    Example:
        >>> from zokernel.figures import figures
        >>> with figures() as Figure:
        ...     figure = Figure()
        ...     _ = figure.subplots().plot([0, 1], [1, 0], label="a line", **look("training"))
        ...     series_of(figure)
        [Series(panel=0, name='a line', color='#0072b2', shape='-')]
    """
    return [
        Series(panel, name, *_appearance(handle))
        for panel, axes in enumerate(figure.axes)
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    ]


def _appearance(handle: Any) -> tuple[str, str]:
    """Return the colour of a line, of points with error bars or of a band, and its dash and marker."""
    from matplotlib.colors import to_hex

    if isinstance(handle, Sequence):  # points with error bars
        handle = handle[0]
    if hasattr(handle, "get_marker"):
        parts = [handle.get_linestyle(), handle.get_marker()]
        return to_hex(handle.get_color()), "".join(part for part in parts if part not in ("None", "none", None))
    dash = handle.get_linestyle()[0][1]
    return to_hex(handle.get_facecolor()[0]), "band " + (" ".join(f"{length:g}" for length in dash) if dash else "-")
