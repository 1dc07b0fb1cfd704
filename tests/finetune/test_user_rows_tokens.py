"""What becomes of users' texts in the tokenizer: typed control tokens, words that are alike, prompts that are cut."""

from __future__ import annotations

import logging

import pytest
from models import save_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from zokernel.errors import UsageError
from zokernel.finetune.data.datasets import Splits
from zokernel.finetune.data.encode_splits import encode_splits
from zokernel.finetune.tasks import ChoiceTask, GenerationTask, PromptTask, demonstrations, encode

OWN = PromptTask("{text} It was", ("bad", "good"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    save_tokenizer(folder, masked=True)
    return AutoTokenizer.from_pretrained(folder)


def controls(tokenizer):
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def test_typed_control_tokens_stay_text(causal):
    text = " ".join(controls(causal))
    plain, example = encode(OWN, [{"text": "a bad movie", "label": 0}, {"text": f"a {text} movie", "label": 1}], causal)
    frame = set(causal("")["input_ids"])
    assert not (set(example.prompt_ids) & set(causal.all_special_ids)) - frame
    assert causal.decode(example.prompt_ids, skip_special_tokens=True) == f"a {text} movie It was"
    assert example.option_ids == plain.option_ids
    assert example.prompt_ids[: len(causal("")["input_ids"])] == causal("")["input_ids"]


def test_control_tokens_of_the_template_are_encoded_as_such(causal):
    end = causal.eos_token
    task = PromptTask(f"{{text}}{end} It was", ("bad", "good"))
    rows = [{"text": "a movie", "label": 0}, {"text": f"a {end}movie", "label": 0}]
    plain, typed = encode(task, rows, causal)
    assert plain.prompt_ids == causal(f"a movie{end} It was")["input_ids"]
    assert typed.prompt_ids.count(causal.eos_token_id) == plain.prompt_ids.count(causal.eos_token_id)
    index = len(typed.prompt_ids) - typed.prompt_ids[::-1].index(causal.eos_token_id) - 1
    assert typed.prompt_ids[index:] == plain.prompt_ids[-(len(typed.prompt_ids) - index) :]
    assert causal.decode(typed.prompt_ids[:index], skip_special_tokens=True) == f"a {end}movie"
    assert typed.option_ids == plain.option_ids


def test_typed_control_tokens_in_options_answers_and_demonstrations_stay_text(causal):
    end, special = causal.eos_token, causal.eos_token_id
    choice = encode(ChoiceTask("{q}", ("{a}", "{b}")), [{"q": "which", "a": f"x{end}", "b": "y", "label": 0}], causal)
    answer = encode(GenerationTask("{q}", label_column="a"), [{"q": "which", "a": [f"x{end}"]}], causal)
    assert special not in choice[0].option_ids[0]
    assert special not in answer[0].option_ids[0]
    assert causal.decode(answer[0].option_ids[0]) == f" x{end}\n"
    context = demonstrations(OWN, [{"text": f"a {end}", "label": 0}])
    (example,) = encode(OWN, [{"text": "a movie", "label": 0}], causal, context=context)
    assert special not in example.prompt_ids[1:]
    assert causal.decode(example.prompt_ids, skip_special_tokens=True) == f"{context}a movie It was"


def test_typed_control_tokens_stay_text_next_to_the_mask(masked):
    text = " ".join(controls(masked))
    task = PromptTask("{text} It was {mask}. {text}", ("bad", "good"))
    (example,) = encode(task, [{"text": f"a {text} movie", "label": 1}], masked, masked=True)
    (plain,) = encode(task, [{"text": "a movie", "label": 1}], masked, masked=True)
    special, frame = set(masked.all_special_ids), set(masked("")["input_ids"])
    assert example.mask_id == masked.mask_token_id
    assert not (set(example.prompt_ids) | set(example.suffix_ids)) & special - frame
    assert masked.decode(example.prompt_ids, skip_special_tokens=True) == f"a {text} movie It was"
    assert masked.decode(example.suffix_ids, skip_special_tokens=True) == f". a {text} movie"
    assert (example.prompt_ids[0], example.suffix_ids[-1]) == (plain.prompt_ids[0], plain.suffix_ids[-1])


def test_label_words_with_equal_tokens_are_refused(causal):
    from tokenizers import normalizers

    rows = [{"text": "a movie", "label": n % 2} for n in range(2)]
    splits = Splits(rows, rows, rows)
    task = PromptTask("{text} It was", ("good", "Good"))
    encoded, context = encode_splits(task, splits, causal, max_length=64, masked=False)
    assert (set(encoded), context) == ({"train", "validation", "test"}, "")
    normalizer = causal.backend_tokenizer.normalizer
    causal.backend_tokenizer.normalizer = normalizers.Lowercase()
    try:
        with pytest.raises(UsageError, match="'good' and 'Good' are one word to this model"):
            encode_splits(task, splits, causal, max_length=64, masked=False)
    finally:
        causal.backend_tokenizer.normalizer = normalizer or normalizers.Sequence([])


def test_examples_are_counted_in_words(causal, caplog):
    rows = [{"text": "a movie", "label": n % 2} for n in range(1002)]
    with caplog.at_level(logging.INFO):
        encode_splits(OWN, Splits(rows, rows[:2], rows[:1]), causal, max_length=64, masked=False)
        encode_splits(OWN, Splits(rows[:2], [], []), causal, max_length=64, masked=False)
    messages = [message for message in caplog.messages if message.startswith("Data: ")]
    assert messages[0].startswith("Data: 1,002 train, 2 validation, 1 test example; ")
    assert messages[1].startswith("Data: 2 train examples; ")
    for count, words in ((1, "1 demonstration would leave none of 1 training example"), (2, "2 demonstrations")):
        with pytest.raises(UsageError, match=f"^{words}.* to train on: lower --num_demonstrations"):
            encode_splits(OWN, Splits(rows[:1], [], []), causal, max_length=64, masked=False, num_demonstrations=count)


@pytest.mark.parametrize("fill", [False, True])
def test_prompts_that_are_cut_are_counted_once(fill, causal, masked, caplog):
    rows = [{"text": "bad " * length, "label": 0} for length in (1, 60, 80)]
    tokenizer = masked if fill else causal
    whole = encode(OWN, rows, tokenizer, masked=fill)
    with caplog.at_level(logging.WARNING):
        encode_splits(OWN, Splits(rows, rows[:1], rows[1:]), tokenizer, max_length=32, masked=fill)
    longest = len(whole[2].prompt_ids) + len(whole[2].suffix_ids) + max(map(len, whole[2].option_ids))
    assert [record.getMessage() for record in caplog.records] == [
        f"4 of 6 prompts are longer than 32 tokens and lost up to {longest - 32} of them (--max_length sets the limit)."
    ]


@pytest.fixture(scope="module")
def uncased():
    vocabulary = {word: n for n, word in enumerate(["[UNK]", "[MASK]", "good", "or", "bad"])}
    words = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", mask_token="[MASK]")


@pytest.mark.parametrize("kind", ["causal", "uncased"])
def test_an_option_without_tokens_is_refused(kind, request):
    tokenizer, masked = request.getfixturevalue(kind), kind == "uncased"
    task = ChoiceTask("{q}\n", ("{a}", "{b}"))
    rows = [{"q": "good or", "a": "bad", "b": word, "label": 0} for word in ("good", "")]
    assert all(encode(task, rows[:1], tokenizer, masked=masked)[0].option_ids)
    with pytest.raises(UsageError, match="The option '' has no tokens for this model: choose other words"):
        encode(task, rows, tokenizer, masked=masked)
