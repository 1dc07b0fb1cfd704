"""Data without a named task: what is chosen, what is said about the rows that are drawn, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace

import pytest

from zokernel.cli import main
from zokernel.data import load_table
from zokernel.errors import UsageError
from zokernel.finetune.data.datasets import load_splits, load_task, task_name
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.settings.flag_files import read_yaml

WORDS = ["bad", "good"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(count, column="text", **more):
    return [{column: f"movie {n}", "label": n % 2, **more} for n in range(count)]


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"Review Text": "a joy"}, "Review Text"),
        ({"id": "17", "stars": 3, "message": "a joy", "when": None}, "message"),
        ({"title": "t", "text": "a joy"}, "text"),
        ({"title": "t", "sentence": "a joy"}, "sentence"),
        ({"dc:title": "a joy"}, "dc:title"),
    ],
)
def test_the_text_column_is_the_prompt(row, column, tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", [{**row, "label": 1}, {**row, "label": 0}])
    with caplog.at_level(logging.INFO):
        task = load_task(DataArguments(train_file=file, label_words=WORDS))
    assert task.prompt(row) == "a joy\nAnswer:"
    assert task.options() == (" bad", " good")
    assert f"the prompt is column {column!r}" in caplog.text
    assert (task.aliases, task.source, task.masked_template, task.labels) == ({}, None, None, ())


def test_the_published_tasks_leave_no_trace(tmp_path):
    file = write(tmp_path / "mine.jsonl", [{"text": "a", "sentence": "b", "label": n % 2} for n in range(4)])
    arguments = DataArguments(train_file=file, label_words=WORDS, template="{sentence} {text} so")
    task = load_task(arguments)
    assert task.prompt({"text": "a", "sentence": "b"}) == "b a so"
    assert task_name(arguments) == "mine.jsonl"
    assert task_name(DataArguments(task="sst2", train_file=file)) == "sst2"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["billing", "account", "billing", "account"], ("account", "billing")),
        ([1, 0.0, "1", 0], ("0", "1")),
        ([10, 9, 9, 10], ("9", "10")),
        ([True, False, True, False], ("False", "True")),
    ],
)
def test_without_label_words_the_few_values_of_the_label_column_are_the_words(values, words, tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", [{"text": "x", "team": value} for value in values])
    arguments = DataArguments(train_file=file, label_column="team", template="{text} Team:")
    with caplog.at_level(logging.INFO):
        task = load_task(arguments)
    assert task.label_words == words
    assert f"they are the values of column 'team': {', '.join(words)}." in caplog.text
    expected = [words.index(str(int(v)) if isinstance(v, float) else str(v)) for v in values]
    assert [task.label({"text": "x", "team": value}) for value in values] == expected


@pytest.mark.parametrize(
    ("cells", "words", "named"),
    [
        ("-1 0 1 None 0 1", ("0", "1"), {"-1": "1 row", "None": "1 row"}),
        ("0 1 2 -1.0 -1 0 1 2", ("0", "1", "2"), {"-1": "2 rows"}),
        ("-1 1 -1 1", ("-1", "1"), {}),
        ("low high nan - low high", ("high", "low"), {"nan": "1 row", "-": "1 row"}),
    ],
)
def test_what_stands_for_no_label_is_no_label_word(cells, words, named, tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"x,{cell}\n" for cell in cells.split()))
    arguments = DataArguments(train_file=str(tmp_path / "a.csv"))
    with caplog.at_level(logging.WARNING):
        task = load_task(arguments)
    assert task.label_words == task.labels == words
    for value, rows in named.items():
        told = f"Column 'label': {value!r} is treated as a missing label ({rows}): if it is a class, name all"
        assert told in caplog.text
    assert len(caplog.records) == len(named)
    read = task.read(load_table(tmp_path / "a.csv"), where="Train")
    assert [words[task.label(row)] for row in read] == [cell for cell in cells.split() if cell in words]
    every = list(dict.fromkeys(cells.replace("-1.0", "-1").split()))
    assert load_task(replace(arguments, labels=every)).label_words == tuple(every)


def test_labels_without_words_are_the_words(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "x", "label": word} for word in ("low", "high")])
    assert load_task(DataArguments(train_file=file, labels=["low", "high"])).label_words == ("low", "high")


@pytest.mark.parametrize(
    ("rows", "flags", "match"),
    [
        (
            [{"a": "x", "b": "y", "label": 0}],
            {"label_words": WORDS},
            "columns a, b might be it.*--template '{a} It was'",
        ),
        ([{"a": 1, "label": 0}], {"label_words": WORDS}, "no column holds text"),
        (
            [{"text": "x", "team": "a"}],
            {"label_words": WORDS},
            r"no column 'label' \(it has text, team\).*--label_column",
        ),
        ([{"text": "x", "label": n / 7} for n in range(1, 7)], {}, "holds 6 different values .* not taken for classes"),
        ([{"text": "x", "label": f"an answer {n}"} for n in range(9)], {}, "holds 9 different values"),
        ([{"text": "x", "label": [0]}, {"text": "x", "label": [1]}], {}, "not taken for classes"),
        ([{"text": "x", "label": 1}] * 4, {}, "holds 1 different value .*not taken for classes"),
        ([{"instruction": "x", "output": "y"}], {"label_words": WORDS}, "leave out --label_words, or name"),
        ([{"instruction": "x", "output": "y"}], {"labels": WORDS}, "form 'instruction'.*leave out --labels, or name"),
        (rows_of(4), {"task": "sst2", "task_file": "x.yaml"}, "either --task or --task_file"),
        (rows_of(4), {"dataset_config": "x"}, "--dataset_config needs --dataset_name"),
    ],
)
def test_what_the_data_do_not_tell_is_asked_for(rows, flags, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        load_task(DataArguments(train_file=write(tmp_path / "a.jsonl", rows), **flags))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({}, "Name the data: --train_file .* --dataset_name .* --task"),
        ({"label_words": WORDS}, "Name the data"),
        ({"validation_file": "a.csv"}, "--validation_file needs --train_file"),
        ({"test_file": "a.csv", "task": "sst2"}, "--test_file needs --train_file"),
        ({"column_names": ["a"], "dataset_name": "x/y"}, "--column_names needs --train_file"),
    ],
)
def test_without_data_nothing_begins(flags, match):
    with pytest.raises(UsageError, match=match):
        load_task(DataArguments(**flags))


def test_a_published_data_set_brings_its_task(caplog):
    with caplog.at_level(logging.INFO):
        task = load_task(DataArguments(dataset_name="movie-reviews"))
    assert task.template.startswith("Movie review: ")
    assert "The data set movie-reviews comes with the task movie-reviews." in caplog.text
    assert load_task(DataArguments(dataset_name="nyu-mll/glue", dataset_config="cola")).label_words == (
        "incorrect",
        "correct",
    )


def load(tmp_path, caplog, rows, **flags):
    arguments = DataArguments(train_file=write(tmp_path / "train.jsonl", rows), label_words=WORDS, **flags)
    with caplog.at_level(logging.INFO):
        splits = load_splits(arguments, load_task(arguments), seed=0)
    return splits, [record.getMessage() for record in caplog.records]


def test_rows_that_are_not_drawn_are_counted(tmp_path, caplog):
    splits, said = load(tmp_path, caplog, rows_of(5500))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1000, 500, 500]
    assert "Train: 1,000 of 5,000 rows are drawn (--max_train_samples -1 takes all)." in said
    assert "Validation: 500 examples held out from the training examples." in said
    caplog.clear()
    splits, said = load(tmp_path, caplog, rows_of(5500), max_train_samples=-1)
    assert len(splits.train) == 5000
    assert not any("are drawn" in line for line in said)


def test_classes_are_counted(tmp_path, caplog):
    splits, said = load(tmp_path, caplog, rows_of(40), max_eval_samples=8)
    good = sum(row["label"] for row in splits.train)
    assert f"Training labels: {32 - good} bad, {good} good." in said
    caplog.clear()
    _, said = load(tmp_path, caplog, [{"text": str(n), "label": 1} for n in range(40)], max_eval_samples=8)
    assert said.count("All 32 training examples have one label (good): there is nothing to learn.") == 1


def test_a_class_without_an_example_is_named(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", rows_of(20))
    arguments = DataArguments(train_file=file, label_words=["bad", "good", "fine"])
    with caplog.at_level(logging.INFO):
        load_splits(arguments, load_task(arguments), seed=0)
    assert "No training example has the label 'fine'." in caplog.messages


def test_the_answer_in_the_prompt_is_said(tmp_path, caplog):
    _, said = load(tmp_path, caplog, rows_of(20), template="{text} {label} It was")
    assert sum("The template names the label column 'label'" in line for line in said) == 1


def test_rows_in_two_splits_are_counted(tmp_path, caplog):
    rows = rows_of(20)
    splits, said = load(
        tmp_path,
        caplog,
        rows,
        validation_file=write(tmp_path / "v.jsonl", [*rows[:3], {"text": "new", "label": 0}]),
        test_file=write(tmp_path / "t.jsonl", [{**rows[4], "label": 1, "id": 7}, {"text": "new", "label": 0}]),
    )
    assert [line for line in said if "their score says less" in line] == [
        "3 of 4 validation examples are also training examples: their score says less about new ones.",
        "1 of 2 test examples is also a training example: their score says less about new ones.",
    ]
    assert splits.num_test_in_train == 1
    caplog.clear()
    alone, said = load(tmp_path, caplog, rows, validation_file=str(tmp_path / "v.jsonl"))
    assert sum("also training" in line for line in said) == 1  # the validation rows are scored, and counted once
    assert alone.num_test_in_train == 3


def test_lines_of_the_log_about_a_file_come_once(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"he said ""wow"""\t0\nfine\t1\n' * 1 + "x\t0\ny\t1\n" * 9)
    arguments = DataArguments(train_file=str(tmp_path / "a.tsv"), label_words=WORDS)
    with caplog.at_level(logging.INFO):
        load_splits(arguments, load_task(arguments), seed=0)
    assert sum("quotes are read" in line for line in caplog.messages) == 1


def test_the_fingerprint_tells_other_rows(tmp_path, caplog):
    rows = rows_of(20)
    first, _ = load(tmp_path, caplog, rows)
    again, _ = load(tmp_path, caplog, rows)
    assert first.fingerprint == again.fingerprint
    assert set(first.fingerprint) == {"train_rows", "validation_rows", "test_rows"}
    assert first.fingerprint["train_rows"].startswith("16 rows, sha256 ")
    rows[3]["label"] = 0
    other, _ = load(tmp_path, caplog, rows)
    assert sum(other.fingerprint[split] != digest for split, digest in first.fingerprint.items()) in (1, 2)


def test_a_file_whose_labels_were_flipped_is_another_run(flags, tiny_reviews_path, tmp_path, capsys):
    file = tmp_path / "train.jsonl"
    shutil.copy(tiny_reviews_path / "train.jsonl", file)
    words = [*flags, "--max_steps", "2", "--train_file", str(file)]
    assert main(["finetune", *words]) == 0
    assert main(["finetune", *words]) == 0  # nothing is left to do
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write(file, [{**row, "label": 1 - row["label"]} for row in rows])
    capsys.readouterr()
    assert main(["finetune", *words]) == 2
    message = capsys.readouterr().err
    assert (
        "already holds another run (train: other rows): choose another --output_dir, or start over with "
        "--overwrite_output_dir true."
    ) in message
    longer = ["--resume_from_checkpoint", "last", "--max_steps", "4"]
    assert main(["finetune", *words, *longer]) == 2
    assert "The training examples are not those of the run in" in capsys.readouterr().err
    assert main(["finetune", *words, "--overwrite_output_dir", "true"]) == 0


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("label_words: [No, Yes]\nlabels: [0, 1]", {"label_words": ["No", "Yes"], "labels": ["0", "1"]}),
        (
            "label_words: [no, on]\nlabels: [1.0, 2020-01-01]",
            {"label_words": ["no", "on"], "labels": ["1.0", "2020-01-01"]},
        ),
        ("labels: [true, 'false', null]", {"labels": ["true", "false", "null"]}),
        ("label_column: yes\ntemplate: 1", {"label_column": "yes", "template": "1"}),
        ("label_words: good\nmax_steps: 3\nlora: true", {"label_words": ["good"], "max_steps": 3, "lora": True}),
        ("task: null\nk_shot: 3", {"task": None, "k_shot": 3}),
        ("x: &words [no, 1]\nlabel_words: *words", {"x": [False, 1], "label_words": ["no", "1"]}),
    ],
)
def test_a_config_file_means_what_the_command_line_means(text, values, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == values


@pytest.mark.parametrize("text", ["label_words: [[a], b]", "template: [a]", "label_words: {a: b}"])
def test_a_config_file_of_another_shape_is_refused(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"a.yaml sets '\w+' to .*: write (a list of texts|one text)"):
        read_yaml(tmp_path / "a.yaml")


def test_words_of_a_config_file_reach_the_task(flags, tmp_path):
    (tmp_path / "words.yaml").write_text("label_words: [No, Yes]\nlabels: [0, 1]\n")
    plain = [word for word in flags if word not in ("--label_words", "bad", "good")]
    assert main(["finetune", "--config", str(tmp_path / "words.yaml"), *plain, "--max_steps", "2"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["label_words"] == ["No", "Yes"]
    assert metrics["task"] == "train.jsonl"


def test_a_missing_label_column_is_told_in_two_short_sentences(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"review": "fine", "stars": n % 2} for n in range(20)])
    with pytest.raises(UsageError) as raised:
        load_task(DataArguments(train_file=file))
    first, second = str(raised.value).split(". ")
    assert first.startswith("The train split has no column 'label' (it has review, stars): ")
    assert "--label_column" in first
    assert second.startswith(
        "Chats, instructions and texts are recognised by the columns messages; prompt and completion; "
    )
    assert max(len(first.split()), len(second.split())) <= 30
