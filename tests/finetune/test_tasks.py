"""The published tasks: wording, labels, formats, splits and metrics."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zokernel.data import load_table
from zokernel.errors import UsageError
from zokernel.finetune import get_task
from zokernel.finetune.data.datasets import load_splits, load_task
from zokernel.finetune.data.protocol import published_splits
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import make_task, read_task
from zokernel.finetune.tasks.base import Source
from zokernel.finetune.tasks.metrics import exact_match, macro_f1, token_f1
from zokernel.finetune.tasks.toy import toy_rows

# What a row of each published table looks like, and the prompt that the papers print for it.
PUBLISHED = [
    ("sst2", {"sentence": "a joy . ", "label": 1}, "a joy . It was", " great", ("a joy . It was", ".")),
    ("sst5", {"text": "fine", "label": 2}, "fine It was", " okay", ("fine It was", ".")),
    (
        "rte",
        {"premise": "A ran.", "hypothesis": "B sat.", "label": 1},
        'A ran.\nDoes this mean that "B sat." is true? Yes or No?\n',
        "No",
        ("A ran?", ", b sat."),
    ),
    (
        "snli",
        {"premise": "A ran.", "hypothesis": "I sat.", "label": 2},
        'Suppose A ran. Can we infer that "I sat."? Yes, No, or Maybe?\n',
        "No",
        ("A ran?", ", I sat."),
    ),
    (
        "cb",
        {"premise": "A ran.", "hypothesis": "B sat.", "label": "neutral"},
        'Suppose A ran. Can we infer that "B sat."? Yes, No, or Maybe?\n',
        "Maybe",
        ("A ran?", ", b sat."),
    ),
    (
        "boolq",
        {"passage": "It is.", "question": "is it", "answer": True},
        "It is. Is it?\n",
        "Yes",
        ("It is. Is it?\n", ""),
    ),
    (
        "wsc",
        {"text": "Ann saw Bea.", "target": {"span1_text": "Ann", "span2_text": "She"}, "label": False},
        'Ann saw Bea.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        "No",
        None,
    ),
    (
        "wic",
        {"word": "set", "sentence1": "A set.", "sentence2": "Set it.", "label": 1},
        'Does the word "set" have the same meaning in these two sentences? Yes, No?\nA set.\nSet it.\n',
        "Yes",
        None,
    ),
    (
        "multirc",
        {"paragraph": "P.", "question": "Q?", "answer": "A", "label": 0},
        'P.\nQuestion: Q?\nI found this answer "A". Is that correct? Yes or No?\n',
        "No",
        None,
    ),
    ("trec", {"question": "who was galileo", "label": "2"}, None, " person", ("", ": who was galileo")),
    (
        "copa",
        {"premise": "It is wet.", "choice1": "It rained.", "choice2": "I sang.", "question": "cause", "label": 0},
        "It is wet because",
        " it rained.",
        None,
    ),
    (
        "record",
        {
            "passage": "Ann met Bea.\n@highlight\nThey left",
            "query": "then @placeholder left",
            "entities": ["Ann", "Bea"],
            "answers": ["Bea"],
        },
        "Ann met Bea.\n- They left\n-",
        " then Bea left",
        None,
    ),
    (
        "squad",
        {"title": "T", "context": "C.", "question": "Q?", "answers": {"text": ["A", "an A"], "answer_start": [0, 1]}},
        "Title: T\nContext: C.\nQuestion: Q?\nAnswer:",
        " A\n",
        None,
    ),
    (
        "drop",
        {"passage": "P.", "question": "Q?", "answers_spans": {"spans": ["3"], "types": ["number"]}},
        "Passage: P.\nQuestion: Q?\nAnswer:",
        " 3\n",
        None,
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "answer", "cloze"), PUBLISHED, ids=[case[0] for case in PUBLISHED])
def test_prompts_and_answers_are_the_published_ones(name, row, prompt, answer, cloze):
    task = get_task(name)
    (read,) = task.read([row], where="test")
    if prompt is not None:
        assert task.prompt(read) == prompt
    assert task.options(read)[task.label(read)] == answer
    if cloze is not None:
        assert task.cloze(read) == cloze


def test_the_benchmarks_own_nested_files_are_read(tmp_path):
    passage = {
        "text": "Ann met Bea.\n@highlight\nThey left",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}],
    }
    qas = [{"query": "@placeholder sat", "answers": [{"text": "Ann"}]}]
    (record,) = get_task("record").read([{"passage": passage, "qas": qas}], where="test")
    assert record["choices"] == ["Ann sat", "Bea sat"]
    question = {"question": "Q?", "answers": [{"text": "A", "label": 1}, {"text": "B", "label": 0}]}
    multirc = get_task("multirc").read([{"passage": {"text": "P.", "questions": [question]}}], where="test")
    assert [get_task("multirc").label(row) for row in multirc] == [1, 0]
    paragraphs = [
        {"context": "C", "qas": [{"question": "Q", "answers": [{"text": "A"}]}, {"question": "?", "answers": []}]}
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    squad = get_task("squad").read(load_table(tmp_path / "squad.json"), where="test")
    assert [get_task("squad").references(row) for row in squad] == [("A",)]
    date = {"number": "", "date": {"day": "3", "month": "May", "year": ""}, "spans": []}
    (drop,) = get_task("drop").read([{"passage": "P", "qa_pairs": [{"question": "Q", "answer": date}]}], where="test")
    assert get_task("drop").references(drop) == ("3 May",)


def test_rows_without_a_label_are_left_out_and_a_missing_column_is_named(caplog):
    snli = get_task("snli")
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, -1, 2)]
    with caplog.at_level("INFO"):
        assert len(snli.read(rows, where="train")) == 2
    assert "1 row without a label is left out" in caplog.text
    with pytest.raises(UsageError, match=r"no labelled row \(-1 stands for no label\): fill its column"):
        snli.read(rows[1:2], where="train")
    with pytest.raises(UsageError, match="no column 'sentence2'"):
        snli.read([{"premise": "a", "label": 0}], where="train")
    with pytest.raises(UsageError, match="not in a published format"):
        get_task("copa").read([{"premise": "a"}], where="train")


def test_answers_are_scored_as_squad_does():
    assert exact_match("The Cat!", ["cat", "dog"]) == 1
    assert exact_match("cats", ["cat"]) == 0
    assert token_f1("a cat sat", ["the cat sat down"]) == pytest.approx(2 * (2 / 2) * (2 / 3) / (1 + 2 / 3))
    # Both are empty once articles are gone: no word in common, as MeZO's code counts.
    assert token_f1("", ["the"]) == token_f1("the", ["the"]) == 0
    assert token_f1("the", ["the", "cat"]) == 0
    assert token_f1("x", []) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_macro_f1_equals_its_definition(pairs):
    predicted, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    scores = []
    for c in {*predicted.tolist(), *labels.tolist()}:
        hits = sum(p == c and t == c for p, t in pairs)
        precision = hits / max(1, sum(p == c for p, _ in pairs))
        recall = hits / max(1, sum(t == c for _, t in pairs))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert macro_f1(predicted, labels) == pytest.approx(sum(scores) / len(scores))


def test_published_splits():
    task = get_task("wsc")
    rows = [{"text": str(i), "span1_text": "a", "span2_text": "b", "label": i % 2} for i in range(554)]
    parts = {"train": rows, "validation": rows[:104]}
    limits = {"train": 1000, "validation": 500, "test": 1000}
    options = {"protocol": "mezo-opt", "k_shot": 16, "seed": 0}
    splits = published_splits(parts, task, limits=limits, **options)
    assert {split: len(found) for split, found in splits.items()} == {"train": 54, "validation": 500, "test": 104}
    splits = published_splits(parts, task, limits={**limits, "validation": 100}, **options)
    assert (len(splits["train"]), len(splits["validation"])) == (454, 100)
    texts = [row["text"] for split in ("train", "validation") for row in splits[split]]
    assert len(set(texts)) == 554
    few_shot = published_splits(parts, task, limits=limits, **{**options, "protocol": "mezo-roberta", "seed": 13})
    for split in ("train", "validation"):
        assert Counter(row["label"] for row in few_shot[split]) == {0: 16, 1: 16}
    assert not {row["text"] for row in few_shot["train"]} & {row["text"] for row in few_shot["validation"]}
    other = published_splits(parts, task, limits=limits, **{**options, "protocol": "mezo-roberta", "seed": 21})
    assert other["train"] != few_shot["train"]
    with pytest.raises(UsageError, match="protocol must be"):
        published_splits(parts, task, limits=limits, **{**options, "protocol": "mezo"})
    with pytest.raises(UsageError, match="lower --max_eval_samples"):
        published_splits({**parts, "train": rows[:400]}, task, limits=limits, **options)


def test_cb_validates_on_a_hundred_under_the_protocol(tmp_path):
    task = get_task("cb")
    for split, size in (("train", 250), ("validation", 56)):
        rows = toy_rows("cb", task, size=size)
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"{split}_file": str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    splits = load_splits(DataArguments(task="cb", protocol="mezo-opt", **files), task, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (150, 100, 56)
    assert not splits.test_is_validation
    smaller = load_splits(DataArguments(task="cb", protocol="mezo-opt", max_eval_samples=50, **files), task, seed=0)
    assert (len(smaller.train), len(smaller.validation)) == (200, 50)


def test_a_hub_source_brings_its_splits_and_labels(monkeypatch):
    requests = []

    def load(name, split, config=None, revision=None):
        requests.append((name, config, split, revision))
        return [{"text": f"what is {i}", "coarse_label": i % 6} for i in range(60)]

    monkeypatch.setattr("zokernel.finetune.data.datasets.load_rows", load)
    arguments = DataArguments(task="trec")
    task = load_task(arguments)
    splits = load_splits(arguments, task, seed=0)
    assert requests == [("CogComp/trec", None, split, "refs/convert/parquet") for split in ("train", "test")]
    assert task.label({"label": 0}) == 5  # ABBR comes first there and last in the task
    assert len(splits.test) == 60


def test_official_files_are_read_as_they_are(shared_data):
    sst2 = {"train_file": str(shared_data / "sst2/train.tsv"), "test_file": str(shared_data / "sst2/dev.tsv")}
    rte = {"train_file": str(shared_data / "rte/train.tsv"), "test_file": str(shared_data / "rte/dev.tsv")}
    trec = {"train_file": str(shared_data / "trec/train.csv"), "test_file": str(shared_data / "trec/test.csv")}
    for name, files, classes in (("sst2", sst2, 2), ("rte", rte, 2), ("trec", trec, 6)):
        columns = ["label", "question"] if name == "trec" else None
        arguments = DataArguments(task=name, protocol="mezo-roberta", column_names=columns, **files)
        task = get_task(name)
        splits = load_splits(arguments, task, seed=42)
        assert Counter(task.label(row) for row in splits.train) == dict.fromkeys(range(classes), 16)
        assert len(splits.test) == {"sst2": 872, "rte": 277, "trec": 500}[name]
    people = [row["question"] for row in splits.train if task.options()[task.label(row)] == " person"]
    assert sum("who" in question for question in people) > 6  # the file's class 2 is what the task calls a person


def test_a_task_from_a_few_lines_of_yaml(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(
        "template: 'Ticket: {subject}\n\n  Urgent?'\nlabel_words: [no, yes]\nlabels: ['low|normal', high]\n"
        "label_column: priority\nmasked_template: '{subject} Urgent? {mask}.'\n"
    )
    task = read_task(path)
    row = {"subject": "Down", "priority": "normal"}
    assert (task.prompt(row), task.options(row), task.label(row)) == ("Ticket: Down\nUrgent?", (" No", " Yes"), 0)
    assert load_task(DataArguments(task_file=str(path), label_words=["calm", "now"])).options() == (" calm", " now")
    choice = make_task({"template": "{q}", "choices": ["{a}", "{b}"], "label_column": "right"})
    assert choice.correct({"q": "?", "a": "x", "b": "y", "right": "y"}) == (1,)
    assert make_task({"template": "{q}", "label_column": "a"}).metric == "f1"
    for text, match in [
        ("template: '{x}'\nlabel_word: [a, b]", "did you mean label_words"),
        ("template: 'x'\nlabel_words: [a, b]", "must name columns"),
        ("template: '{x:loud}'\nlabel_words: [a, b]", "'loud' is not a wording"),
        ("label_words: [a, b]", "at least a template"),
        ("template: [", "not valid YAML"),
        ("template: '{x} {mask} {mask}'\nlabel_words: [a, b]", "more than one {mask}"),
        ("template: '{x}'\nmasked_template: '{x}'\nlabel_words: [a, b]", "needs a {mask}"),
        ("template: '{x}'\nchoices: ['{a}']", "two or more"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=match):
            read_task(path)
    with pytest.raises(UsageError, match="no task file"):
        read_task(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("aliases: [x]", r"sets aliases to \['x'\]: write a column and its other names"),
        ("aliases: {x: {y: z}}", "sets aliases to {'y': 'z'}, where a text is meant"),
        ("source: {datset: x}", "sets source with 'datset', which is none of its keys dataset, config, "),
        ("source: {config: x}", "sets source without the 'dataset' that it is: add its id"),
        ("source: [x]", r"sets source to \['x'\], where a text is meant"),
        ("source: {dataset: x, splits: train}", "with splits 'train': write them as {train: train"),
        ("source: {dataset: x, labels: 10}", "sets source to 10, where a list is meant"),
        ("dev_size: many", "sets dev_size to 'many': it must be a whole number from 1 on"),
        ("dev_size: 0", "sets dev_size to 0: it must be"),
        ("metric: [f1]", r"sets metric to \['f1'\], where a text is meant"),
        ("3: x", "sets 3, which a classification task does not have: it has template"),
        ("labels: ab", r"sets labels to 'ab', where a list is meant: write it as \[one, two\]"),
        ("labels: [a, null]", "sets labels to None, where a text is meant: write one, in quotes"),
        ("masked_label_words: {a: b}", "sets masked_label_words to {'a': 'b'}, where a list is meant"),
    ],
)
def test_values_of_another_form_are_named_with_their_key(line, match, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(f"template: '{{x}}'\nlabel_words: [a, b]\n{line}\n")
    with pytest.raises(UsageError, match=match):
        read_task(path)
    for content, expected in (
        ("template: [x]\nlabel_words: [a, b]", "a text"),
        ("template: '{x}'\nlabel_words: ab", "a list"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=f", where {expected} is meant"):
            read_task(path)


def test_values_of_a_task_file_become_those_of_the_task():
    values = {"template": "{x}", "label_words": ["a", "b"], "dev_size": "100", "aliases": {"x": "y", "label": ["z", 1]}}
    source = {"dataset": "who/what", "splits": {"train": "all"}, "labels": [1, 0]}
    task = make_task({**values, "source": source})
    assert (task.dev_size, task.aliases) == (100, {"x": ("y",), "label": ("z", "1")})
    assert task.source == Source("who/what", splits={"train": "all"}, labels=("1", "0"))
    assert make_task({**values, "source": "who/what"}).source == Source("who/what")
    assert make_task({"template": "{x}", "label_words": ("a", "b")}).options() == (" a", " b")


def test_wordings():
    task = get_task("sst2", template="{mask}, {sentence:lower}")
    assert task.cloze({"sentence": "LOUD"}) == ("", ", loud")
    with pytest.raises(UsageError, match="needs a masked language model"):
        task.prompt({"sentence": "x"})
    with pytest.raises(UsageError, match="has no label words"):
        get_task("squad", label_words=["a", "b"])
