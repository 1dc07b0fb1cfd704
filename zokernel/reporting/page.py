"""What a report page consists of, whatever run it is about; and how loose numbers become tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LONGEST_TABLE = 400
WIDE = 560.0  # points


@dataclass(frozen=True)
class Series:
    """What a figure's legend names.

    Attributes:
        panel: Number of the panel it is in.
        name: As the legend says.
        color: As ``#rrggbb``.
        shape: Dash and marker.
    """

    panel: int
    name: str
    color: str
    shape: str


@dataclass
class Picture:
    """A figure.

    Attributes:
        svg: The drawing, ready to stand in an HTML page.
        title: Short name, also that of the button that enlarges it.
        alt: What it shows, for those who cannot see it.
        caption: What to look for.
        series: What its legend names, if it was drawn for the page.
    """

    svg: str
    title: str
    alt: str
    caption: str = ""
    series: list[Series] = field(default_factory=list)

    @property
    def is_wide(self) -> bool:
        """Whether it has several panels side by side, and needs the whole width of the page."""
        box = re.search(r'viewBox="[\d.-]+ [\d.-]+ ([\d.]+)', self.svg)
        return box is not None and float(box.group(1)) > WIDE


@dataclass
class Cell:
    """One table cell: what is shown, and what it is sorted by."""

    text: str
    key: float | str

    @property
    def is_number(self) -> bool:
        """Whether it sorts (and is aligned) as a number."""
        return isinstance(self.key, float)


@dataclass
class Table:
    """A table; every row has one cell for each column."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""
    numeric: list[bool] = field(default_factory=list)


@dataclass
class Section:
    """A part of the page with a heading.

    Attributes:
        title: The heading.
        anchor: Unique in the page.
        text: Paragraphs.
        items: A numbered list after them.
        pictures: Figures.
        tables: Tables.
        samples: Texts side by side, each sample a list of names and texts.
        command: What repeats this part.
    """

    title: str
    anchor: str
    text: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    samples: list[list[tuple[str, str]]] = field(default_factory=list)
    command: str = ""


@dataclass
class Page:
    """A whole report.

    Attributes:
        title: Heading of the page.
        kind: ``finetune``, ``plan``, ``kernel``, ``evolve`` or ``reproduce``.
        summary: Plain words, a paragraph each.
        facts: The few numbers that matter most, by name.
        sections: The rest.
        command: What repeats the run.
        made_with: Versions, in one line.
        alert: That something went wrong, in plain words; empty if nothing did.
    """

    title: str
    kind: str
    summary: list[str]
    facts: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    command: str = ""
    made_with: str = ""
    alert: str = ""


def cell(value: Any) -> Cell:
    """Return a value as a table cell: numbers to four digits, an interval as ``mean [low, high]``.

    Example:
        >>> cell(0.123456).text, cell([1.0, 0.5, 1.5]).text, cell(None).text
        ('0.1235', '1 [0.5, 1.5]', '')
    """
    if value is None or isinstance(value, (bool, str)):
        text = "" if value is None else ("yes" if value else "no") if isinstance(value, bool) else value
        return Cell(text, text.lower())
    if isinstance(value, (int, float)):
        return Cell(number(value), float(value))
    if _is_interval(value):
        return Cell(f"{number(value[0])} [{number(value[1])}, {number(value[2])}]", float(value[0]))
    if isinstance(value, dict):
        parts = [f"{key}: {cell(item).text}" for key, item in value.items()]
    else:
        parts = [cell(item).text for item in value]
    text = ", ".join(parts[:12]) + (", ..." if len(parts) > 12 else "")
    return Cell(text, text.lower())


def number(value: float) -> str:
    """Format a number: whole ones in full with thin groups, others to four significant digits.

    Example:
        >>> number(134515008), number(0.00012345), number(float("inf"))
        ('134,515,008', '0.0001234', 'inf')
    """
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value)
        and value[1] <= value[0] <= value[2]
    )


def table_of_rows(title: str, rows: Iterable[dict[str, Any]], note: str = "") -> Table:
    """Make a table of dictionaries; a key that some of them lack is an empty cell."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    body = [[cell(row.get(column)) for column in columns] for row in rows[:LONGEST_TABLE]]
    if len(rows) > LONGEST_TABLE:
        note = f"{note} The first {LONGEST_TABLE} of {len(rows)} rows.".strip()
    return Table(title, [words(column) for column in columns], body, note)


def words(name: str) -> str:
    """Turn a key into words.

    Example:
        >>> words("measured_over_predicted")
        'measured over predicted'
    """
    return str(name).replace("_", " ")


def tables_of(numbers: dict[str, Any]) -> list[Table]:
    """Make tables of whatever an experiment recorded.

    Args:
        numbers: JSON: scalars, intervals, lists of rows, and dictionaries of these.

    Returns:
        One table of the scalars, then one for each structure.
    """
    tables: list[Table] = []
    loose: list[dict[str, Any]] = []
    for name, value in numbers.items():
        if _is_rows(value):
            tables.append(table_of_rows(words(name), value))
        elif isinstance(value, dict) and value:
            tables += _tables_of_dict(words(name), value)
        else:
            loose.append({"quantity": words(name), "value": value})
    return ([table_of_rows("Numbers", loose)] if loose else []) + tables


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _tables_of_dict(title: str, value: dict[str, Any]) -> list[Table]:
    if all(isinstance(item, dict) for item in value.values()):
        return [table_of_rows(title, ({"": name, **item} for name, item in value.items()))]
    columns = [item for item in value.values() if isinstance(item, list) and not _is_rows(item)]
    aligned = len(columns) == len(value) and len({len(column) for column in columns}) == 1 and len(columns[0]) > 1
    if aligned and not all(map(_is_interval, columns)):
        return [table_of_rows(title, (dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)))]
    tables = [
        table
        for name, item in value.items()
        if _is_rows(item)
        for table in [table_of_rows(f"{title}: {words(name)}", item)]
    ]
    rest = [{"": words(name), "value": item} for name, item in value.items() if not _is_rows(item)]
    return ([table_of_rows(title, rest)] if rest else []) + tables
