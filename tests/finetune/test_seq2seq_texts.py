"""Chats, instructions and completions as what an encoder reads and a decoder writes: tokens, flags, refusals."""

from __future__ import annotations

import logging

import pytest
import torch
from chats import PLAIN, turns
from models import SEQ2SEQ, save_model
from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from zokernel.errors import UsageError
from zokernel.finetune.data.check_text import check_text, text_encoder
from zokernel.finetune.data.collate_text import TextCollator
from zokernel.finetune.scoring.language_head import token_losses
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks.seq2seq import Decoder, decoder_of
from zokernel.finetune.tasks.text import TextTask

ALPACA = {"instruction": "Judge.", "input": "a film", "output": "It was good", "system": "Be brief"}
# Form, row, what the encoder reads without a chat template, and what the decoder writes.
ROWS = {
    "prompt and completion": (
        "prompt-completion",
        {"prompt": "a good film", "completion": " It was great"},
        "a good film",
        " It was great",
    ),
    "messages as prompt and completion": (
        "prompt-completion",
        {"prompt": turns("a film", system="Be brief"), "completion": turns("", "great")[1:]},
        "Be brief\na film",
        "great",
    ),
    "messages": ("messages", {"messages": turns("a film", "bad", "and?")}, "a film", "bad"),
    "ShareGPT": (
        "messages",
        {"conversations": [{"from": "human", "value": "Rome?"}, {"from": "gpt", "value": "Yes"}], "system": "Maybe"},
        "Maybe\nRome?",
        "Yes",
    ),
    "Alpaca": ("instruction", ALPACA, "Be brief\nJudge.\na film", "It was good"),
    "Alpaca without input": ("instruction", {"instruction": "Judge.", "output": "bad"}, "Judge.", "bad"),
}


@pytest.fixture(scope="module", params=SEQ2SEQ)
def parts(request, tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp(request.param), request.param)
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval(), folder


@pytest.fixture
def model(parts):
    return parts[0]


@pytest.fixture
def tokenizer(parts):
    return AutoTokenizer.from_pretrained(parts[1])


def read(form, *rows):
    return TextTask(form=form).read(list(rows), where="Train")


def encoder_of(model, tokenizer, form, *, max_length=64):
    decoder = decoder_of(model, tokenizer)
    return text_encoder(
        TextTask(form=form), tokenizer, DataArguments(), max_length=max_length, kind="seq2seq", decoder=decoder
    )


def check(form, rows, tokenizer, **flags):
    check_text(
        TextTask(form=form),
        read(form, *rows),
        tokenizer,
        DataArguments(**flags),
        kind="seq2seq",
        objective="cross_entropy",
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS)
def test_tokens_and_loss_are_those_of_the_tokenizer_and_the_model(name, model, tokenizer):
    form, row, source, answer = ROWS[name]
    (example,) = encoder_of(model, tokenizer, form).encode(read(form, row), where="Train")
    feature = {"input_ids": tokenizer(source)["input_ids"], "labels": tokenizer(text_target=answer)["input_ids"]}
    assert example.source_ids == feature["input_ids"]
    assert example.input_ids[1:] == feature["labels"]
    assert example.scored == list(range(1, len(example.input_ids)))
    expected = DataCollatorForSeq2Seq(tokenizer, model=model)([feature])
    batch = TextCollator(tokenizer.pad_token_id)([vars(example)])
    assert batch["decoder_input_ids"].tolist() == expected["decoder_input_ids"].tolist()
    assert token_losses(model, batch).mean().item() == pytest.approx(model(**expected).loss.item(), rel=1e-6)


def test_a_chat_template_renders_all_that_comes_before_the_answer(model, tokenizer):
    tokenizer.chat_template = PLAIN
    chat = turns("a film", "bad", "and Rome?", "Yes", "Maybe", system="Be brief")
    (row,) = read("messages", {"messages": chat})
    example, truncated = encoder_of(model, tokenizer, "messages", max_length=200).example(row)
    expected = tokenizer.apply_chat_template(chat[:4], add_generation_prompt=True, return_dict=False)
    assert example.source_ids == expected
    assert example.input_ids[1:] == tokenizer(text_target="Yes")["input_ids"]
    assert truncated == []
    (row,) = read("instruction", ALPACA | {"history": [["a film", "bad"]]})
    example, _ = encoder_of(model, tokenizer, "instruction", max_length=200).example(row)
    messages = turns("a film", "bad", "Judge.\na film", system="Be brief")
    assert example.source_ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_messages_of_weight_0_are_read_and_not_learned(model, tokenizer):
    tokenizer.chat_template = PLAIN
    chat = turns("a film", "bad", "and?", "good")
    encoder = encoder_of(model, tokenizer, "messages", max_length=200)

    def weighted(*weights):
        zero = {1: weights[0], 3: weights[1]}
        return read("messages", {"messages": [m | {"weight": zero.get(n, 1)} for n, m in enumerate(chat)]})[0]

    def encoded(messages):
        return encoder.example(read("messages", {"messages": messages})[0])[0]

    assert encoder.example(weighted(0, 1))[0] == encoded(chat)
    assert encoder.example(weighted(1, 0))[0] == encoded(chat[:2])
    assert encoder.example(weighted(0, 0))[0].scored == []
    # What is asked for in a prediction is the next answer, whatever was learned.
    expected = tokenizer.apply_chat_template(chat[:3], add_generation_prompt=True, return_dict=False)
    assert encoder.request(weighted(1, 0)) == expected


def test_rows_without_an_answer_are_left_out_and_counted(model, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = read("messages", {"messages": turns("a", "b")}, {"messages": turns("a")}, {"messages": [*turns("a"), call]})
    assert len(encoder_of(model, tokenizer, "messages").encode(rows, where="Train")) == 1
    assert "Train: 2 of 3 rows have no token to learn and are left out." in caplog.text


def test_long_texts_lose_their_end_long_chats_their_beginning_and_the_log_counts_them(model, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    long = "good " * 40
    rows = read(
        "prompt-completion",
        {"prompt": long, "completion": "bad"},
        {"prompt": "a", "completion": long},
        {"prompt": long, "completion": long},
    )
    examples = encoder_of(model, tokenizer, "prompt-completion", max_length=20).encode(rows, where="Train")
    options = {"truncation": True, "max_length": 20}
    assert examples[0].source_ids == tokenizer(long, **options)["input_ids"]
    assert examples[1].input_ids[1:] == tokenizer(text_target=long, **options)["input_ids"]
    assert examples[1].input_ids[-1] == tokenizer.eos_token_id
    assert "Train: 2 of 3 rows lose the end of their source at 20 tokens." in caplog.text
    assert "Train: 2 of 3 rows lose the end of their answer at 20 tokens." in caplog.text
    tokenizer.chat_template = PLAIN
    (row,) = read("messages", {"messages": turns(long + "Rome?", "bad")})
    encoder = encoder_of(model, tokenizer, "messages", max_length=40)
    example, truncated = encoder.example(row)
    whole = tokenizer.apply_chat_template(turns(long + "Rome?"), add_generation_prompt=True, return_dict=False)
    assert len(example.source_ids) == 40
    assert example.source_ids[-39:] == whole[-39:]
    assert truncated == ["the beginning of {} source"]
    caplog.clear()
    assert encoder.request(row) == example.source_ids
    assert "A row loses the beginning of its source at 40 tokens" in caplog.text
    with pytest.raises(UsageError, match=r"--max_length 1 leaves no room for an answer"):
        encoder_of(model, tokenizer, "prompt-completion", max_length=1).example(rows[1])


def test_an_end_token_already_in_the_text_is_not_doubled(model, tokenizer):
    encoder = encoder_of(model, tokenizer, "prompt-completion")
    plain, ended = (
        encoder.example(read("prompt-completion", {"prompt": "a", "completion": text})[0])[0]
        for text in ("good", f"good{tokenizer.eos_token}")
    )
    assert plain == ended


def test_the_language_frames_answers_as_the_family_does(tmp_path):
    """M2M100 writes the language first; mBART writes it last, and its decoder begins with it."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path, "bart"))
    bos, pad, end = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    frame = lambda single: processors.TemplateProcessing(single=single, special_tokens=[("<s>", bos), ("</s>", end)])  # noqa: E731
    tokenizer.backend_tokenizer.post_processor = frame("$A </s> <s>")  # <s> stands for a language
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    mbart = MBartForConditionalGeneration(MBartConfig(vocab_size=len(tokenizer), pad_token_id=pad, **sizes))
    decoder = decoder_of(mbart, tokenizer)
    assert decoder == Decoder(bos, (), (end, bos))
    encoder = encoder_of(mbart, tokenizer, "prompt-completion", max_length=8)
    (row,) = read("prompt-completion", {"prompt": "good " * 20, "completion": "bad " * 20})
    example, _ = encoder.example(row)
    assert example.input_ids[0] == bos
    for ids in (example.source_ids, example.input_ids[1:]):
        assert len(ids) == 8
        assert ids[-2:] == [end, bos]


@pytest.mark.parametrize(
    ("form", "row", "flags", "match"),
    [
        ("text", {"text": "a"}, {}, r"Plain text trains causal.*prompt and completion"),
        ("prompt-completion", {"prompt": "a", "completion": "b"}, {"packing": True}, r"--packing"),
        ("prompt-completion", {"prompt": "a", "completion": "b"}, {"completion_only_loss": False}, "--completion_only"),
        ("instruction", ALPACA, {"completion_only_loss": False}, r"--completion_only_loss false.*encoder"),
        ("messages", {"messages": turns("a", "b")}, {"assistant_only_loss": False}, r"--assistant_only_loss false"),
        ("messages", {"messages": turns("a", "b")}, {"completion_only_loss": True}, "--completion_only_loss"),
        ("prompt-completion", {"prompt": "a", "completion": "b"}, {"chat_template": "chatml"}, "--chat_template"),
        (
            "messages",
            {"messages": turns("a", "b", "c", "d")},
            {},
            r"1 of 2 rows.*needs a chat template.*--chat_template",
        ),
        ("messages", {"messages": turns("a", "b"), "tools": [{"name": "f"}]}, {}, r"tools.*--chat_template"),
        ("instruction", ALPACA | {"history": [["a", "b"]]}, {}, r"1 of 2 rows.*several turns.*--chat_template"),
        ("messages", {"messages": turns("a", "b")}, {"chat_template": "{{ nothing('x') }}"}, "does not take a chat"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(form, row, flags, match, tokenizer):
    single = {"messages": {"messages": turns("x", "y")}, "instruction": ALPACA}.get(form, row)
    with pytest.raises(UsageError, match=match):
        check(form, [single, row], tokenizer, **flags)


def test_redundant_flags_are_accepted_and_the_log_says_what_is_learned(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    check("messages", [{"messages": turns("a", "b")}], tokenizer, assistant_only_loss=True)
    assert "The encoder reads what comes before the last answer; the decoder learns to write that." in caplog.text
    caplog.clear()
    chats = [{"messages": turns("a", "b")}, {"messages": turns("a", "b", "c", "d")}]
    check("messages", chats, tokenizer, chat_template="chatml")
    assert "before the last answer as the chat template renders it" in caplog.text
    assert "1 of 2 rows has earlier answers, which the encoder reads but the decoder does not learn." in caplog.text
    check("instruction", [ALPACA], tokenizer, completion_only_loss=True)
