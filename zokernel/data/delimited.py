"""Rows from text with a delimiter: ``.csv`` with quotes, and ``.tsv`` with or without."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError
from zokernel.readable import plural

logger = logging.getLogger(__name__)

_END = "\0the end\0"


def csv_rows(text: str, path: Path, column_names: Sequence[str] | None) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a ``.csv`` file: quotes as in RFC 4180, and the delimiter of its header line (comma, semicolon, tab or bar).

    Args:
        text: The file's text.
        path: What it is called in messages.
        column_names: Names of the columns of a file that has no header line.

    Returns:
        The rows, and the line on which each begins.

    Raises:
        UsageError: If a line has too many or too few cells, a column is there twice, a quote is never closed, or the
            first line is ``column_names``.
    """
    text, delimiter = _delimiter(text, len(column_names) if column_names else None)
    if delimiter != ",":
        logger.info("%s: its columns are separated by %r.", path, delimiter)
    return _table(_cells(text, path, delimiter, csv.QUOTE_MINIMAL), path, column_names)


def tsv_rows(text: str, path: Path, column_names: Sequence[str] | None) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a ``.tsv`` file, with quotes if that is how the whole of it was written; see :func:`written_with_quotes`."""
    quoted = written_with_quotes(text)
    if quoted:
        logger.info("%s: quotes are read as pandas and Excel write them.", path)
    elif '"' in text:
        logger.info("%s: quotes are kept as text, since the file was not written with quoting.", path)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return _table(_cells(text, path, "\t", quoting), path, column_names)


def written_with_quotes(text: str) -> bool:
    r"""Whether tab-separated text was written with quoting, as far as all of its quotes together tell.

    Writers that quote (pandas, Excel, Python's csv) leave no quote in a bare cell, double every quote within a quoted
    one, and close it before the next tab or line end.  They quote a cell for a reason (a quote, tab, line break, comma
    or semicolon in it), or quote all cells of a column.  Benchmarks such as SST-2 were written without quoting: there
    a cell may begin with a quote, or hold one.

    Example:
        >>> written_with_quotes('sentence\tlabel\n"he said ""wow"" twice"\t0\na bore\t0\n')
        True
        >>> written_with_quotes('sentence\tlabel\n"wow" is all i can say\t1\na bore\t0\n')
        False
    """
    if '"' not in text:
        return False
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(text, newline="")
    unquoted: Counter[int] = Counter()
    needless_quotes: Counter[int] = Counter()
    any_quoted = False
    try:
        widths = {len(cells) for cells in csv.reader(lines, delimiter="\t", strict=True)}
    except csv.Error:
        return False
    if len(widths - {0}) > 1:
        return False
    for number, cells in enumerate(_raw_cells(text)):
        for column, cell in enumerate(cells):
            if not cell.startswith('"'):
                if '"' in cell:
                    return False
                unquoted[column] += bool(cell) and number > 0
            else:
                any_quoted = True
                needless_quotes[column] += not any(sign in cell[1:-1] for sign in '"\t\r\n,;') and number > 0
    return any_quoted and not any(needless_quotes[column] and unquoted[column] for column in needless_quotes)


def _raw_cells(text: str) -> Iterator[list[str]]:
    """Yield the cells of each record as they are written, with their quotes; the text parses strictly."""
    record, cell, inside = [], "", False
    for line in io.StringIO(text, newline=""):
        for n, piece in enumerate(line.rstrip("\r\n").split("\t")):
            if n and inside:
                cell += "\t" + piece
            elif n:
                record.append(cell)
                cell = piece
            else:
                cell = cell + piece if inside else piece
            inside = cell.startswith('"') and cell.count('"') % 2 == 1
        if inside:
            cell += "\n"
            continue
        yield [*record, cell]
        record, cell = [], ""


def _delimiter(text: str, width: int | None) -> tuple[str, str]:
    """Return the text without Excel's line ``sep=;``, and the delimiter: what the first line is divided by."""
    first, _, rest = text.partition("\n")
    if len(first.rstrip("\r")) == 5 and first.lower().startswith("sep="):
        return "\n" + rest, first[4]  # the blank line keeps the count of lines right
    unquoted = "".join(first.split('"')[::2])  # what is not quoted
    for sign in "," if "," in unquoted else ";\t|":
        if sign in unquoted and width in (None, unquoted.count(sign) + 1):
            return text, sign
    return text, ","


def _cells(text: str, path: Path, delimiter: str, quoting: int) -> Iterator[tuple[int, list[str]]]:
    """Yield every record that is not blank, with the line on which it begins."""
    csv.field_size_limit(2**31 - 1)
    # A quote that is never closed swallows the line that is added here.
    lines = chain(io.StringIO(text if text.endswith(("\n", "\r")) else text + "\n", newline=""), [_END])
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    first_line = 1
    for cells in reader:
        if cells == [_END]:
            return
        if cells and _END in cells[-1]:
            raise UsageError(
                f"A quote that opens on line {first_line} of {path} is never closed: close it, or double it if it is "
                "text."
            )
        if any(cell.strip() for cell in cells):
            yield first_line, cells
        first_line = reader.line_num + 1


def _table(
    records: Iterator[tuple[int, list[str]]], path: Path, column_names: Sequence[str] | None
) -> tuple[list[dict[str, Any]], list[int]]:
    header = list(column_names) if column_names else [name.strip() for name in next(records, (0, []))[1]]
    refuse_repeated(header, path)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for line, cells in records:
        if column_names and not rows and [cell.strip() for cell in cells] == header:
            raise UsageError(
                f"Line {line} of {path} is the header that --column_names repeats: leave the flag out, since the file "
                "names its columns."
            )
        if len(cells) != len(header):
            raise UsageError(
                f"Line {line} of {path} has {plural(len(cells), 'column')} where {len(header)} were expected "
                f"({', '.join(header)}): fix it, or name the columns with --column_names."
            )
        # A column without a name, such as the index that pandas writes, cannot be asked for.
        rows.append({name: cell for name, cell in zip(header, cells, strict=True) if name})
        lines.append(line)
    return rows, lines


def refuse_repeated(names: Sequence[str], path: Path) -> None:
    """Refuse a table with two columns of one name.

    Raises:
        UsageError: If there are such; the message names them.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        raise UsageError(
            f"{path} has the column {', '.join(map(repr, repeated))} more than once: remove or rename all but one."
        )
