"""Answer new rows with a finished run: labels with scores, or texts.

zokernel predict --model runs/mine --file new.csv --output_file answers.csv
cut -f2 new.tsv | zokernel predict --model runs/mine
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from zokernel.commands.loading import add_loading_flags, loading_arguments
from zokernel.errors import UsageError
from zokernel.files import check_output_file, whole_file
from zokernel.readable import plural

SUFFIXES = (".csv", ".tsv", ".jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel predict``."""
    parser.add_argument(
        "--model", required=True, type=Path, help="the output_dir of a finished run, or one of its checkpoints"
    )
    parser.add_argument(
        "--file", default="-", help="rows to answer, in any format of --train_file; - reads lines of text or JSON"
    )
    parser.add_argument("--column_names", nargs="+", help="columns of a .csv or .tsv file without a header line")
    parser.add_argument(
        "--output_file", type=Path, help="rows with answers: .csv, .tsv or .jsonl (default: JSON lines, printed)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="rows per forward pass")
    add_loading_flags(parser, what="the run's model or base", default="that of the run")


def main(args: argparse.Namespace) -> int:
    """Answer the rows and return the exit code."""
    from zokernel.commands.messages import quiet_transformers
    from zokernel.finetune.predict import load_predictor
    from zokernel.finetune.predictor_record import read_record

    quiet_transformers()
    output = args.output_file
    if output is not None and output.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--output_file {output} is none of {', '.join(SUFFIXES)}: choose one of these endings.")
    source = None if args.file == "-" else Path(args.file).expanduser()
    if output is not None and source is not None and source.exists() and output.exists() and output.samefile(source):
        raise UsageError(f"--output_file {output} is the file that is read: name another.")
    if output is not None:
        check_output_file(output)
    if args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, not {args.batch_size}.")
    read_record(args.model)
    rows = read_rows(args.file, args.column_names)
    predictor = load_predictor(args.model, **loading_arguments(args))
    answers = predictor(rows, batch_size=args.batch_size)
    if output is None:
        write_rows(sys.stdout, rows, answers, ".jsonl")
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        write_rows(stream, rows, answers, output.suffix.lower())
    print(f"{plural(len(answers), 'answer')} in {output}.")
    return 0


def read_rows(file: str, column_names: Sequence[str] | None) -> list[Any]:
    """Return the rows of a file, or those on standard input: JSON objects, or lines of text.

    Raises:
        UsageError: If there are none, or the file cannot be read.
    """
    from zokernel.data import load_table

    if file != "-":
        return load_table(file, column_names=column_names)
    if sys.stdin.isatty():
        print("Type one row per line; end with Ctrl-D.", file=sys.stderr)
    lines = [line.rstrip("\r\n") for line in sys.stdin]
    rows = [_row(line) for line in lines if line.strip()]
    if not rows:
        raise UsageError("There are no rows on standard input: give --file, or write one row per line.")
    return rows


def _row(line: str) -> Any:
    if line.lstrip().startswith("{"):
        try:
            return json.loads(line)
        except ValueError:
            return line  # a text may begin with a brace
    return line


def write_rows(stream: TextIO, rows: Sequence[Any], answers: Sequence[dict[str, Any]], suffix: str) -> None:
    """Write each row with its answer; a column of the rows that is called as a part of the answers is ``input:NAME``.

    Args:
        stream: Where to.
        rows: The rows.
        answers: What a predictor returned for them.
        suffix: ``.csv``, ``.tsv`` or ``.jsonl``.  In a table, the score of each label has a column ``score:LABEL``.

    Example:
        >>> write_rows(sys.stdout, [{"text": "a joy"}], [{"prediction": "1", "scores": {"0": 0.1, "1": 0.9}}], ".csv")
        text,prediction,score:0,score:1
        a joy,1,0.1,0.9
    """
    table = suffix != ".jsonl"
    joined = _join(rows, [_flat(answer) for answer in answers] if table else answers)
    if not table:
        stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in joined)
        return
    names = list(dict.fromkeys(name for row in joined for name in row))
    writer = csv.DictWriter(stream, names, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
    writer.writeheader()
    writer.writerows(joined)


def _flat(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer with a column for the score of each label."""
    scores = {f"score:{label}": share for label, share in answer.get("scores", {}).items()}
    return {name: value for name, value in answer.items() if name != "scores"} | scores


def _join(rows: Sequence[Any], answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each row with its answer, under names that keep both."""
    records = [{"text": row} if isinstance(row, str) else row for row in rows]
    columns = dict.fromkeys(name for row in records for name in row)
    answer_columns = {name for answer in answers for name in answer}
    names = {}
    for name in columns:
        new = name
        while new in answer_columns or (new != name and new in columns):
            new = f"input:{new}"
        if new != name:
            names[name] = new
    if names:
        renames = ", ".join(f"{old!r} is {new!r}" for old, new in names.items())
        print(f"Columns with the names of answers are renamed: {renames}.", file=sys.stderr)
    return [
        {names.get(name, name): cell for name, cell in row.items()} | answer
        for row, answer in zip(records, answers, strict=True)
    ]
