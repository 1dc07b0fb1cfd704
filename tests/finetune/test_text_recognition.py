"""Which rows are chats, instructions or plain text, and the form in which they are read."""

from __future__ import annotations

import json
import logging

import pytest

from zokernel.errors import UsageError
from zokernel.finetune.data.datasets import load_splits, load_task
from zokernel.finetune.data.formats import form_of, recognise
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks.alpaca import alpaca_messages, alpaca_prompt
from zokernel.finetune.tasks.text import TextTask

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": HI}, "messages"),
        ({"messages": HI, "label": 1, "text": "x"}, "messages"),
        ({"messages": json.dumps(HI)}, "messages"),
        ({"messages": "no list"}, None),
        ({"conversations": SHARED}, "messages"),
        ({"conversations": HI, "id": 3}, "messages"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt-completion"),
        ({"prompt": HI[:1], "completion": HI[1:]}, "prompt-completion"),
        ({"prompt": "Hi", "other": "Hello"}, None),
        ({"instruction": "Greet", "input": "", "output": "Hello"}, "instruction"),
        ({"instruction": "Greet", "output": "Hello"}, "instruction"),
        ({"instruction": "Greet"}, None),
        ({"text": "Hello"}, "text"),
        ({"text": "Hello", "id": 3}, "text"),
        ({"text": "Hello", "label": 1}, None),
        ({"sentence": "Hello", "label": 1}, None),
    ],
)
def test_the_form_of_rows(row, form):
    assert form_of([row, row]) == form


def test_a_label_column_that_was_named_makes_rows_a_classification():
    assert form_of([{"text": "Hello", "stars": 1}], label_column="stars") is None


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "DPOTrainer"),
        ({"prompt": "Hi", "completion": "a", "label": True}, "KTOTrainer"),
    ],
)
def test_preferences_are_refused(row, match):
    with pytest.raises(UsageError, match=match):
        form_of([row])


@pytest.mark.parametrize(
    ("form", "row", "read"),
    [
        ("messages", {"conversations": SHARED}, {"messages": HI}),
        ("messages", {"messages": json.dumps(HI)}, {"messages": HI}),
        (
            "messages",
            {"conversations": SHARED, "system": "Be kind."},
            {"messages": [{"role": "system", "content": "Be kind."}, *HI]},
        ),
        # Tables write every key for every message.
        ("messages", {"messages": [{**m, "name": None} for m in HI]}, {"messages": HI}),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
            {"messages": HI[:1]},
        ),
        ("messages", {"messages": HI, "tools": '[{"name": "f"}]'}, {"messages": HI, "tools": [{"name": "f"}]}),
        ("prompt-completion", {"prompt": "a", "completion": "b", "id": 1}, {"prompt": "a", "completion": "b"}),
        (
            "prompt-completion",
            {"prompt": "a", "completion": "b", "system": "Be kind."},
            {"prompt": "Be kind.\na", "completion": "b"},
        ),
        (
            "prompt-completion",
            {"prompt": SHARED[:1], "completion": SHARED[1:]},
            {"prompt": HI[:1], "completion": HI[1:]},
        ),
        ("text", {"text": "a", "id": 1}, {"text": "a"}),
        (
            "instruction",
            {"instruction": "a", "input": None, "output": 2},
            {"instruction": "a", "input": "", "system": "", "output": "2", "history": []},
        ),
    ],
)
def test_rows_are_read_into_one_form(form, row, read):
    assert TextTask(form=form).read([row], where="train") == [read]


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("text", {"text": " \n"}),
        ("text", {"text": None}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [HI[0], {"role": "assistant", "content": None}]}),
        ("prompt-completion", {"prompt": "a", "completion": ""}),
        ("instruction", {"instruction": "a", "output": float("nan")}),
    ],
)
def test_rows_without_text_are_left_out_and_counted(form, row, caplog):
    full = {"text": "a", "messages": HI, "prompt": "a", "completion": "b", "instruction": "a", "output": "b"}
    with caplog.at_level(logging.INFO):
        assert len(TextTask(form=form).read([full, row, full], where="The train split")) == 2
    assert "The train split: 1 row without text is left out (the first: row 2)." in caplog.messages
    with pytest.raises(UsageError, match="no row with text"):
        TextTask(form=form).read([row], where="train")


def test_a_split_without_a_column_names_it_and_those_it_has():
    message = (
        r"^Test has no row with text to learn in 'prompt' and 'completion': it has no column 'completion', and its "
    )
    with pytest.raises(UsageError, match=message + r"columns are 'prompt', 'answer'\.$"):
        TextTask(form="prompt-completion").read([{"prompt": "a", "answer": "b"}], where="Test")
    with pytest.raises(UsageError, match=r"in 'prompt' and 'completion'\.$"):
        TextTask(form="prompt-completion").read([{"prompt": "a", "completion": ""}], where="Test")
    with pytest.raises(UsageError, match="Test, row 1: this row has 'text', and the run learns from 'messages'"):
        TextTask(form="messages").read([{"text": "a"}], where="Test")


@pytest.mark.parametrize(
    ("form", "row", "match"),
    [
        ("messages", {"messages": [{"content": "a"}]}, "row 1: .*no 'role'"),
        ("messages", {"messages": ["a"]}, "not a mapping"),
        ("messages", {"messages": "{"}, "not a JSON list of messages: write each cell as"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text is trained on"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "is 3, not a text"),
        ("messages", {"messages": HI, "tools": "{"}, "'tools' holds a text that is not JSON: write it as JSON"),
        ("prompt-completion", {"prompt": "a", "completion": HI}, "must both be texts"),
        ("text", {"text": ["a"]}, "holds .'a'., not a text"),
        ("instruction", {"instruction": "a", "output": "b", "history": ["c"]}, "pairs"),
    ],
)
def test_rows_of_another_form_are_named(form, row, match):
    with pytest.raises(UsageError, match=match):
        TextTask(form=form).read([row], where="train")


def test_an_instruction_in_alpacas_words_and_as_a_chat():
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    read = TextTask(form="instruction").read([row], where="train")[0]
    assert alpaca_prompt(read) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n"
        "### Response:\n"
    )
    assert alpaca_messages(read) == (
        [{"role": "user", "content": "Add.\n1 + 1"}],
        [{"role": "assistant", "content": "2"}],
    )
    chat_row = {"instruction": "Add 3.", "output": "5", "system": "You add.", "history": [["1 + 1", "2"]]}
    read = TextTask(form="instruction").read([chat_row], where="train")[0]
    assert alpaca_prompt(read) == (
        "You add.\n\n### Instruction:\n1 + 1\n\n### Response:\n2\n\n### Instruction:\nAdd 3.\n\n### Response:\n"
    )
    assert [m["role"] for m in alpaca_messages(read)[0]] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("name", "content", "form", "rows"),
    [
        ("a.txt", "One day.\nTwo days.\n\nThree.\nFour.\nFive.\n", "text", 5),
        ("a.csv", "prompt,completion\n" + "a,b\n" * 10, "prompt-completion", 10),
        ("a.jsonl", f"{json.dumps({'messages': HI})}\n" * 10, "messages", 10),
    ],
)
def test_files_are_recognised_and_the_log_says_why(tmp_path, caplog, name, content, form, rows):
    (tmp_path / name).write_text(content)
    arguments = DataArguments(train_file=str(tmp_path / name))
    with caplog.at_level(logging.INFO):
        task = load_task(arguments)
    assert isinstance(task, TextTask)
    assert task.form == form
    assert any(message.startswith("The rows are ") for message in caplog.messages)
    splits = load_splits(arguments, task, seed=0)
    assert len(splits.train) + len(splits.validation) == rows


def test_only_columns_that_are_read_are_named_as_read(caplog):
    with caplog.at_level(logging.INFO):
        recognise([{"id": 1, "conversations": HI, "source": "a"}], DataArguments())
    assert caplog.messages[0].endswith("Columns: conversations; id, source left out.")


def test_unrecognised_columns_are_refused_with_the_recognised_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "1 + 1", "response": "2"}\n' * 8)
    with pytest.raises(UsageError, match="recognised by the columns messages; prompt and completion; instruction"):
        load_task(DataArguments(train_file=str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("weight", 0.0), ("train", False)])
def test_messages_that_are_not_to_be_learned_have_weight_0(key, value):
    row = {"messages": [HI[0], {**HI[1], key: value}]}
    assert TextTask(form="messages").read([row], where="train")[0]["messages"][1] == {**HI[1], "weight": 0}
    row = {"messages": [HI[0], {**HI[1], key: 1}]}
    assert TextTask(form="messages").read([row], where="train")[0]["messages"][1] == HI[1]
    with pytest.raises(UsageError, match=r"has the weight 0\.5"):
        TextTask(form="messages").read([{"messages": [HI[0], {**HI[1], key: 0.5}]}], where="train")


def test_text_with_label_words_stays_a_classification(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n' * 4)
    arguments = DataArguments(train_file=str(tmp_path / "a.jsonl"), label_words=["bad", "good"])
    assert load_task(arguments).kind == "classification"
    assert load_task(DataArguments(train_file=str(tmp_path / "a.jsonl"))).kind == "classification"


def test_an_unusual_role_is_reported_once_with_its_place(caplog):
    rows = [{"messages": HI}, *[{"messages": [{"role": "narrator", "content": "Once"}, *HI]}] * 2]
    with caplog.at_level(logging.WARNING):
        assert len(TextTask(form="messages").read(rows, where="Train")) == 3
    assert caplog.messages == ["Train, row 2: 'narrator' is not a usual role; it is left to the chat template."]
