"""Tables from a user's own files or from a data-set hub id, as lists of plain dictionaries."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zokernel.data.sources import SOURCES, fetch
from zokernel.errors import MissingDependencyError, RunError, UsageError, first_line

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def load_table(path: str | Path, *, column_names: Sequence[str] | None = None) -> list[Row]:
    """Read a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file.

    Tab-separated files are read without quoting, as SST-2 and its kin are written.

    Args:
        path: The file.
        column_names: Names of the columns of a ``.csv`` or ``.tsv`` file that has no header line.

    Returns:
        One dictionary a row.

    Raises:
        UsageError: If the file is missing, empty, of another kind, or cannot be parsed.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"There is no file {path}: check the path (it is relative to {Path.cwd()}).")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} is none of {', '.join(SUFFIXES)}: convert it, or rename it to what it is.")
    try:
        rows = _READERS[path.suffix](path, column_names)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8.") from error
    if not rows:
        raise UsageError(f"{path} has no rows: training needs at least one example.")
    return rows


def load_rows(name: str, split: str, *, config: str | None = None, revision: str | None = None) -> list[Row]:
    """Load a split of a data set by name: one that ``zokernel fetch`` knows, or a Hugging Face hub id or local folder.

    Args:
        name: ``movie-reviews``, a hub id such as ``nyu-mll/glue``, or a local data-set folder.
        split: ``train``, ``validation`` or ``test``.
        config: Configuration of the hub data set, such as ``sst2``.
        revision: Branch, tag or commit of the hub data set.

    Returns:
        One dictionary a row.

    Raises:
        UsageError: If there is no such split or data set.
        RunError: If the hub cannot be reached.
    """
    if name in SOURCES:
        path = fetch(name) / f"{split}.jsonl"
        if not path.exists():
            raise UsageError(f"{name} has no split {split!r} of sentences: movie-reviews has train, validation, test.")
        return load_table(path)
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "finetune", f"Loading {name}") from error
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision).to_list()
    except ValueError as error:
        raise UsageError(f"{name} could not be loaded as split {split!r}: {first_line(error)}") from error
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        raise RunError(
            f"Data set {name!r} could not be loaded ({first_line(error)}): give 'movie-reviews', a local folder, "
            "a hub id that can be reached, or your own file with --train_file."
        ) from error


def _read_jsonl(path: Path, column_names: Sequence[str] | None) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"Line {number} of {path} is not JSON ({error.msg}): write one object a line."
                ) from error
            if not isinstance(row, dict):
                raise UsageError(f"Line {number} of {path} is not a JSON object: write one object a line.")
            rows.append(row)
    return rows


def _read_json(path: Path, column_names: Sequence[str] | None) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8") or "[]")
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON (line {error.lineno}: {error.msg}).") from error
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]  # as SQuAD is published
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} must hold a list of JSON objects.")
    return rows


def _read_delimited(path: Path, column_names: Sequence[str] | None, *, delimiter: str, quoting: int) -> list[Row]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8", newline="") as stream:
        lines = csv.reader(stream, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
        header = list(column_names) if column_names else next(lines, [])
        rows = []
        for line in lines:
            if not line:
                continue
            if len(line) != len(header):
                raise UsageError(
                    f"Line {lines.line_num} of {path} has {len(line)} columns where {len(header)} were expected "
                    f"({', '.join(header)}): fix it, or name the columns with --column_names."
                )
            rows.append(dict(zip(header, line)))
    return rows


def _read_csv(path: Path, column_names: Sequence[str] | None) -> list[Row]:
    return _read_delimited(path, column_names, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path, column_names: Sequence[str] | None) -> list[Row]:
    return _read_delimited(path, column_names, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path: Path, column_names: Sequence[str] | None) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "finetune", f"Reading {path}") from error
    return pyarrow.parquet.read_table(path).to_pylist()


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def resolve_model_path(name_or_path: str) -> str:
    """Return what ``from_pretrained`` should be given: the fetched folder for a known name, otherwise the name itself.

    Args:
        name_or_path: ``smollm2``, a local folder or a Hugging Face hub id.

    Returns:
        A local folder or a hub id.
    """
    if name_or_path in SOURCES and not Path(name_or_path).exists():
        return str(fetch(name_or_path))
    return name_or_path


__all__ = ["Row", "load_rows", "load_table", "resolve_model_path"]
