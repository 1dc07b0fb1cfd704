"""Files as people bring them: encodings, compression, quotes, layouts of JSON, and what is refused with which words."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import lzma

import pytest

from zokernel.data import load_table
from zokernel.errors import UsageError

ROWS = [{"text": 'she said "no, never"', "label": "0"}, {"text": "très bon 😀", "label": "1"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'text,label\n"she said ""no, never""",0\ntrès bon 😀,1\n'
TSV = 'text\tlabel\nshe said "no, never"\t0\ntrès bon 😀\t1\n'


def table(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_table(path)


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", JSONL), ("a.json", json.dumps(ROWS)), ("a.csv", CSV), ("a.tsv", TSV)]
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "crlf"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, name, text, encoding):
    data = text.replace("\n", "\r\n").encode() if encoding == "crlf" else text.encode(encoding)
    assert table(tmp_path / name, data) == ROWS


def test_utf16_may_be_of_either_byte_order(tmp_path):
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        assert table(tmp_path / "a.csv", mark + CSV.encode(encoding)) == ROWS


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL", "a.csv", "a.CSV", "a.Tsv", "a.tsv", "a.parquet", "a.Parquet"]
)
@pytest.mark.parametrize("ending", ["", ".gz", ".GZ", ".bz2", ".xz"])
def test_every_ending_and_compression_gives_the_same_rows(tmp_path, name, ending):
    import pyarrow
    import pyarrow.parquet

    kind = name.lower().rpartition(".")[2]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    data = {"csv": CSV.encode(), "tsv": TSV.encode(), "parquet": buffer.getvalue()}.get(kind, JSONL.encode())
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending.lower()]
    assert table(tmp_path / (name + ending), pack(data)) == ROWS


def test_the_content_tells_whether_a_file_is_compressed(tmp_path):
    assert table(tmp_path / "a.jsonl", gzip.compress(JSONL.encode())) == ROWS
    assert table(tmp_path / "b.jsonl.gz", JSONL) == ROWS
    with pytest.raises(UsageError, match="damaged or cut off"):
        table(tmp_path / "c.csv.gz", gzip.compress(CSV.encode())[:-9])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize(
    "text",
    [
        JSONL,
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n\n".join(json.dumps(row, indent=2) for row in ROWS),
        "\n" + JSONL.replace("\n", "\n\n"),
    ],
)
def test_json_is_read_in_every_layout(tmp_path, name, text):
    assert table(tmp_path / name, text) == ROWS


def test_json_columns_and_published_data(tmp_path):
    columns = {"text": {"0": "a", "5": "b"}, "label": {"0": 1, "5": 0}}  # DataFrame.to_json() after a filter
    assert table(tmp_path / "a.json", json.dumps(columns)) == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert table(tmp_path / "b.json", json.dumps({"version": "1", "data": ROWS})) == ROWS
    lists = {"text": ["a", "b"], "label": [1, 0]}  # Dataset.to_dict()
    assert table(tmp_path / "d.json", json.dumps(lists)) == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    with pytest.raises(UsageError, match="must hold a list"):
        table(tmp_path / "e.json", json.dumps({"text": ["a", "b"], "label": [1]}))
    row = {"messages": [{"role": "user", "content": "hi"}]}
    assert table(tmp_path / "c.jsonl", json.dumps(row)) == [row]


def test_rows_know_their_line_numbers(tmp_path):
    assert table(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a":\n2}\n{"a": 3}').lines == [2, 4, 6]
    assert table(tmp_path / "a.csv", 'a,b\n"x\ny",1\n\n,\nz,2\n').lines == [2, 6]
    assert table(tmp_path / "b.csv", "sep=;\na;b\nx;1\n").lines == [3]


def test_plain_text_is_one_row_per_line_that_is_not_blank(tmp_path):
    rows = table(tmp_path / "a.txt", "one  two \r\n\r\n \u2028three\n\n'four'")
    assert rows == [{"text": "one  two "}, {"text": " \u2028three"}, {"text": "'four'"}]
    assert rows.lines == [1, 3, 5]


def test_half_of_a_surrogate_pair_is_replaced_and_counted_once(tmp_path, caplog):
    text = '{"text": "half \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n{"text": ["\\ude00", {"\\uD800x": 1}]}\n'
    with caplog.at_level(logging.WARNING):
        rows = table(tmp_path / "a.jsonl", text)
    assert rows == [{"text": "half \ufffd"}, {"text": "whole 😀"}, {"text": ["\ufffd", {"\ufffdx": 1}]}]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "2 rows have half of a surrogate pair (text cut inside an emoji); it is replaced by U+FFFD."
    ]


QUOTED = [
    {"text": 'he said "wow"', "label": "0"},
    {"text": "tab\there", "label": "1"},
    {"text": "two\nlines", "label": "0"},
    {"text": "plain", "label": "1"},
    {"text": '"', "label": "1"},
    {"text": "", "label": "1"},
]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_a_tsv_written_with_quotes_is_read_back(tmp_path, quoting):
    with (tmp_path / "a.tsv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"], delimiter="\t", quoting=quoting)
        writer.writeheader()
        writer.writerows(QUOTED)
    assert load_table(tmp_path / "a.tsv") == QUOTED


def test_a_tsv_written_by_pandas_is_read_back(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(QUOTED).to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert load_table(tmp_path / "a.tsv") == QUOTED


def test_excel_quotes_cells_with_commas_in_its_tab_delimited_files(tmp_path):
    assert table(tmp_path / "a.tsv", 'text\tlabel\n"dull, mean"\t0\nfine\t1\n')[0]["text"] == "dull, mean"


@pytest.mark.parametrize(
    "first",
    [
        'a "quoted" word',  # a quote in a bare cell
        '"wow" is all i can say',  # text after the closing quote
        '"wow',  # never closed
        '"wow"',  # needlessly quoted, where other cells are bare
    ],
)
def test_a_tsv_written_without_quotes_keeps_them(tmp_path, first, caplog):
    with caplog.at_level(logging.INFO):
        rows = table(tmp_path / "a.tsv", f"text\tlabel\n{first}\t0\nplain\t1\n")
    assert rows == [{"text": first, "label": "0"}, {"text": "plain", "label": "1"}]
    assert "quotes are kept as text" in caplog.text


def test_published_tsv_files_are_read_as_they_are(shared_data):
    for name in ("sst2/train.tsv", "sst2/dev.tsv", "rte/train.tsv", "rte/dev.tsv"):
        text = (shared_data / name).read_text(encoding="utf-8")
        header, *lines = [line.split("\t") for line in text.rstrip("\n").split("\n")]
        assert load_table(shared_data / name) == [dict(zip(header, line, strict=True)) for line in lines]


def test_csv_dialects_are_read(tmp_path):
    rows = [{"text": "a, b", "label": "1"}, {"text": "c", "label": "0"}]
    assert table(tmp_path / "a.csv", "text;label\na, b;1\nc;0\n") == rows
    assert table(tmp_path / "b.csv", "text\tlabel\na, b\t1\nc\t0\n") == rows
    assert table(tmp_path / "f.csv", "text|label\na, b|1\nc|0\n") == rows
    assert table(tmp_path / "c.csv", 'sep=;\r\ntext;label\r\n"a, b";1\r\nc;0\r\n') == rows
    assert table(tmp_path / "d.csv", ',text, label,\n0,"a, b",1,\n1,c,0,\n,,,\n') == rows  # pandas' index; Excel's ends
    assert table(tmp_path / "e.csv", "text\na; b\nc\td\n") == [{"text": "a; b"}, {"text": "c\td"}]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("lines", "broken"),
    [
        (["{}", "{"], 2),
        (["{}", "{", ""], 2),
        (["{}", "{", "{}"], 2),
        (["{}", "{", "{}", "{}"], 2),
        (["", "{}", "", "{", "", "{}", ""], 4),
        (["{", "{}"], 1),
        (["{}", '{"a": [1}', "{}"], 2),
        (["{}", '{"a": 1,', "{}"], 2),
        (["{}", '{"a":', "{}"], 2),
        (["{}", "[1,", ""], 2),
        (['{"a":', "1", '"b": 2}'], 3),  # one object over several lines
    ],
)
def test_a_broken_line_of_json_is_named_by_its_number(lines, broken, end, tmp_path):
    row = {"{}": '{"text": "a {b}", "label": 0}', "{": '{"text": "a", "label": 1'}
    content = end.join(row.get(line, line) for line in lines)
    with pytest.raises(UsageError, match=rf"^Line {broken} of .* is not JSON"):
        table(tmp_path / "a.jsonl", content)


def test_a_huge_cell(tmp_path):
    assert len(table(tmp_path / "a.csv", f"text,label\n{'x' * 300_000},1\n")[0]["text"]) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", "text,label,label\na,0,1\n", r"has the column 'label' more than once"),
        ("a.tsv", "text\ttext\tlabel\na\tb\t1\n", r"has the column 'text' more than once"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "text": "c"}\n', "line 2 .* has the key 'text' twice"),
        ("a.json", '[{"text": "a"},\n {"label": 0, "label": 1}]', "has the key 'label' twice"),
        ("a.jsonl", '{"a": 1},\n{"a": 2}\n', "Line 1 .* is not JSON .* no comma between them"),
        ("a.jsonl", '{"a": 1}\n{"a": "cut', "Line 2 .* is not JSON"),
        ("a.jsonl", '{"a": 1}\n"b"\n', "Line 2 .* is not a JSON object"),
        ("a.json", '[{"a": 1}, 3]', "Item 2 .* is not a JSON object"),
        ("a.jsonl", '{"a": ' + "[" * 200_000, "Line 1 .* nested too deeply"),
        ("a.csv", 'text,label\nfine,1\n"never closed,0\nfine,1\n', "line 3 .* is never closed"),
        ("a.csv", "text,label\na,1\nb, c,0\n", "Line 3 .* has 3 columns where 2"),
        ("a.csv", "text,label\na,1\nb\n", "Line 3 .* has 1 column where 2"),
        (
            "a.csv",
            b"text,label\nfine,1\ntr\xe8s bon,1\n",
            r"not UTF-8 text \(line 3, byte 0xe8\).*iconv -f WINDOWS-1252",
        ),
        ("a.jsonl", "x".encode("utf-16-le"), "NUL characters"),
        ("a.csv", "", "has no rows: give a file with at least one"),
        ("a.csv", "\ufeff", "has no rows: give a file with at least one"),
        (
            "a.csv",
            "text,label\r\n",
            "has no rows below its header line: add one, or name its columns with --column_names",
        ),
        ("a.tsv", "\ufefftext\tlabel", "has no rows below its header line"),
        ("a.jsonl", "[]", "has no rows: give a file with at least one"),
        ("a.txt", "\n \n", "has no rows: give a file with at least one"),
        ("a.parquet", "PAR1 cut", "not a whole Parquet file"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("a.xlsx", "PK", "is a workbook: save the sheet .* 'CSV UTF-8'"),
        ("a.XLS", "PK", "is a workbook"),
        ("a.docx", "PK", "is none of .jsonl, .ndjson"),
        ("noending", "x", "is none of"),
    ],
)
def test_refused_in_one_sentence(tmp_path, name, content, match):
    with pytest.raises(UsageError, match=f"(?s){match}") as error:
        table(tmp_path / name, content)
    assert "\n" not in str(error.value)


def test_a_folder_a_missing_file_and_names_of_columns_for_json(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        load_table(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="There is no file"):
        load_table(tmp_path / "b.csv")
    (tmp_path / "c.jsonl").write_text(JSONL)
    with pytest.raises(UsageError, match="--column_names is for"):
        load_table(tmp_path / "c.jsonl", column_names=["a"])
    (tmp_path / "d.tsv").write_text("\ntext\t label\nx\t0\n")
    with pytest.raises(UsageError, match=r"Line 2 of .* is the header that --column_names repeats: leave the flag out"):
        load_table(tmp_path / "d.tsv", column_names=["text", "label"])
    assert load_table(tmp_path / "d.tsv", column_names=["a", "b"])[1] == {"a": "x", "b": "0"}


def test_a_parquet_file_with_a_column_twice(tmp_path):
    import pyarrow
    import pyarrow.parquet

    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="the column 'text' more than once"):
        load_table(tmp_path / "a.parquet")
