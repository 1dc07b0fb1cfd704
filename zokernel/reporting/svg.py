"""Drawings inside a page: matplotlib's SVG made small, unique in its ids, and at home on light and dark paper."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zokernel.figures import PALETTE, figures
from zokernel.reporting.page import Picture
from zokernel.reporting.series import series_of

_PROLOG = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", re.DOTALL)
_SCRIPTS = re.compile(r"<script\b.*?</script\s*>|\son\w+\s*=\s*(\"[^\"]*\"|'[^']*')", re.DOTALL | re.IGNORECASE)
_PATH = re.compile(r'(?<=\sd=")[^"]*')
_LONG_NUMBER = re.compile(r"(-?\d+\.\d{2})\d+")
_OPEN_TAG = re.compile(r"<svg\b[^>]*>")
_SERIES = {color.lower(): f"var(--series-{number})" for number, color in enumerate(PALETTE, 1) if color != "#000000"}
_VIEW_BOX = re.compile(r'viewBox="([^"]+)"')


def inline_svg(text: str, prefix: str, *, title: str, alt: str) -> str:
    """Return an SVG document as an element for a page.

    Args:
        text: The file's text, as matplotlib writes it.
        prefix: Unique in the page; every id in the drawing gets it.
        title: Its name, for screen readers.
        alt: What it shows.

    Returns:
        An ``<svg>`` without scripts, sizes or metadata; black, white and the palette follow the page's colours, and
        coordinates keep two decimals.
    """
    text = _SCRIPTS.sub("", _PROLOG.sub("", text))
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"#ffffff\b", "var(--paper)", text)
    text = re.sub(r"#000000\b|#262626\b", "currentColor", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda color: _SERIES.get(color.group(), color.group()), text)
    text = _PATH.sub(lambda path: _LONG_NUMBER.sub(r"\1", path.group()), text)
    box = _VIEW_BOX.search(text)
    opening = (
        f'<svg viewBox="{box.group(1) if box else "0 0 640 400"}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{html.escape(title)}</title><desc id="{prefix}-desc">{html.escape(alt)}</desc>'
    )
    return re.sub(r">\s+<", "><", _OPEN_TAG.sub(lambda _: opening, text, count=1)).strip()


def read_svg(path: Path, prefix: str, *, title: str, alt: str, caption: str = "") -> Picture:
    """Return a saved SVG file as a picture."""
    return Picture(inline_svg(path.read_text(encoding="utf-8"), prefix, title=title, alt=alt), title, alt, caption)


def draw(
    paint: Callable[[Any], None],
    prefix: str,
    *,
    title: str,
    alt: str,
    caption: str = "",
    size: tuple[float, float] = (4.8, 3.6),
) -> Picture:
    """Draw a picture with matplotlib; below it stands a legend of all series, which covers none of them.

    Args:
        paint: Receives the empty figure.
        prefix: Unique in the page.
        title: Short name.
        alt: What it shows.
        caption: What to look for.
        size: Width and height in inches.

    Returns:
        The picture.
    """
    stream = io.StringIO()
    with figures() as Figure:
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        series = series_of(figure)
        if series:
            figure.legend(loc="outside lower center", ncols=2, fontsize=9, columnspacing=1.2, handlelength=2.6)
        figure.savefig(stream, format="svg")
    return Picture(inline_svg(stream.getvalue(), prefix, title=title, alt=alt), title, alt, caption, series)
