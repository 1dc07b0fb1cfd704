"""Which tokens of a chat count, token by token; what is cut, left out and refused."""

from __future__ import annotations

import logging

import pytest
from chats import MARKED, PLAIN, chat_tokenizer, turns

from zokernel.errors import UsageError
from zokernel.finetune.data.check_flags import check_flags
from zokernel.finetune.data.check_text import check_text, text_encoder
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.tasks.chat_template import choose_chat_template
from zokernel.finetune.tasks.text import TextTask

# Renders earlier answers in another way than the last one, as templates of thinking models do.
CHANGING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def learned(encoder, row):
    """Return the text of each run of tokens that count, and all of the text."""
    ids, marks = encoder.tokens(row)
    runs, last = [], False
    for token, mark in zip(ids, marks, strict=True):
        if mark:
            runs = [*runs[:-1], runs[-1] + [token]] if last else [*runs, [token]]
        last = mark
    return [encoder.tokenizer.decode(run) for run in runs], encoder.tokenizer.decode(ids)


def encoder_of(form, tokenizer, *, max_length=512, **flags):
    return text_encoder(TextTask(form=form), tokenizer, DataArguments(**flags), max_length=max_length)


CHATS = [
    (turns("Was it good?", "No."), ["No.<|im_end|>"]),
    (turns("Hi", "Hello ", "And?", "Bye", system="Be kind."), ["Hello <|im_end|>", "Bye<|im_end|>"]),
    (turns("Hi", "two\n\nlines\n", "And?"), ["two\n\nlines\n<|im_end|>"]),
    ([{"role": "assistant", "content": "Welcome."}, *turns("Hi", "Yes?")], ["Welcome.<|im_end|>", "Yes?<|im_end|>"]),
    ([*turns("Hi", "Yes?"), {"role": "assistant", "content": "Hm?"}], ["Yes?<|im_end|>", "Hm?<|im_end|>"]),
]


@pytest.mark.parametrize(
    ("form", "row", "match"),
    [
        ("prompt-completion", {"instruction": "a", "output": "b"}, "^it has 'instruction', 'output', and the run "),
        ("messages", {"text": "a"}, "rows with 'messages': put what is to be answered into a column 'messages'"),
        ("instruction", {"prompt": "a"}, "learned from rows with 'instruction' and 'output'"),
        ("text", {"prompt": "a"}, "learned from rows with 'text'"),
        ("text", {}, "^it has no column, and"),
        ("text", {"text": None}, "nothing to answer in 'text'"),
        ("instruction", {"instruction": " "}, "nothing to answer in 'instruction'"),
        ("prompt-completion", {"prompt": None, "completion": "b"}, "nothing to answer in 'prompt'"),
        ("messages", {"prompt": ""}, "nothing to answer in 'messages'"),
    ],
)
def test_a_request_of_another_form_is_named(form, row, match):
    with pytest.raises(UsageError, match=match):
        encoder_of(form, chat_tokenizer(PLAIN)).request(row)


@pytest.mark.parametrize(
    ("row", "length", "reason"),
    [
        ({"messages": turns("Hi", "Hello")}, 2, "within 2 tokens: raise --max_length."),
        ({"messages": turns("Hi")}, 2, ": no chat has an assistant's turn."),
        ({"messages": [*turns("Hi"), {"role": "assistant", "content": "a", "weight": 0}]}, 512, "turns have weight 0."),
    ],
)
def test_the_reason_why_no_token_counts_is_given(row, length, reason):
    with pytest.raises(UsageError, match=rf"^Train: no row has a token to learn.*{reason}$"):
        encoder_of("messages", chat_tokenizer(MARKED), max_length=length).encode([row], where="Train")


@pytest.mark.parametrize(
    ("form", "row", "empty"),
    [
        ("text", "", True),
        ("text", {"text": float("nan")}, True),
        ("instruction", {"instruction": "", "input": "a"}, True),
        ("prompt-completion", {"prompt": " ", "completion": "b"}, True),
        ("prompt-completion", {"prompt": []}, True),
        ("prompt-completion", {"prompt": "", "system": "Sing."}, False),
        ("messages", {"messages": []}, True),
        ("messages", "", True),
        ("messages", {"messages": turns("Hi")}, False),
    ],
)
def test_requests_without_text_are_told_apart(form, row, empty):
    assert encoder_of(form, chat_tokenizer(PLAIN)).asks_nothing(row) == empty


def test_a_request_needs_no_answer():
    encoder = encoder_of("prompt-completion", chat_tokenizer(PLAIN))
    requests = [{"prompt": "Hi", **rest} for rest in ({}, {"completion": ""}, {"completion": None})]
    assert len({tuple(encoder.request(row)) for row in ["Hi", *requests]}) == 1


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "plain"])
@pytest.mark.parametrize(("messages", "expected"), CHATS)
def test_only_what_the_assistant_wrote_is_learned(template, messages, expected):
    runs, whole = learned(encoder_of("messages", chat_tokenizer(template)), {"messages": messages})
    assert runs == expected
    assert whole == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "plain"])
def test_messages_of_weight_0_are_not_learned(template):
    messages = turns("Hi", "Hello ", "And?", "Bye")
    messages[1]["weight"] = 0
    runs, whole = learned(encoder_of("messages", chat_tokenizer(template)), {"messages": messages})
    assert runs == ["Bye<|im_end|>"]
    assert "Hello " in whole
    row = {"prompt": messages[:1], "completion": messages[1:]}
    encoder = encoder_of("prompt-completion", chat_tokenizer(template), assistant_only_loss=True)
    assert learned(encoder, row)[0] == ["Bye<|im_end|>"]
    for form, other in (("messages", {"messages": messages}), ("prompt-completion", row)):
        with pytest.raises(UsageError, match="weight 0"):
            encoder_of(form, chat_tokenizer(template), assistant_only_loss=False).tokens(other)


def test_the_whole_chat_is_learned_if_asked_for():
    encoder = encoder_of("messages", chat_tokenizer(PLAIN), assistant_only_loss=False)
    ids, marks = encoder.tokens({"messages": turns("Hi", "Hello")})
    assert all(marks)
    encoded = encoder.encode([{"messages": turns("Hi", "Hello")}], where="train")[0]
    assert encoded.scored == list(range(1, len(ids)))


def test_a_template_that_changes_what_came_before_is_refused_unless_it_is_not_needed():
    tokenizer = chat_tokenizer(CHANGING)
    row = {"messages": turns("Hi", "Hello", "And?", "Bye")}
    with pytest.raises(UsageError, match="generation"):
        encoder_of("messages", tokenizer).tokens(row)
    assert all(encoder_of("messages", tokenizer, assistant_only_loss=False).tokens(row)[1])


def test_a_completion_of_messages_or_text_is_learned():
    tokenizer = chat_tokenizer(PLAIN)
    messages = turns("Hi", "Hello", system="S")
    runs, _ = learned(encoder_of("prompt-completion", tokenizer), {"prompt": messages[:2], "completion": messages[2:]})
    assert runs == ["Hello<|im_end|>\n"]
    runs, whole = learned(encoder_of("prompt-completion", tokenizer), {"prompt": "Hi there", "completion": " you"})
    assert (runs, whole) == ([" you<|im_end|>"], "Hi there you<|im_end|>")
    everything = encoder_of("prompt-completion", tokenizer, completion_only_loss=False)
    assert learned(everything, {"prompt": "Hi", "completion": " you"})[0] == ["Hi you<|im_end|>"]


def test_an_existing_end_of_text_is_not_repeated():
    encoder = encoder_of("text", chat_tokenizer())
    assert encoder.tokens({"text": "Hi<|im_end|>"}) == encoder.tokens({"text": "Hi"})


def test_instructions_are_a_chat_where_there_is_a_template_and_alpacas_words_elsewhere():
    row = TextTask(form="instruction").read([{"instruction": "Add", "input": "1+1", "output": "2"}], where="x")[0]
    runs, whole = learned(encoder_of("instruction", chat_tokenizer(PLAIN)), row)
    assert runs == ["2<|im_end|>\n"]
    assert whole == "<|im_start|>user\nAdd\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    runs, whole = learned(encoder_of("instruction", chat_tokenizer(None)), row)
    assert runs == ["2<|im_end|>"]
    assert whole.endswith("### Input:\n1+1\n\n### Response:\n2<|im_end|>")


def test_tools_and_further_arguments_reach_the_template():
    template = "{{ tools | tojson if tools else '' }}{{ mood | default('') }}" + MARKED
    encoder = encoder_of("messages", chat_tokenizer(template))
    row = {"messages": turns("Hi", "Yo"), "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "calm"}}
    runs, whole = learned(encoder, row)
    assert whole.startswith('[{"name": "f"}]calm<|im_start|>user')
    assert runs == ["Yo<|im_end|>"]


def test_long_rows_lose_their_end_and_those_with_nothing_left_are_left_out(caplog):
    tokenizer = chat_tokenizer(MARKED)
    rows = [{"messages": turns("Hi", "Hello")}, {"messages": turns("a" * 60, "b")}, {"messages": turns("Hi", "c" * 60)}]
    length = len(encoder_of("messages", tokenizer).tokens(rows[0])[0])
    with caplog.at_level(logging.INFO):
        examples = encoder_of("messages", tokenizer, max_length=length).encode(rows, where="Train")
    assert caplog.messages == [
        f"Train: 2 of 3 rows lose their end at {length} tokens.",
        "Train: 1 of 3 rows has no token to learn and is left out.",
    ]
    ids, marks = encoder_of("messages", tokenizer).tokens(rows[2])
    assert examples[1].input_ids == ids[:length]
    assert examples[1].scored == [n for n, mark in enumerate(marks[:length]) if mark]
    with pytest.raises(UsageError, match="no row has a token to learn within 4 tokens"):
        encoder_of("messages", tokenizer, max_length=4).encode(rows, where="Train")


def test_the_prompt_that_is_shown_ends_where_the_answer_begins():
    tokenizer = chat_tokenizer(PLAIN)
    ids, answer = encoder_of("messages", tokenizer).prompt({"messages": turns("Hi", "Yo", "And?", "Bye")})
    assert answer == "Bye"
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
    ids, answer = encoder_of("text", tokenizer).prompt({"text": "good bad good bad"})
    assert tokenizer.decode(ids) + answer == "good bad good bad"
    assert answer


def test_templates_are_named_read_or_given(tmp_path):
    (tmp_path / "mine.jinja").write_text(PLAIN)
    for template in (str(tmp_path / "mine.jinja"), PLAIN):
        tokenizer = chat_tokenizer(None)
        choose_chat_template(tokenizer, template)
        assert tokenizer.chat_template == PLAIN
    tokenizer = chat_tokenizer({"default": MARKED, "short": PLAIN})
    choose_chat_template(tokenizer, "short")
    assert tokenizer.chat_template == PLAIN
    choose_chat_template(tokenizer := chat_tokenizer(None), "chatml")
    assert learned(encoder_of("messages", tokenizer), {"messages": CHATS[1][0]})[0] == CHATS[1][1]
    with pytest.raises(UsageError, match=r"no chat template 'nonsense'.*chatml"):
        choose_chat_template(tokenizer, "nonsense")


@pytest.mark.parametrize(
    ("form", "row", "flags", "match"),
    [
        ("messages", {"messages": turns("a", "b")}, {}, "no chat template.*--chat_template"),
        ("messages", {"messages": turns("a", "b")}, {"chat_template": "{{ nothing('x') }}"}, "does not take a chat"),
        ("messages", {"messages": turns("a", "b")}, {"completion_only_loss": True}, "--completion_only_loss"),
        ("text", {"text": "a"}, {"assistant_only_loss": True}, "--assistant_only_loss"),
        ("text", {"text": "a"}, {"chat_template": "chatml"}, "--chat_template"),
        ("text", {"text": "a"}, {"num_demonstrations": 2}, "--num_demonstrations"),
        ("text", {"text": "a"}, {"calibrate": True}, "--calibrate"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_a_model_is_loaded(form, row, flags, match):
    task, arguments = TextTask(form=form), DataArguments(**flags)

    def check():
        check_flags(task, arguments, ModelArguments())
        check_text(task, [row], chat_tokenizer(None), arguments, kind="causal", objective="cross_entropy")

    with pytest.raises(UsageError, match=match):
        check()


@pytest.mark.parametrize(("kind", "objective"), [("masked", "cross_entropy"), ("causal", "accuracy")])
def test_models_and_objectives_that_do_not_fit_are_refused(kind, objective):
    with pytest.raises(UsageError, match="masked" if kind == "masked" else "accuracy"):
        check_text(TextTask(), [{"text": "a"}], chat_tokenizer(), DataArguments(), kind=kind, objective=objective)
