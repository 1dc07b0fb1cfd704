"""Data without a named task: what is chosen, what is logged about the rows that are drawn, and what is refused."""

from __future__ import annotations

import gzip
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


def rows_of(count, column="text", **columns):
    return [{column: f"movie {n}", "label": n % 2, **columns} for n in range(count)]


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
    ("cells", "words", "missing"),
    [
        ("-1 0 1 None 0 1", ("0", "1"), {"-1": "1 row", "None": "1 row"}),
        ("0 1 2 -1.0 -1 0 1 2", ("0", "1", "2"), {"-1": "2 rows"}),
        ("-1 1 -1 1", ("-1", "1"), {}),
        ("low high nan - low high", ("high", "low"), {"nan": "1 row", "-": "1 row"}),
    ],
)
def test_markers_of_missing_labels_are_no_label_words(cells, words, missing, tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"x,{cell}\n" for cell in cells.split()))
    arguments = DataArguments(train_file=str(tmp_path / "a.csv"))
    with caplog.at_level(logging.WARNING):
        task = load_task(arguments)
    assert task.label_words == task.labels == words
    for value, rows in missing.items():
        message = f"Column 'label': {value!r} is treated as a missing label ({rows}): if it is a class, name all"
        assert message in caplog.text
    assert len(caplog.records) == len(missing)
    read = task.read(load_table(tmp_path / "a.csv"), where="Train")
    assert [words[task.label(row)] for row in read] == [cell for cell in cells.split() if cell in words]
    every = list(dict.fromkeys(cells.replace("-1.0", "-1").split()))
    assert load_task(replace(arguments, labels=every)).label_words == tuple(every)


@pytest.mark.parametrize(
    ("cells", "words", "merged"),
    [
        (
            "positive|Positive| positive |negative|NEGATIVE|negative",
            ("negative", "positive"),
            "('Positive' and ' positive ' as 'positive'; 'NEGATIVE' as 'negative')",
        ),
        ("Yes|no|Yes|No|yes|no", ("Yes", "no"), "('yes' as 'Yes'; 'No' as 'no')"),
        ("0|1|0|1.0| 1|0", ("0", "1"), None),
        ("low|high|low|high|low|high", ("high", "low"), None),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_spellings_of_one_label_are_one_class(cells, words, merged, ending, tmp_path, caplog):
    rows = [{"text": f"movie {n}", "label": cell} for n, cell in enumerate(cells.split("|"))]
    file = tmp_path / f"a.{ending}"
    if ending == "csv":
        file.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    elif ending == "jsonl":
        write(file, rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    arguments = DataArguments(train_file=str(file), test_file=str(file))
    with caplog.at_level(logging.INFO):
        task = load_task(arguments)
        splits = load_splits(arguments, task, seed=0)
    assert task.label_words == task.labels == words
    said = [message for message in caplog.messages if "are one class" in message]
    expected = (
        f"Column 'label': names that differ in case or blanks are one class {merged}, unless --labels lists them."
    )
    assert said == ([expected] if merged else [])
    classes = {row["text"]: task.label(row) for row in splits.test}
    plain = [cell.strip().removesuffix(".0").lower() for cell in cells.split("|")]
    names = [word.lower() for word in words]
    assert [classes[row["text"]] for row in rows] == [names.index(cell) for cell in plain]


def test_labels_that_are_listed_are_told_apart_by_case(tmp_path):
    rows = [{"text": "x", "label": label} for label in ("us", "US", "us", "US")]
    arguments = DataArguments(train_file=write(tmp_path / "a.jsonl", rows), labels=["us", "US"])
    assert [load_task(arguments).label(row) for row in rows] == [0, 1, 0, 1]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_minus_one_beside_one_class_is_refused_in_every_split(split, tmp_path):
    good, bad = rows_of(12), [{"text": f"movie {n}", "label": 2 * (n % 2) - 1} for n in range(12)]
    files = {
        f"{name}_file": write(tmp_path / f"{name}.jsonl", bad if name == split else good) for name in ("train", split)
    }
    arguments = DataArguments(**files, label_words=WORDS)
    with pytest.raises(UsageError, match=f"^The {split} split: .* if it is a class, give --labels -1 1;"):
        load_splits(arguments, load_task(arguments), seed=0)


def test_labels_minus_one_and_one_are_classes_where_the_flag_says_so(tmp_path, caplog):
    rows = [{"text": f"movie {n}", "label": 2 * (n % 2) - 1} for n in range(20)]
    splits, messages = load(tmp_path, caplog, rows, labels=["-1", "1"])
    assert len(splits.train) + len(splits.validation) == 20
    assert any(line.startswith("Training labels: ") for line in messages)


def test_a_hidden_test_split_of_the_hub_is_left_out(monkeypatch, caplog):
    def load_rows(name, split, config=None, revision=None):
        return [{**row, "label": -1} if split == "test" else row for row in rows_of(40, column="sentence")]

    monkeypatch.setattr("zokernel.finetune.data.datasets.load_rows", load_rows)
    arguments = DataArguments(dataset_name="some/reviews", label_words=WORDS, template="{sentence} It was")
    with caplog.at_level(logging.INFO):
        splits = load_splits(arguments, load_task(arguments), seed=0)
    assert splits.test_is_validation
    assert "some/reviews has no labelled test split." in caplog.messages


HEADER = "id,Customer Feedback (free text),Sentiment: final?\n"
LISTED = r"\(it has id, Customer Feedback \(free text\), Sentiment: final\?\)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"template": "{Customer Feedback (free text)} It:", "label_column": "sentiment"},
            rf"no column 'sentiment' {LISTED}: did you mean 'Sentiment: final\?' \(in --label_column\)\?$",
        ),
        (
            {"label_column": "sentiment final"},
            rf"no column 'sentiment final' {LISTED}: did you mean 'Sentiment: final\?'",
        ),
        (
            {"template": "{customer feedback free text} It:", "label_column": "Sentiment: final?"},
            r"no column 'customer feedback free text' .*: did you mean 'Customer Feedback \(free text\)' \(in the temp",
        ),
        (
            {"template": "{Customer Feedback (free text)} It:"},
            rf"no column 'label' {LISTED}: say which holds the labels",
        ),
        ({"template": "{Customer Feedback (free text) It:"}, r"malformed \(a single '\{'\)"),
        ({"template": "Customer Feedback (free text)} It:", "label_column": "x"}, r"malformed \(a single '\}'\)"),
        ({}, rf"no column 'label' {LISTED}: say which holds the labels with --label_column"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
def test_a_mistyped_column_is_no_missing_header(flags, message, ending, tmp_path):
    words = ("positive", "negative", "neutral")
    text = HEADER + "".join(f"{n},it took {n} days .,{words[n % 3]}\n" for n in range(30))
    text = text.replace(",", "\t") if ending == "tsv" else text
    file = tmp_path / f"clean.{ending}"
    file.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    arguments = DataArguments(train_file=str(file), **flags)
    with pytest.raises(UsageError, match=message):
        load_splits(arguments, load_task(arguments), seed=0)


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["a very long and tiring film,0", "bright,1", "dull,0"], "text label"),
        (["fine,positive", *(f"film {n},{word}" for n, word in enumerate(["positive", "negative"] * 4))], "text label"),
        (["7,fine,1", *(f"{n},film {n},{n % 2}" for n in range(8))], "text label column3"),
        (["Where is it?,Over there.", "Who are you?,Nobody."], "text label"),
    ],
)
def test_a_first_line_that_is_a_row_is_said_to_be_one(lines, names, tmp_path):
    (tmp_path / "a.csv").write_text("".join(f"{line}\n" for line in lines))
    arguments = DataArguments(train_file=str(tmp_path / "a.csv"), label_words=WORDS)
    match = rf"The first line of the training file \(.*\) reads like a row.*: name them with --column_names {names}, in"
    with pytest.raises(UsageError, match=match):
        load_task(arguments)


def test_keys_of_json_are_no_first_line(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"How was it, all in all?": "x", "2024": n % 2} for n in range(8)])
    with pytest.raises(UsageError, match=r"no column 'label' \(it has How was it, all in all\?, 2024\): say which"):
        load_task(DataArguments(train_file=file, label_words=WORDS))


@pytest.mark.parametrize(
    "flags", [{"reward_function": ["judges.py:good"]}, {"num_generations": 3}, {"temperature": 0.3}, {"beta": 0.1}]
)
def test_a_flag_of_rewards_names_the_one_that_it_needs(flags, tmp_path):
    file = write(tmp_path / "prompts.jsonl", [{"prompt": f"Write {n}."} for n in range(8)])
    with pytest.raises(
        UsageError, match=f"^--{next(iter(flags))} is for --objective reward: add it, or leave both out."
    ):
        load_task(DataArguments(train_file=file, **flags))
    task = load_task(DataArguments(train_file=file, **flags), objective="reward")
    assert task.kind == "reward"


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
def test_what_the_data_do_not_determine_is_asked_for(rows, flags, match, tmp_path):
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
    splits, messages = load(tmp_path, caplog, rows_of(5500))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1000, 500, 500]
    assert "Train: 1,000 of 5,000 rows are drawn (--max_train_samples -1 takes all)." in messages
    assert "Validation: 500 examples held out from the training examples." in messages
    caplog.clear()
    splits, messages = load(tmp_path, caplog, rows_of(5500), max_train_samples=-1)
    assert len(splits.train) == 5000
    assert not any("are drawn" in line for line in messages)


def test_classes_are_counted(tmp_path, caplog):
    splits, messages = load(tmp_path, caplog, rows_of(40), max_eval_samples=8)
    good = sum(row["label"] for row in splits.train)
    assert f"Training labels: {32 - good} bad, {good} good." in messages
    caplog.clear()
    _, messages = load(tmp_path, caplog, [{"text": str(n), "label": 1} for n in range(40)], max_eval_samples=8)
    assert messages.count("All 32 training examples have one label (good): there is nothing to learn.") == 1


def test_a_class_without_an_example_is_named(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", rows_of(20))
    arguments = DataArguments(train_file=file, label_words=["bad", "good", "fine"])
    with caplog.at_level(logging.INFO):
        load_splits(arguments, load_task(arguments), seed=0)
    assert "No training example has the label 'fine'." in caplog.messages


def test_an_answer_in_the_prompt_is_reported(tmp_path, caplog):
    _, messages = load(tmp_path, caplog, rows_of(20), template="{text} {label} It was")
    assert sum("The template names the label column 'label'" in line for line in messages) == 1


def test_rows_in_two_splits_are_counted(tmp_path, caplog):
    rows = rows_of(20)
    splits, messages = load(
        tmp_path,
        caplog,
        rows,
        validation_file=write(tmp_path / "v.jsonl", [*rows[:3], {"text": "new", "label": 0}]),
        test_file=write(tmp_path / "t.jsonl", [{**rows[4], "label": 1, "id": 7}, {"text": "new", "label": 0}]),
    )
    assert [line for line in messages if "their score says less" in line] == [
        "3 of 4 validation examples are also training examples: their score says less about new ones.",
        "1 of 2 test examples is also a training example: their score says less about new ones.",
    ]
    assert splits.num_test_in_train == 1
    caplog.clear()
    without_validation, messages = load(tmp_path, caplog, rows, validation_file=str(tmp_path / "v.jsonl"))
    assert sum("also training" in line for line in messages) == 1  # the validation rows are scored, and counted once
    assert without_validation.num_test_in_train == 3


def test_log_lines_about_a_file_appear_once(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"he said ""wow"""\t0\nfine\t1\n' * 1 + "x\t0\ny\t1\n" * 9)
    arguments = DataArguments(train_file=str(tmp_path / "a.tsv"), label_words=WORDS)
    with caplog.at_level(logging.INFO):
        load_splits(arguments, load_task(arguments), seed=0)
    assert sum("quotes are read" in line for line in caplog.messages) == 1


def test_the_fingerprint_changes_with_the_rows(tmp_path, caplog):
    rows = rows_of(20)
    first, _ = load(tmp_path, caplog, rows)
    second, _ = load(tmp_path, caplog, rows)
    assert first.fingerprint == second.fingerprint
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


def test_a_missing_label_column_is_reported_in_two_short_sentences(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"review": "fine", "stars": n % 2} for n in range(20)])
    with pytest.raises(UsageError, match="has no column 'label'") as error:
        load_task(DataArguments(train_file=file))
    first, second = str(error.value).split(". ")
    assert first.startswith("The train split has no column 'label' (it has review, stars): ")
    assert "--label_column" in first
    assert second.startswith(
        "Chats, instructions and texts are recognised by the columns messages; prompt and completion; "
    )
    assert max(len(first.split()), len(second.split())) <= 30
