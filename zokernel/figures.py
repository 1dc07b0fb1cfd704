"""One look for every figure: colour-blind safe, readable in print, no interactive backend needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zokernel.errors import MissingDependencyError
from zokernel.files import whole_file

# Okabe and Ito's palette: distinguishable with every common colour vision deficiency.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")

RC: Any = {
    "figure.dpi": 110,
    "figure.figsize": (6.4, 4.0),
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "zokernel",
}


@contextmanager
def figures() -> Iterator[Any]:
    """Yield ``matplotlib.figure.Figure`` with the house style set; figures made from it need no display.

    Example:
        >>> with figures() as Figure:
        ...     figure = Figure(layout="constrained")
        ...     _ = figure.subplots().plot([0, 1], [1, 0])
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report", "Drawing figures") from error
    from cycler import cycler

    with matplotlib.rc_context(RC | {"axes.prop_cycle": cycler(color=PALETTE)}):
        yield Figure


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure in the format that the file's name ends with, whole or not at all.

    Args:
        figure: A figure of matplotlib.
        path: File to create or replace.
        options: Those of ``savefig``.
    """
    with whole_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], **options)
