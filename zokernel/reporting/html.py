"""One self-contained HTML file from a page."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from zokernel._version import __version__
from zokernel.errors import MissingDependencyError
from zokernel.files import write_text
from zokernel.reporting.page import Page

VERDICT_CLASSES = {
    "holds": "good",
    "holds under conditions": "some",
    "does not hold": "bad",
    "not resolved": "open",
    "not run here": "none",
}


def render(page: Page) -> str:
    """Return the HTML of a page; it loads nothing and runs no script but its own.

    Raises:
        MissingDependencyError: If jinja2 is not installed.
    """
    return _template("page.html.j2").render(
        page=_with_numeric_columns(page),
        style=read_asset("style.css"),
        verdict_classes=VERDICT_CLASSES,
        **script_of(read_asset("page.js")),
    )


def script_of(text: str) -> dict[str, str]:
    """Return a script with the hash that a content security policy allows it by, and our version."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"script": text, "script_hash": f"'sha256-{digest}'", "version": __version__}


def read_asset(name: str) -> str:
    """Return the text of a file beside the templates."""
    return files("zokernel.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def _with_numeric_columns(page: Page) -> Page:
    for section in page.sections:
        for table in section.tables:
            columns: Any = zip(*table.rows, strict=True) if table.rows else [[] for _ in table.columns]
            table.numeric = [bool(column) and all(c.is_number or not c.text for c in column) for column in columns]
    return page


def _template(name: str) -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("jinja2", "report", "Making a report") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(read_asset(name))


def render_template(name: str, **values: Any) -> str:
    """Return another template of ours, filled in."""
    return _template(name).render(**values)


def write_report(page: Page, target: Path) -> None:
    """Write a page as one file, creating its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, render(page))
