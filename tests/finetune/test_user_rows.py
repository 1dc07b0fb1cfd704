"""Rows as people bring them: what is read, what is left out and counted, and what is refused with which words."""

from __future__ import annotations

import datetime
import json
import logging
import math
import re

import numpy as np
import pytest

from zokernel.data import load_table
from zokernel.errors import UsageError
from zokernel.finetune.data.choose_task import classification
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import ChoiceTask, GenerationTask, PromptTask, get_task
from zokernel.finetune.tasks.toy import toy_rows

OWN = PromptTask("{text} It was", ("bad", "good"))


@pytest.mark.parametrize(
    ("name", "template", "row"),
    [
        ("sst2", "{text} It was", {"text": "a joy", "label": 1}),
        ("mnli", "{premise} so {hypothesis}", {"premise": "a", "hypothesis": "joy", "label": 1}),
        ("trec", "Is {text} a", {"text": "a joy", "label": 1}),
        ("trec", "{question} {text}", {"question": "x", "text": "a joy", "label": 1}),
        ("copa", "{premise} so", {"premise": "a joy", "choice1": "A", "choice2": "B", "label": 1}),
    ],
)
def test_a_name_in_the_users_template_is_never_renamed(name, template, row):
    task = get_task(name, template=template)
    assert task.read([row], where="train") == [row]
    assert task.prompt(task.read([row], where="train")[0]) == template.format(**row)


def test_a_label_column_that_was_given_is_never_renamed():
    task = get_task("trec", label_column="coarse_label")
    assert task.read([{"text": "who", "coarse_label": 2}], where="train") == [{"question": "who", "coarse_label": 2}]


@pytest.mark.parametrize(
    "column", ["Review Text", "Überschrift", "a.b", "a[0]", "0", "what?!", "a-b", "dc:title", "$ %"]
)
def test_a_column_may_have_any_name(column):
    inside = f"{column}:" if ":" in column else column
    task = PromptTask(f"Q: {{{{x}}}} {{{inside}}} It was", ("bad", "good"))
    assert task.columns == (column,)
    assert task.prompt({column: " A joy. "}) == "Q: {x} A joy. It was"
    worded = PromptTask(f"{{{column}:lower}} {{mask}}", ("bad", "good"))
    assert worded.cloze({column: "A Joy"}) == ("a joy", "")


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{} It was", "must name columns"),
        ("{ } so", "must name columns"),
        ("{a} }", "single '}'"),
        ("{a{b}}", "single '{'"),
        ("{a} \udce9", "not valid UTF-8"),
    ],
)
def test_impossible_templates_are_refused(template, match):
    with pytest.raises(UsageError, match=match):
        PromptTask(template, ("a", "b"))


NOTHING = [None, math.nan, "", "  "]


@pytest.mark.parametrize("missing", [*NOTHING, "absent"])
def test_rows_without_a_label_are_left_out_and_counted(missing, caplog):
    rows = [{"text": f"row {n}", "label": n % 2} for n in range(6)]
    for n in (2, 5):
        rows[n] = {"text": "x"} if missing == "absent" else {"text": "x", "label": missing}
    with caplog.at_level(logging.INFO):
        assert OWN.read(rows, where="Train") == [rows[n] for n in (0, 1, 3, 4)]
    assert "Train: 2 rows without a label are left out (the first: row 3)." in caplog.text


@pytest.mark.parametrize("missing", [*NOTHING, "absent"])
def test_rows_without_text_are_left_out_and_counted(missing, caplog, tmp_path):
    rows = [{"label": n % 2, "text": f"row {n}"} for n in range(6)]
    rows[3] = {"label": 1} if missing == "absent" else {"label": 1, "text": missing}
    (tmp_path / "a.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.INFO):
        assert OWN.read(load_table(tmp_path / "a.jsonl"), where="Train") == [rows[n] for n in (0, 1, 2, 4, 5)]
    assert "Train: 1 row without text (text) is left out (the first: line 5)." in caplog.text


def test_one_empty_column_of_several_is_text_but_a_missing_one_is_not():
    task = PromptTask("{title} {body} It was", ("bad", "good"))
    rows = [
        {"title": "", "body": "b", "label": 0},
        {"title": None, "body": "b", "label": 0},
        {"title": "", "body": " ", "label": 0},
    ]
    assert task.read(rows, where="train") == rows[:1]
    choice = ChoiceTask("{q}", ("{a}", "{b}"))
    rows = [{"q": "?", "a": "x", "b": None, "label": 0}, {"q": "?", "a": "x", "b": "y", "label": 1.0}]
    assert choice.read(rows, where="train") == rows[1:]
    assert choice.correct(rows[1]) == (1,)
    answer = GenerationTask("{q}", label_column="a")
    rows = [{"q": "?", "a": value} for value in ("x", None, math.nan, " ", [], ["", None], [None, "y"])]
    assert [answer.references(row) for row in answer.read(rows, where="train")] == [("x",), ("y",)]


def test_data_without_a_usable_row_are_refused():
    with pytest.raises(UsageError, match="has no row with text in text"):
        OWN.read([{"text": None, "label": 0}], where="train")
    with pytest.raises(UsageError, match="has no labelled row"):
        OWN.read([{"text": "a", "label": None}], where="train")


def test_a_prompt_never_says_none():
    with pytest.raises(UsageError, match="holds no text"):
        OWN.prompt({"text": None})


@pytest.mark.parametrize(
    ("words", "labels", "values", "classes"),
    [
        ("bad good", (), [0, 1, 0.0, 1.0, "0.0", "1.0", " 1 ", "1."], [0, 1, 0, 1, 0, 1, 1, 1]),
        ("bad good", (), [True, False, "true", "False", "TRUE"], [1, 0, 1, 0, 1]),
        ("bad good", (), ["bad", "Good", "GOOD"], [0, 1, 1]),
        ("no yes", ("low", "High|urgent"), ["low", "LOW", "high", "Urgent", "yes"], [0, 0, 1, 1, 1]),
        ("no yes", (r"a\|b", "a|c"), ["a|b", "a", "C", "a|c"], [0, 1, 1, 1]),
        ("no yes", ("0.0", "1.0"), [0, "1", 1.0], [0, 1, 1]),
        ("no yes", ("true", "false"), [True, "False"], [0, 1]),
        ("low mid high", ("-1", "0", "1"), [-1, "0", 1.0, "-1.0"], [0, 1, 2, 0]),
        ("1 2 3 4 5", (), [1, "2", 3.0, "5"], [0, 1, 2, 4]),
        ("1 0", (), [1, 0], [0, 1]),
        ("None mild", (), ["None", "none", "mild"], [0, 0, 1]),
        ("us US", (), ["us", "US"], [0, 1]),
        ("bad good", ("0.5", "1.5"), [0.5, "1.5"], [0, 1]),
    ],
)
def test_labels_are_understood_as_tables_write_them(words, labels, values, classes):
    task = PromptTask("{text}", tuple(words.split()), labels)
    rows = [{"text": "x", "label": value} for value in values]
    assert [task.label(row) for row in task.read(rows, where="train")] == classes


def test_labels_of_several_names_have_the_first_as_their_word():
    rows = [{"text": "x", "label": label} for label in (0, "good")]
    task = classification(rows, DataArguments(labels=["bad|0", "good|1"]))
    assert task.label_words == ("bad", "good")
    assert [task.label(row) for row in rows] == [0, 1]


@pytest.mark.parametrize(
    ("words", "labels", "values", "flag"),
    [
        ("bad good", (), [-1, 1, -1, 1], "-1 beside 1, .* give --labels -1 1; if not, take those rows out"),
        ("bad good", (), ["-1.0", "1.0", "1.0"], "-1 beside 1, .* give --labels -1 1;"),
        ("bad good", (), ["0", "-1"], "-1 beside 0, .* give --labels -1 0;"),
        ("bad good", (), ["-1", "good", "Good", "1"], "give --labels with one value for each label word;"),
        ("bad good", ("0", "1"), [-1, 1], "give --labels -1 1;"),
        ("bad fine good", (), [1, -1, 0], "-1 beside 0, 1, .* give --labels -1 0 1;"),
    ],
)
def test_minus_one_beside_one_class_or_in_the_place_of_one_is_refused(words, labels, values, flag):
    task = PromptTask("{text}", tuple(words.split()), labels)
    rows = [{"text": "x", "label": value} for value in values]
    with pytest.raises(UsageError, match=r"^The test split: column 'label' holds -1 beside ") as error:
        task.read(rows, where="The test split")
    assert re.search(flag, str(error.value))


@pytest.mark.parametrize(
    ("words", "labels", "values", "kept"),
    [
        ("bad good", (), [0, -1, 1, "-1.0"], [0, 1]),
        ("bad good fine", ("2|x", "1", "0"), [0, -1, 1], [2, 1]),
        ("bad good", ("-1", "1"), [-1, 1, "-1.0"], [0, 1, 0]),
        ("bad good", (), ["", 1, None], [1]),
    ],
)
def test_minus_one_beside_all_classes_or_among_the_labels_is_what_it_was(words, labels, values, kept, caplog):
    task = PromptTask("{text}", tuple(words.split()), labels)
    rows = [{"text": "x", "label": value} for value in values]
    with caplog.at_level(logging.INFO):
        assert [task.label(row) for row in task.read(rows, where="Train")] == kept
    hidden = "-1" not in labels and any(str(value).startswith("-1") for value in values)
    assert ("(the first: row 2). -1 stands for no label unless --labels names it." in caplog.text) == hidden


def test_a_column_of_minus_one_alone_is_no_label():
    with pytest.raises(
        UsageError, match=r"^Test has no labelled row \(-1 stands for no label\): fill its column 'label'"
    ):
        OWN.read([{"text": "a", "label": value} for value in (-1, "-1")], where="Test")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"Text": "a", "label": 0},
            r"no column 'text' \(it has Text, label\): did you mean 'Text' \(in the template\)\?",
        ),
        (
            {"text": "a", "Label:": 0},
            r"no column 'label' \(it has text, Label:\): did you mean 'Label:' \(in --label_column",
        ),
        (
            {"review": "a", "label": 0},
            r"no column 'text' \(it has review, label\): change --template or --label_column, or",
        ),
    ],
)
def test_a_column_of_a_similar_name_is_proposed(row, message):
    with pytest.raises(UsageError, match=f"^The validation split has {message}"):
        OWN.read([row], where="The validation split")


@pytest.mark.parametrize(
    ("words", "labels", "values", "spellings"),
    [
        ("bad good", (), [0, 1], (0, 1)),
        ("bad good", (), [1], (0, 1)),
        ("bad good", (), [1.0], (0.0, 1.0)),
        ("bad good", (), [True], (False, True)),
        ("bad good", (), [1, True, True], ("0", "True")),  # one type for all
        ("bad good so", (), [2, 0], (0, 1, 2)),
        ("no yes", ("False", "True"), [True], (False, True)),
        ("bad good", (), [1.0, "1.0", 1, 1.0], ("0", "1.0")),
        ("bad good", (), [True, "true", True], ("0", "True")),
        ("bad good", (), ["1", "1", 1, 0], ("0", "1")),
        ("bad good", (), [1, 1.0, 0], (0, 1)),
        ("bad good", ("0.5", "1.5"), [0.5], (0.5, 1.5)),
        ("bad good", (), [np.int64(1), np.int64(0)], (0, 1)),
        ("bad good", (), ["Good ", "good", "Good"], ("bad", "Good")),
        ("no yes", ("low|normal", "high"), ["normal", "LOW", "normal"], ("normal", "high")),
        ("no yes", ("low|normal", "high"), ["high"], ("low", "high")),
        ("no yes", ("-1", "1"), [-1], (-1, 1)),
        ("no yes", ("low", "1"), [1], ("low", 1)),
        ("no yes", ("2024-05-03", "b"), [datetime.date(2024, 5, 3)], ("2024-05-03", "b")),
        ("pro contra", (r"a\|b", "c"), ["a|b"], ("a|b", "c")),
    ],
)
def test_labels_are_spelled_as_the_table_writes_them(words, labels, values, spellings):
    task = PromptTask("{text}", tuple(words.split()), labels)
    written = task.spellings([{"text": "x", "label": value} for value in values])
    assert [(type(label), label) for label in written] == [(type(label), label) for label in spellings]


@pytest.mark.parametrize(
    ("words", "labels"),
    [("bad good", ()), ("1 2 3 4 5", ()), ("1 0", ()), ("no yes", ("low|normal", "high")), ("a b", ("1|x", "2|y"))],
)
def test_toy_rows_hold_every_class_equally_often(words, labels):
    task = PromptTask("{text}", tuple(words.split()), labels)
    rows = toy_rows("own", task, size=2 * task.num_classes)
    assert [task.label(row) for row in task.read(rows, where="toy")] == [*range(task.num_classes)] * 2


@pytest.mark.parametrize(
    ("words", "value", "match"),
    [
        ("bad good", 2, r"line 3: Label '2' in column 'label' is none of 0, 1, .* add the missing word"),
        ("bad good", "positive", r"line 3: Label 'positive' in column 'label' is none of 0, 1"),
        ("bad good", 0.37, r"line 3: Label 0.37 in column 'label' is a number on a scale"),
        ("bad good", "0.37", "is a number on a scale"),
        ("bad good", [1], r"holds a list \(\[1\]\), where a label is one value"),
        ("1 2 3", 0, "is none of 1, 2, 3"),
        ("us US", "Us", "is none of"),
        ("a b c", True, "Label 'True'"),
    ],
)
def test_an_unknown_label_is_refused_with_its_line(words, value, match, tmp_path):
    rows = [{"text": "x", "label": words.split()[0]}, {"text": "x", "label": value}]
    (tmp_path / "a.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=match):
        PromptTask("{text}", tuple(words.split())).read(load_table(tmp_path / "a.jsonl"), where="Train")


def test_the_values_of_the_label_column_are_listed():
    rows = [{"text": "x", "label": label} for label in (1, 2, 3)]
    with pytest.raises(UsageError, match=r"row 2: Label '2' .*; the column holds 1, 2, 3\."):
        OWN.read(rows, where="train")


def test_a_column_of_lists_is_no_text():
    with pytest.raises(UsageError, match=r"row 1: column 'text' holds a list, not a text"):
        OWN.read([{"text": ["a", "b"], "label": 0}], where="train")


@pytest.mark.parametrize(
    ("words", "labels", "match"),
    [
        (("a", " "), (), "two or more distinct"),
        (("a", "a "), (), "two or more"),
        (("a", "b"), ("1", "0|1.0"), "two classes"),
        (("a", "b\ud83d"), (), "not valid UTF-8"),
    ],
)
def test_words_and_labels_are_distinct(words, labels, match):
    with pytest.raises(UsageError, match=match):
        PromptTask("{text}", words, labels)


def test_options_of_a_text_column_are_read_as_json():
    task = ChoiceTask("{q}", choices_column="options")
    rows = [{"q": "?", "options": options, "label": 1} for options in ('["yes", "no"]', ["yes", "no"])]
    assert [task.options(row) for row in task.read(rows, where="train")] == [(" yes", " no")] * 2


@pytest.mark.parametrize("options", ["['yes','no']", "yes|no", '"yes"', None, 3, {"text": ["yes"], "label": ["A"]}])
def test_options_that_are_no_list_are_refused_with_their_row(options):
    rows = [{"q": "?", "options": ["yes", "no"], "label": 1}, {"q": "?", "options": options, "label": 1}]
    with pytest.raises(UsageError, match=r"^Train, row 2: Column 'options' holds .* as JSON, such as \[\"yes\", \"no"):
        ChoiceTask("{q}", choices_column="options").read(rows, where="Train")


@pytest.mark.parametrize(
    ("options", "labels", "right"),
    [
        ("1 2 4", "1 2 4", (0, 1, 2)),  # 4 is no position: all are texts
        ("1 2 4", "0 1 2", (0, 1, 2)),  # 0 is no text: all are positions
        ("0 1 2", "0 2 1", (0, 2, 1)),  # both say the same
    ],
)
def test_labels_of_options_that_are_numbers_mean_one_thing_in_the_whole_column(options, labels, right):
    task = ChoiceTask("{q}", choices_column="options")
    rows = [{"q": "?", "options": options.split(), "label": label} for label in labels.split()]
    assert tuple(task.label(row) for row in task.read(rows, where="Train")) == right


@pytest.mark.parametrize(
    ("options", "labels", "number"),
    [
        ("2 1 0", "1 0 2", 2),  # positions and texts, all of them
        ("1 2 4", "1 2 1", 1),
        ("a b 1", "a 1 0", 2),  # a is no position and 0 no text
    ],
)
def test_labels_that_may_be_positions_or_texts_are_refused(options, labels, number):
    task = ChoiceTask("{q}", choices_column="options")
    rows = [{"q": "?", "options": options.split(), "label": label} for label in labels.split()]
    match = rf"^Train, row {number}: label '\d' .* the text of one option and the position of another"
    with pytest.raises(UsageError, match=match):
        task.read(rows, where="Train")
    texts = [{**row, "label": [row["label"]]} for row in rows if row["label"] in row["options"]]
    assert [row["options"][task.label(row)] for row in task.read(texts, where="Train")] == [
        row["label"][0] for row in texts
    ]
