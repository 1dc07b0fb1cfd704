"""What the site needs beside its pages: formulas as MathML, so that pages need no script, and files of the root."""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
logger = logging.getLogger("mkdocs.hooks")
# Files of the root, where people look for them, that are pages too.
ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}


def root_page(text: str) -> str:
    """Return a file of the root with its links as they are within ``docs``.

    Example:
        >>> root_page("See [the layers](docs/architecture.md#layers) and [this](SECURITY.md).")
        'See [the layers](architecture.md#layers) and [this](security.md).'
    """
    for name, page in ROOT_PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text.replace("](docs/", "](")


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    """Add the pages that are files of the root."""
    for name, page in ROOT_PAGES.items():
        text = root_page((ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def browser_title(page: Any) -> str | None:
    """Return a title for the browser that tells pages of one name apart: the heading and the part of the site.

    Args:
        page: A page of mkdocs that has been rendered.

    Returns:
        The title, or None for pages that are the start of their part, or outside of every part.
    """
    if not page.ancestors or not page.toc.items:
        return None
    heading, part = html.unescape(page.toc.items[0].title), page.ancestors[-1].title
    return None if heading == part else f"{heading} ({part})"


def on_page_content(text: str, *, page: Any, **_: Any) -> str:
    """Convert every formula of a page; one that cannot be converted is a warning, and so an error of a strict build."""
    if title := browser_title(page):
        name = page.title
        page.meta.setdefault("title", title)
        page.title = name  # in the navigation, which would otherwise show the browser's title

    def replace(match: re.Match[str]) -> str:
        formula = html.unescape(match.group(2) or match.group(3)).strip()
        try:
            markup = convert(formula, display="inline" if match.group(2) else "block")
        except Exception as error:  # the converter raises its own and built-in errors
            logger.warning("%s: the formula %r cannot be converted: %s", page.file.src_path, formula, error)
            return match.group(0)
        return markup if match.group(2) else f'<span class="zk-block">{markup}</span>'

    return _FORMULA.sub(replace, text)
