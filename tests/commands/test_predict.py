"""zokernel predict: a finished run answers the rows of a file or of standard input."""

from __future__ import annotations

import csv
import datetime
import io
import json
import logging
import shutil

import pytest
import runs
from runs import SHORT

from zokernel.cli import main
from zokernel.commands.predict import write_rows
from zokernel.data import load_table
from zokernel.errors import UsageError
from zokernel.finetune import load_predictor
from zokernel.without_adapter import without_adapter


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm_path, tiny_reviews_path):
    return runs.short(tmp_path_factory.mktemp("predict") / "run", tiny_lm_path, tiny_reviews_path)


OWN = """
from transformers import LlamaForCausalLM


class Own(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = -outputs.logits
        return outputs
"""


@pytest.mark.parametrize("lora", ["false", "true"])
def test_code_that_comes_with_a_model_runs_only_when_asked(lora, tmp_path, tiny_lm_path, flags, modules, capsys):
    place, run, rows = shutil.copytree(tiny_lm_path, tmp_path / "own"), tmp_path / "run", tmp_path / "new.csv"
    rows.write_text("sentence\ngood\n")
    (place / "own.py").write_text(OWN)
    config = json.loads((place / "config.json").read_text())
    config |= {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    (place / "config.json").write_text(json.dumps(config))
    trust, model_flags = ["--trust_remote_code", "true"], ["--model_name_or_path", str(place), "--lora", lora]
    assert main(["finetune", *flags, *SHORT, *model_flags, *trust]) == 0
    scores = []
    for trusted, name in ((True, "Own"), (False, "LlamaForCausalLM")):
        predictor = load_predictor(run, trust_remote_code=trusted)
        assert type(without_adapter(predictor.model)).__name__ == name
        scores.append(predictor(["good"])[0]["scores"])
        capsys.readouterr()
        assert main(["predict", "--model", str(run), "--file", str(rows), *(trust if trusted else [])]) == 0
        assert json.loads(capsys.readouterr().out)["scores"] == pytest.approx(scores[-1], abs=1e-6)
    assert scores[0]["0"] / scores[0]["1"] == pytest.approx(scores[1]["1"] / scores[1]["0"], rel=1e-4)
    if lora == "true":
        merge = ["merge", "--model", str(run), "--output_dir", str(tmp_path / "merged")]
        assert main(merge) == 2
        assert "that was a Own, and this is a LlamaForCausalLM" in capsys.readouterr().err
        assert main([*merge, *trust]) == 0


CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""


@pytest.mark.parametrize("lora", ["false", "true"])
def test_a_configuration_of_a_class_that_comes_with_the_model(lora, tmp_path, tiny_lm_path, flags, modules, capsys):
    place, rows = shutil.copytree(tiny_lm_path, tmp_path / "own"), tmp_path / "new.csv"
    rows.write_text("sentence\ngood\n")
    (place / "configuration_own.py").write_text(CONFIGURATION)
    (place / "own.py").write_text(f"{OWN}\n    from .configuration_own import OwnConfig as config_class\n")
    config = json.loads((place / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    config |= {"model_type": "own-llama", "architectures": ["Own"], "auto_map": names}
    (place / "config.json").write_text(json.dumps(config))
    trust, model_flags = ["--trust_remote_code", "true"], ["--model_name_or_path", str(place)]
    assert main(["plan", "--memory", "true", *model_flags, *trust]) == 0
    assert main(["plan", "--memory", "true", *model_flags]) == 2
    assert "brings code of its own, which is not run: read it" in capsys.readouterr().err
    # At this rate of all weights the start is best, and is loaded again.
    far = ["--max_steps", "4", "--eval_steps", "2", "--save_strategy", "journal", "--learning_rate", "10"]
    assert main(["finetune", *flags, *model_flags, *far, *trust, "--lora", lora]) == 0
    assert lora == "true" or json.loads((tmp_path / "run" / "metrics.json").read_text())["best_step"] == 0
    capsys.readouterr()
    assert main(["predict", "--model", str(tmp_path / "run"), "--file", str(rows), *trust]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    start = load_predictor(tmp_path / "run", trust_remote_code=True)
    assert type(without_adapter(start.model)).__name__ == "Own"
    assert scores == pytest.approx(start(["good"])[0]["scores"], abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "values", "scores"),
    [
        ("--label_words bad good", ("bad", "Good"), ("bad", "Good")),
        ("--label_words bad good", ("0", "1"), ("0", "1")),
        ("--label_words bad good", (1, 0), ("0", "1")),
        ("--label_words bad good", (False, True), ("False", "True")),
        ("--label_words bad good", (0.0, 1.0), ("0.0", "1.0")),
        ("--label_words bad good --labels low high", ("LOW", "high"), ("LOW", "high")),
        ("--label_words bad good --labels 0|negative 1|positive", ("negative", "positive"), ("negative", "positive")),
        ("--label_words bad good --labels -1 1", ("-1", "1"), ("-1", "1")),
        ("--task sst2", (1, 0), ("0", "1")),
        ("--task rte", ("entailment", "not_entailment"), ("entailment", "not_entailment")),
        ("", ("Left", "right"), ("Left", "right")),
    ],
)
def test_predictions_are_the_values_of_the_label_column(flags, values, scores, tmp_path, tiny_lm_path):
    text = {"sentence1": "a", "sentence2": "b"} if "rte" in flags else {"sentence": "movie"}
    rows = [{**text, "label": values[n % 2]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--train_file", str(tmp_path / "rows.jsonl"), "--test_file", str(tmp_path / "rows.jsonl")]
    model, folder = ["--model_name_or_path", str(tiny_lm_path)], tmp_path / "run"
    assert main(["finetune", *model, *files, *SHORT, *flags.split(), "--output_dir", str(folder)]) == 0
    output = tmp_path / "answers.jsonl"
    predict = ["predict", "--model", str(folder), "--file", str(tmp_path / "rows.jsonl"), "--output_file", str(output)]
    assert main(predict) == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    right = [answer["prediction"] == answer["label"] for answer in answers]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sum(right) / len(rows) == pytest.approx(metrics["after"]["accuracy"], abs=1e-6) == 0.5
    assert all(tuple(answer["scores"]) == scores for answer in answers)
    assert {type(answer["prediction"]) for answer in answers} == {type(values[0])}
    recorded = json.loads((folder / "predictor.json").read_text())["labels"]
    assert [(str(label), type(label)) for label in recorded] == [(text, type(values[0])) for text in scores]
    predict[-1] = str(tmp_path / "answers.csv")
    assert main(predict) == 0
    assert [row["prediction"] for row in load_table(predict[-1])] == [str(answer["prediction"]) for answer in answers]


@pytest.mark.parametrize("source", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "-"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_without_text_have_no_answer_and_are_counted(run, source, suffix, tmp_path, monkeypatch, caplog):
    cells = ["good", "", "bad", "  "] if source in ("a.csv", "a.tsv") else ["good", "", "bad", None]
    rows = [{"id": n, "sentence": cell} for n, cell in enumerate(cells)]
    lines, file = "".join(json.dumps(row) + "\n" for row in rows), tmp_path / source
    if source == "-":
        file, place = "-", "row 2"
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    elif source == "a.parquet":
        place = "row 2"
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    elif source == "a.jsonl":
        place = "line 2"
        file.write_text(lines)
    else:
        place, sign = "line 3", "\t" if source == "a.tsv" else ","
        file.write_text(f"id{sign}sentence\n" + "".join(f"{row['id']}{sign}{row['sentence']}\n" for row in rows))
    output = tmp_path / f"answers{suffix}"
    with caplog.at_level(logging.WARNING):
        assert main(["predict", "--model", str(run), "--file", str(file), "--output_file", str(output)]) == 0
    assert f"2 rows without text have no answer (the first: {place})." in caplog.messages
    answers = load_table(output)
    expected = load_predictor(run)(["good", "bad"])
    texts = str if suffix == ".csv" else lambda label: label
    assert [answers[n]["prediction"] for n in (0, 2)] == [texts(answer["prediction"]) for answer in expected]
    assert [answers[n]["word"] for n in (0, 2)] == [answer["word"] for answer in expected]
    for number in (1, 3):
        empty = [answers[number][name] for name in ("prediction", "word", "score")]
        assert empty == ["", "", ""] if suffix == ".csv" else empty == [None, None, None]
        assert (answers[number].get("scores") or {"0": None, "1": None}) == {"0": None, "1": None}


def test_a_file_of_a_header_is_refused_without_a_word_about_training(run, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("sentence\n")
    assert main(["predict", "--model", str(run), "--file", str(tmp_path / "new.csv")]) == 2
    message = capsys.readouterr().err
    assert "new.csv has no rows below its header line: add one, or name its columns with --column_names" in message
    assert "train" not in message.split("new.csv")[-1]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_files_hold_the_rows_and_their_answers(run, suffix, tmp_path, capsys):
    (tmp_path / "new.csv").write_text('id,sentence\n7,"good, very"\n8,bad\n')
    output = tmp_path / f"answers{suffix}"
    assert (
        main(["predict", "--model", str(run), "--file", str(tmp_path / "new.csv"), "--output_file", str(output)]) == 0
    )
    assert f"2 answers in {output}." in capsys.readouterr().out
    rows = load_table(output)
    assert [(row["id"], row["sentence"]) for row in rows] == [("7", "good, very"), ("8", "bad")]
    expected = load_predictor(run)(["good, very", "bad"])
    texts = str if suffix != ".jsonl" else lambda label: label
    assert [row["prediction"] for row in rows] == [texts(answer["prediction"]) for answer in expected]
    scores = [float(row["score:1"]) if suffix != ".jsonl" else row["scores"]["1"] for row in rows]
    assert scores == pytest.approx([answer["scores"]["1"] for answer in expected], abs=1e-6)


def test_lines_of_text_and_json_come_from_standard_input(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO('good\n\n{"sentence": "bad", "id": 3}\n'))
    assert main(["predict", "--model", str(run)]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == "good"
    assert (second["sentence"], second["id"]) == ("bad", 3)


def test_mistakes_are_named(run, tmp_path, capsys):
    (tmp_path / "folder.csv").mkdir()
    predictor = load_predictor(run)
    with pytest.raises(UsageError, match=r"Row 2 has no 'sentence' \(it has text\)"):
        predictor(["good", {"text": "bad"}])
    with pytest.raises(
        UsageError, match=r"Row 1 has no 'sentence' \(it has Sentence\): did you mean 'Sentence'\?; the te"
    ):
        predictor([{"Sentence": "bad"}])
    with pytest.raises(UsageError, match="Row 2: column 'sentence' holds a list, not a text"):
        predictor(["good", {"sentence": ["bad"]}])
    with pytest.raises(UsageError, match="Row 2 is None, neither"):
        predictor(["good", None])
    with pytest.raises(UsageError, match="in brackets"):
        predictor("good")
    (tmp_path / "new.csv").write_text("sentence\ngood\n")
    same = ["--file", str(tmp_path / "new.csv"), "--output_file", str(tmp_path / "new.csv")]
    assert main(["predict", "--model", str(run), *same]) == 2
    assert (tmp_path / "new.csv").read_text() == "sentence\ngood\n"
    (tmp_path / "old.csv").write_text("old\n1\n")
    missing = ["--file", str(tmp_path / "nope.csv"), "--output_file", str(tmp_path / "old.csv")]
    capsys.readouterr()
    assert main(["predict", "--model", str(run), *missing]) == 2
    assert f"There is no file {tmp_path / 'nope.csv'}: check the path" in capsys.readouterr().err
    assert main(["predict", "--model", str(run), "--output_file", str(tmp_path / "folder.csv")]) == 2
    assert "is a folder: name a file in it" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"has no predictor\.json"):
        load_predictor(tmp_path)
    assert main(["predict", "--model", str(run), "--output_file", "answers.pdf"]) == 2
    assert main(["predict", "--model", str(tmp_path / "nowhere"), "--file", "-"]) == 2


def test_the_table_of_a_csv_is_whole(run, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"sentence": "line\\nbreak", "score:0": "taken"}\n')
    output = tmp_path / "answers.csv"
    main(["predict", "--model", str(run), "--file", str(tmp_path / "new.jsonl"), "--output_file", str(output)])
    (row,) = csv.DictReader(output.open(newline=""))
    assert (row["sentence"], row["input:score:0"]) == ("line\nbreak", "taken")
    assert float(row["score:0"]) + float(row["score:1"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_columns_named_like_answer_fields_keep_their_cells(run, suffix, tmp_path, capsys):
    cells = {"word": "set", "score": 7, "prediction": "mine", "input:word": "first", "scores": "theirs"}
    (tmp_path / "new.jsonl").write_text(json.dumps({"sentence": "good", **cells}) + "\n")
    output = tmp_path / f"answers{suffix}"
    files = ["--file", str(tmp_path / "new.jsonl"), "--output_file", str(output)]
    assert main(["predict", "--model", str(run), *files]) == 0
    assert "'word' is 'input:input:word', 'score' is 'input:score', 'prediction' is" in capsys.readouterr().err
    (answer,), (row,) = load_predictor(run)(["good"]), load_table(output)
    renamed = ("input:input:word", "input:score", "input:prediction", "input:word")
    assert [str(row[name]) for name in renamed] == ["set", "7", "mine", "first"]
    assert row["scores" if suffix == ".csv" else "input:scores"] == "theirs"
    assert (str(row["prediction"]), row["word"]) == (str(answer["prediction"]), answer["word"])
    assert float(row["score"]) == pytest.approx(answer["score"], abs=1e-6)


def test_generated_answers_and_a_column_of_scores_are_both_kept():
    stream = io.StringIO()
    write_rows(stream, [{"text": "a", "scores": "3"}], [{"prediction": "b"}], ".csv")
    assert stream.getvalue() == "text,scores,prediction\na,3,b\n"


def test_dates_are_written_and_a_failure_leaves_the_old_answers(run, tmp_path, monkeypatch):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    day = datetime.date(2024, 5, 3)
    pq.write_table(pa.Table.from_pylist([{"sentence": "good", "day": day}]), tmp_path / "new.parquet")
    output = tmp_path / "answers.jsonl"
    files = ["--file", str(tmp_path / "new.parquet"), "--output_file", str(output)]
    assert main(["predict", "--model", str(run), *files]) == 0
    assert load_table(output)[0]["day"] == "2024-05-03"
    before = output.read_text()

    def cut_off(stream, *_):
        stream.write("half")
        raise ZeroDivisionError

    monkeypatch.setattr("zokernel.commands.predict.write_rows", cut_off)
    with pytest.raises(ZeroDivisionError):
        main(["predict", "--model", str(run), *files])
    assert output.read_text() == before
