"""Templates, labels and tokenization by character position."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from zokernel.errors import UsageError
from zokernel.finetune.tasks import PromptTask, encode, get_task

SST2 = PromptTask("{sentence} It was", ("terrible", "great"))


@pytest.fixture(scope="module")
def tokenizer(tiny_lm_path):
    return AutoTokenizer.from_pretrained(tiny_lm_path)


def test_prompt_plus_option_is_the_text_tokenized_as_one(tokenizer):
    rows = [{"sentence": "a bad movie .", "label": "0"}, {"sentence": "É étrange — très «bon»", "label": 1}]
    for row, example in zip(rows, encode(SST2, rows, tokenizer), strict=True):
        for option, option_ids in zip(SST2.options(), example.option_ids, strict=True):
            assert example.prompt_ids + option_ids == tokenizer(SST2.prompt(row) + option)["input_ids"]
        assert tokenizer.decode(example.prompt_ids) == SST2.prompt(row)
    assert [example.label for example in encode(SST2, rows, tokenizer)] == [0, 1]


def test_known_words_are_one_token_and_unknown_ones_several(tokenizer):
    row = [{"sentence": "a movie", "label": 0}]
    assert [len(ids) for ids in encode(SST2, row, tokenizer)[0].option_ids] == [1, 1]
    rare = PromptTask("{sentence} It was", ("terrible", "magnificent"))
    lengths = [len(ids) for ids in encode(rare, row, tokenizer)[0].option_ids]
    assert lengths[0] == 1
    assert lengths[1] > 1


def test_a_template_that_ends_in_a_line_break_takes_the_word_without_a_space():
    task = get_task("rte")
    row = {"sentence1": "A.", "sentence2": "B", "label": "not_entailment"}
    assert task.prompt(row).endswith("?\n")
    assert task.options() == ("Yes", "No")
    assert task.label(row) == 1


def test_long_prompts_lose_their_front(tokenizer):
    row = {"sentence": "bad " * 200, "label": 0}
    full = encode(SST2, [row], tokenizer)[0]
    cut = encode(SST2, [row], tokenizer, max_length=32)[0]
    assert len(cut.prompt_ids) + 1 == 32
    assert cut.prompt_ids == full.prompt_ids[-31:]
    assert cut.option_ids == full.option_ids


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PromptTask("It was", ("a", "b")), "must name columns"),
        (lambda: PromptTask("{sentence It was", ("a", "b")), "malformed"),
        (lambda: PromptTask("{sentence}", ("a",)), "two or more distinct"),
        (lambda: PromptTask("{sentence}", ("a", "a")), "two or more distinct"),
        (
            lambda: PromptTask("{sentence}", ("a", "b"), labels=("x",)),
            "2 label words and 1 label were given: give one label for each word",
        ),
        (lambda: get_task("sst3"), "There is no task 'sst3'"),
        (lambda: SST2.label({"label": 2}), "none of 0, 1"),
        (lambda: SST2.check_columns([{"text": "a", "label": 0}], where="train.csv"), "no column 'sentence'"),
        (lambda: SST2.check_columns([{"sentence": "a"}], where="train.csv"), "no column 'label'"),
    ],
)
def test_mistakes_are_named(make, match):
    with pytest.raises(UsageError, match=match):
        make()
