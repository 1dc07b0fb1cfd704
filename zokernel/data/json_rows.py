"""Rows from JSON in the layouts in which it is written: one object per line, a list, or columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError

_SPACE = re.compile(r"[ \t\r\n]*")


class _RepeatedKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return mapping


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def json_rows(text: str, path: Path, *, per_line: bool) -> tuple[list[dict[str, Any]], list[int]]:
    """Read rows from JSON text, whichever layout the file's ending promises.

    Objects may follow each other, one per line or indented over several.  A single value may be a list of objects, as
    ``json.dump`` writes a list of rows; an object with such a list under ``data``, as SQuAD is published; or an object
    of columns, as ``DataFrame.to_json`` and ``Dataset.to_dict`` give it.

    Args:
        text: The file's text.
        path: What it is called in messages.
        per_line: Whether one object is a row (``.jsonl``) rather than a mistake.

    Returns:
        The rows, and the line on which each begins (0: not known).

    Raises:
        UsageError: If the text is not JSON, holds no rows, or an object has a key twice.
    """
    values = list(_values(text, path))
    if len(values) == 1:
        line, value = values[0]
        table = value if isinstance(value, list) else None
        if isinstance(value, dict) and not per_line:
            table = value["data"] if _is_table(value.get("data")) else _from_columns(value)
            if table is None:
                raise UsageError(f"{path} must hold a list of JSON objects, one for each row.")
        if table is not None:
            values = [(line if item is value else 0, item) for item in table]
            if len(table) == 1:
                values = [(line, table[0])]
    for number, (line, value) in enumerate(values, start=1):
        if not isinstance(value, dict):
            where = f"Line {line} of {path}" if line else f"Item {number} of {path}"
            raise UsageError(f"{where} is not a JSON object: write one object for each row.")
    return [value for _, value in values], [line for line, _ in values]


def _values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the JSON values that follow each other, each with the line on which it begins."""
    position, line, line_position = 0, 1, 0
    while True:
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches everywhere
        line, line_position = line + text.count("\n", line_position, position), position
        if position == len(text):
            return
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            hint = (
                "write one object per line, and no comma between them" if text[error.pos : error.pos + 1] == "," else ""
            )
            wrong = _broken_line(text, position, line, error)
            raise UsageError(
                f"Line {wrong} of {path} is not JSON ({error.msg}): {hint or 'write one object per line'}."
            ) from error
        except _RepeatedKey as error:
            raise UsageError(
                f"The object on line {line} of {path} has the key {str(error)!r} twice: remove or rename one of them."
            ) from error
        except RecursionError as error:
            raise UsageError(f"Line {line} of {path} is nested too deeply: write one flat object per row.") from error
        yield line, value


def _broken_line(text: str, position: int, line: int, error: json.JSONDecodeError) -> int:
    """Return the line to mend: that of a value which lacks its end, where the decoder stumbles over the next one.

    Args:
        text: The file's text.
        position: Where the value begins.
        line: The line on which it begins.
        error: What the decoder says.

    Returns:
        ``line``, if a line holds one object at a time; otherwise the line that the decoder names, or the last
        one with text.
    """
    end = text.find("\n", position)
    value_line = text[position : len(text) if end < 0 else end].rstrip()
    starts_row = value_line.startswith("{") and value_line != "{"
    rest = text[end + 1 :].lstrip() if end >= 0 else ""
    if starts_row and (not rest or rest.startswith("{")):
        return line
    return min(error.lineno, 1 + text.rstrip().count("\n"))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _from_columns(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of a table written by columns; ``None`` if this is no such table."""
    columns = list(value.values())
    if columns and all(isinstance(column, dict) for column in columns):
        keys = list(columns[0])
        if all(key.isdigit() for key in keys) and all(list(column) == keys for column in columns):
            return [{name: value[name][key] for name in value} for key in keys]
    lists = len(columns) > 1 and all(isinstance(column, list) for column in columns)
    if lists and len({len(column) for column in columns}) == 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return None
