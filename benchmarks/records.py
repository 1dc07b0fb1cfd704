"""Finished runs of a benchmark, kept in a file of one JSON line each, so that it may be stopped and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Records:
    """Finished runs, one JSON line each.

    Args:
        path: The file; a new one is made when the first run is added.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the row with these values."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
