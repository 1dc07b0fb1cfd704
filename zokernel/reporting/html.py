"""From a page to one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from zokernel._version import __version__
from zokernel.errors import MissingDependencyError, UsageError
from zokernel.files import write_text
from zokernel.reporting.page import Page

VERDICT_CLASSES = {"holds": "good", "holds under conditions": "some", "does not hold": "bad", "not run here": "none"}


def read_run(folder: Path) -> Page:
    """Return the page of whatever run a folder (or a plan's ``.json`` file) holds.

    Args:
        folder: ``output_dir`` of ``finetune``, ``kernel``, ``evolve`` or ``reproduce``, or where a plan was written.

    Returns:
        The page.

    Raises:
        UsageError: If it holds no run of zokernel.
    """
    from zokernel.experiments.run_page import is_reproduce, read_reproduce
    from zokernel.reporting.plan_page import load_json, read_evolve, read_kernel, read_plan
    from zokernel.reporting.training import find_plan, is_training
    from zokernel.reporting.training_page import read_finetune

    if folder.is_file() and folder.suffix == ".json":
        record = load_json(folder)
        if "plan" in record:
            return read_plan(record)
    if not folder.is_dir():
        raise UsageError(f"There is no run in {folder}: give the output_dir of a run, or the file of a plan.")
    if is_training(folder):
        return read_finetune(folder)
    if is_reproduce(folder):
        return read_reproduce(folder)
    for name, reader in (("evolution.json", read_evolve), ("kernel.json", read_kernel)):
        if (folder / name).is_file():
            return reader(load_json(folder / name))
    plan = find_plan(folder)
    if plan is not None:
        return read_plan(plan)
    raise UsageError(
        f"{folder} holds no run of zokernel: give the output_dir of finetune, kernel, evolve or reproduce."
    )


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


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        folder: The run.
        target: The file; ``report.html`` in the folder when not given.

    Returns:
        The file written.
    """
    target = target or (folder if folder.is_dir() else folder.parent) / "report.html"
    text = render(read_run(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return target
