"""Runs that are kept in a file, so that an experiment or benchmark of many hours goes on; the hash of their data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class KeptRuns:
    """Finished runs, in a file of one JSON line each if there is one.

    Args:
        path: The file; a new one is made when the first run is added.  None keeps runs in memory alone.

    Attributes:
        rows: The runs, in the order in which they ended.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "runs.jsonl"
        ...     _ = KeptRuns(path).add({"seed": 0, "loss": 0.5})
        ...     KeptRuns(path).find(seed=0), KeptRuns(path).find(seed=1)
        ({'seed': 0, 'loss': 0.5}, None)
    """

    def __init__(self, path: Path | None):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the run that has all of these values, None among them, or None if there is no such run."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a run, and return it."""
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row


def rows_sha256(rows: Iterable[Any]) -> str:
    """Return the first eight hexadecimal digits of the SHA-256 of rows, each written as JSON.

    Example:
        >>> rows_sha256([{"text": "good", "label": 1}])
        '66e12348'
    """
    from zokernel.data import tables

    return tables.rows_sha256(rows)[:8]
