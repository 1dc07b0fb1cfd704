"""The efficient forward gives the scores of the obvious one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zokernel.errors import UsageError
from zokernel.finetune.scoring.continuations import continuations
from zokernel.finetune.scoring.decoding import greedy_answers
from zokernel.finetune.scoring.options import (
    Collator,
    EncodedDataset,
    ScoredPositions,
    classification_loss,
    option_scores,
)
from zokernel.finetune.tasks import PromptTask, encode

ROWS = [
    {"sentence": "a good movie", "label": 1},
    {"sentence": "bad", "label": 0},
    {"sentence": "the movie the movie the movie was bad bad bad", "label": 0},
]


@pytest.fixture(scope="module")
def model(tiny_lm_path):
    # float64, so that agreement is to rounding of the arithmetic and not of the storage.
    return AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_lm_path):
    return AutoTokenizer.from_pretrained(tiny_lm_path)


def obvious_scores(model, examples):
    """Mean log-probability of every option, one sequence at a time, from full logits."""
    rows = []
    for example in examples:
        scores = []
        for option in example.option_ids:
            ids = torch.tensor([example.prompt_ids + option])
            logprobs = model(input_ids=ids).logits.log_softmax(-1)[0]
            positions = range(len(example.prompt_ids) - 1, ids.shape[1] - 1)
            scores.append(torch.stack([logprobs[t, token] for t, token in zip(positions, option, strict=True)]).mean())
        rows.append(torch.stack(scores))
    return torch.stack(rows)


@pytest.mark.parametrize("words", [("terrible", "great"), ("terrible", "magnificent"), ("so so", "quite ok", "great")])
def test_scores_match_one_sequence_at_a_time(model, tokenizer, words):
    task = PromptTask("{sentence} It was", words)
    examples = encode(task, ROWS, tokenizer)
    dataset = EncodedDataset(examples)
    batch = Collator(tokenizer.pad_token_id)([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        fast, slow = option_scores(model, batch), obvious_scores(model, examples)
    # Single-token scores are logits: equal to log-probabilities up to a constant of the example.
    torch.testing.assert_close(fast.double().log_softmax(-1), slow.log_softmax(-1), rtol=1e-5, atol=1e-5)
    loss = classification_loss(fast, batch["labels"])
    reference = torch.nn.functional.cross_entropy(slow, batch["labels"])
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert loss.dtype == torch.float32


def test_single_token_options_take_one_row_per_example(tokenizer):
    dataset = EncodedDataset(encode(PromptTask("{sentence} It was", ("terrible", "great")), ROWS, tokenizer))
    batch = Collator(tokenizer.pad_token_id)([dataset[i] for i in range(3)])
    assert batch["input_ids"].shape[0] == 3
    assert batch["targets"].shape == (3, 2)


def test_the_head_sees_only_scored_positions_and_the_hook_is_removed(model):
    shapes = []
    head = model.get_output_embeddings()
    watch = head.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    ids = torch.randint(3, 100, (2, 7))
    with torch.no_grad():
        with ScoredPositions(model, torch.tensor([[6], [3]])):
            selected = model(input_ids=ids).logits
        full = model(input_ids=ids).logits
    watch.remove()
    assert shapes == [(2, 1, 32), (2, 7, 32)]
    torch.testing.assert_close(selected[:, 0], full[[0, 1], [6, 3]])


@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_some_tokens_are_those_of_the_whole_head(model, bias):
    """A plain matrix is asked for their rows; another head for everything."""
    head = model.lm_head
    model.lm_head = torch.nn.Linear(32, head.out_features, bias=bias, dtype=torch.float64)
    widths, tokens, ids = [], torch.tensor([[5, 9, 5], [7, 0, 2]]), torch.randint(3, 100, (2, 7))
    watch = model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[-1]))
    try:
        with torch.no_grad():
            with ScoredPositions(model, torch.tensor([[6], [3]]), tokens_RC=tokens):
                selected = model(input_ids=ids).logits
            full = model(input_ids=ids).logits
    finally:
        watch.remove()
        model.lm_head = head
    assert widths[0] == (head.out_features if bias else 3)
    torch.testing.assert_close(selected[:, 0], full[[0, 1], [6, 3]].gather(1, tokens))


def test_under_autocast_the_head_runs_in_fp32_and_the_body_in_bf16(tiny_lm_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval()
    head, states = model.get_output_embeddings(), []
    watch = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: states.append(out.dtype))
    ids = torch.randint(3, 100, (2, 7))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with ScoredPositions(model, torch.tensor([[6], [3]])):
            logits = model(input_ids=ids).logits
        assert torch.is_autocast_enabled("cpu")
        hidden = model.model(input_ids=ids).last_hidden_state[[0, 1], [6, 3]]
        rounded = head(hidden)
    watch.remove()
    assert states == [torch.bfloat16] * 2
    assert (logits.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logits[:, 0], hidden.float() @ head.weight.T)


def test_autocast_is_restored_after_a_head_that_fails(tiny_lm_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval()
    model.lm_head = torch.nn.Linear(5, 4)  # of other features than the body's
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="cannot be multiplied"), ScoredPositions(model, torch.tensor([[2]])):
            model(input_ids=torch.tensor([[3, 4, 5]]))
        assert torch.is_autocast_enabled("cpu")


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UsageError, match="no LM head"):
        ScoredPositions(torch.nn.Linear(2, 2), torch.zeros(1, 1, dtype=torch.long))


def test_greedy_answers_ignore_a_penalty_that_the_model_was_published_with(model, tokenizer, monkeypatch):
    prompt = tokenizer("a good movie")["input_ids"]
    sequence = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            sequence.append(int(model(input_ids=torch.tensor([sequence])).logits[0, -1].argmax()))
    expected = tokenizer.decode(sequence[len(prompt) :], skip_special_tokens=True).strip()
    assert len(set(sequence)) < len(sequence)  # it repeats itself
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
    ids = torch.tensor([prompt])
    (answer,) = greedy_answers(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens=8)
    assert answer == expected
    assert continuations(model, tokenizer, [prompt], max_new_tokens=8) == [expected]


@pytest.mark.parametrize("eos_token_id", [None, 1, [1, 2]])
def test_decoding_stops_at_the_end_of_the_tokenizer_whatever_the_model_was_published_with(
    eos_token_id, model, tokenizer, tiny_lm_path, monkeypatch
):
    """Sequence-to-sequence models learn to end their answers with it, and text after it is no part of an answer."""
    ids = torch.tensor([tokenizer("a good movie")["input_ids"]])
    with torch.no_grad():
        first = int(model(input_ids=ids).logits[0, -1].argmax())
    ended = AutoTokenizer.from_pretrained(tiny_lm_path, eos_token=tokenizer.convert_ids_to_tokens(first))
    assert ended.eos_token_id == first
    monkeypatch.setattr(model.generation_config, "eos_token_id", eos_token_id)
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    answers = greedy_answers(model, ended, ids, torch.ones_like(ids), max_new_tokens=6, ending="")
    hook.remove()
    assert (answers, len(forwards)) == ([""], 1)


@pytest.mark.parametrize("mark", ["", " END"])
def test_decoding_stops_at_the_ending(mark, model, tokenizer):
    """Of one token or several, and not at the same text in the prompt."""
    prompt = tokenizer("a good movie")["input_ids"]
    sequence = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            sequence.append(int(model(input_ids=torch.tensor([sequence])).logits[0, -1].argmax()))
    pieces = [tokenizer.decode(sequence[len(prompt) : len(prompt) + n]) for n in range(9)]
    ending = mark or pieces[5][len(pieces[2]) :]
    ids = torch.tensor([[*tokenizer(f"x{ending}")["input_ids"], *prompt[1:]]]) if mark else torch.tensor([prompt])
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    (answer,) = greedy_answers(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens=8, ending=ending)
    hook.remove()
    if mark:  # which the model does not write
        assert len(forwards) == 8
        return
    stopped = next(n for n, text in enumerate(pieces) if ending in text)
    assert len(forwards) == stopped <= 5
    assert answer == pieces[8].split(ending)[0].strip()
