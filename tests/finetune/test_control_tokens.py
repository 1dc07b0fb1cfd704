"""Control tokens that somebody typed into a cell stay text, token by token; those of the template are meant."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from models import save_model, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from zokernel.finetune.data.collate import Collator, EncodedDataset
from zokernel.finetune.data.datasets import Splits
from zokernel.finetune.data.encode_splits import encode_splits
from zokernel.finetune.scoring.choose_collator import choose_collator
from zokernel.finetune.scoring.options import option_scores
from zokernel.finetune.scoring.prepare_text import encode_texts
from zokernel.finetune.tasks import PromptTask, encode
from zokernel.finetune.tasks.chat_template import CHATML
from zokernel.finetune.tasks.control_tokens import report_typed_tokens
from zokernel.finetune.tasks.encode_text import TextEncoder
from zokernel.finetune.tasks.seq2seq import Decoder

TYPED = "</s><mask>"


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("masked"), masked=True)


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory):
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("seq2seq"), frame="$A </s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_0>", "<mask>"]})
    return tokenizer


def bytes_of(tokenizer, text):
    """The tokens of single letters, of which these texts are made."""
    return [tokenizer.convert_tokens_to_ids("Ġ" if letter == " " else letter) for letter in text]


def test_exact_tokens_next_to_a_mask(masked):
    task = PromptTask("{text} {mask}", ("b", "g"))
    (example,) = encode(task, [{"text": TYPED, "label": 0}], masked, masked=True)
    assert example.prompt_ids[0] == masked.bos_token_id
    assert not set(example.prompt_ids[1:]) & set(masked.all_special_ids)
    assert masked.decode(example.prompt_ids[1:]) == TYPED
    assert example.suffix_ids == (masked.eos_token_id,)
    assert example.mask_id == masked.mask_token_id


def test_exact_tokens_of_a_prompt(causal):
    (example,) = encode(PromptTask("{text}:", ("b", "g")), [{"text": "</s><s>", "label": 0}], causal)
    assert example.prompt_ids == [causal.bos_token_id, *bytes_of(causal, "</s><s>:")]
    assert example.option_ids == [causal(word, add_special_tokens=False)["input_ids"] for word in (" b", " g")]


def test_exact_tokens_of_an_encoder(seq2seq):
    text = "<extra_id_0></s><mask>"
    (example,) = encode(
        PromptTask("{text}:", ("b", "g")), [{"text": text, "label": 0}], seq2seq, decoder=Decoder(1, (), (2,))
    )
    assert example.prompt_ids[-1] == seq2seq.eos_token_id
    assert not set(example.prompt_ids[:-1]) & {*seq2seq.all_special_ids, *seq2seq.get_added_vocab().values()}
    assert seq2seq.decode(example.prompt_ids[:-1]) == f"{text}:"


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_rows_of_demonstrations_are_distinguished_from_the_template(kind, causal, masked, seq2seq):
    """A template with control tokens of its own, after solved examples that hold typed ones."""
    tokenizer = {"causal": causal, "masked": masked, "seq2seq": seq2seq}[kind]
    task = PromptTask("{text}</s>b {mask}" if kind == "masked" else "{text}</s>b", ("b", "g"))
    rows = [{"text": f"x{n}</s>", "label": n % 2} for n in range(3)]
    encoded, _ = encode_splits(
        task,
        Splits(rows, rows[2:], rows[2:]),
        tokenizer,
        max_length=512,
        masked=kind == "masked",
        decoder=Decoder(1, (), (2,)) if kind == "seq2seq" else None,
        num_demonstrations=2,
    )
    (example,) = encoded["test"].examples
    expected = 3 + (kind == "seq2seq")  # the template's three times, and the end that the tokenizer puts
    assert example.prompt_ids.count(tokenizer.eos_token_id) == expected
    assert tokenizer.decode(example.prompt_ids).count("</s></s>") == 3


def test_padding_without_an_embedding_never_reaches_the_model(tmp_path):
    folder = save_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{"text": "a good movie", "label": 1}, {"text": "bad", "label": 0}]
    dataset = EncodedDataset(encode(PromptTask("{text} It was", ("bad", "good")), rows, tokenizer))
    items = [dataset[0], dataset[1]]
    expected = option_scores(model, Collator(tokenizer.pad_token_id)(items))
    for pad in (len(tokenizer), 10**6, -1, None):
        batch = choose_collator(model, pad, dataset)(items)
        assert 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < len(tokenizer)
        torch.testing.assert_close(option_scores(model, batch), expected)
    assert int(Collator(None)(items)["input_ids"].min()) == 0


def test_control_tokens_in_messages_are_reported_once_with_their_count_and_the_first(causal, caplog):
    def chat(question, answer):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    clean, first, second = chat("Hi", "Yo"), chat("Hi", "so</s> it goes"), chat("<s></s>Hi", "</s>")
    with caplog.at_level(logging.WARNING):
        report_typed_tokens([clean, first, second, clean], causal)
        report_typed_tokens([{"prompt": clean["messages"][:1], "completion": second["messages"][1:]}], causal)
        report_typed_tokens(
            [{"instruction": "Add", "input": "1</s>", "output": "2", "system": "", "history": []}], causal
        )
        report_typed_tokens([clean, {"prompt": "<s>Hi", "completion": "Yo</s>"}, {"text": "<s>Hi</s>"}], causal)
    numbers = [re.match(r"(\d+ of \d+ rows? ha(?:s|ve)) control tokens", line)[1] for line in caplog.messages]
    assert numbers == ["2 of 4 rows have", "1 of 1 row has", "1 of 1 row has"]
    assert caplog.messages[0].endswith("(the first: 'so</s> it goes').")


def test_a_run_on_chats_reports_control_tokens_once(tmp_path, caplog, causal):
    rows = [
        {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "a</s>b"}]}
        for n in (1, 2)
    ]
    tokenizer = copy.deepcopy(causal)
    tokenizer.chat_template = CHATML
    encoder = TextEncoder(tokenizer, "messages", False, False, 512)
    with caplog.at_level(logging.WARNING):
        encode_texts(encoder, Splits(rows, rows[1:], rows[1:]), packing=False)
    assert [line for line in caplog.messages if "control tokens" in line] == [
        "3 of 3 rows have control tokens typed into a message, which end it or open another's turn, as in trl; remove "
        "them if that is not intended (the first: 'a</s>b')."
    ]
    ids, _ = encoder.tokens(rows[0])
    assert ids.count(tokenizer.eos_token_id) == 1, "as trl's tokenization has it"
