"""Sequence-to-sequence models in prompt tasks: tokens, losses, the shared encoder, and decoding."""

from __future__ import annotations

import pytest
import torch
from models import SEQ2SEQ, build, save_model
from tokenizers import processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
)

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.data.collate import EncodedDataset
from zokernel.finetune.data.repeat import repeat_batch
from zokernel.finetune.scoring.choose_collator import choose_collator
from zokernel.finetune.scoring.objective import Objective
from zokernel.finetune.scoring.options import Collator, option_scores
from zokernel.finetune.tasks import ChoiceTask, GenerationTask, PromptTask, demonstrations, encode
from zokernel.finetune.tasks.seq2seq import Decoder, decoder_of

WORDS = PromptTask("{text} It was", ("terrible", "great"))
LETTERS = PromptTask("{text} It was", ("b", "g"))
CHOICE = ChoiceTask("{q} Which?", choices_column="options")
ANSWER = GenerationTask("{q} Where?", label_column="answer")
REVIEWS: list[Row] = [{"text": "a good movie", "label": 1}, {"text": "bad", "label": 0}]
QUESTIONS: list[Row] = [
    {
        "q": "the capital of Norway",
        "answer": ["Oslo", "Oslo town"],
        "options": ["Oslo", "Rome", "right here"],
        "label": 0,
    },
    {"q": "Rome", "answer": "It was Rome", "options": ["great", "wrong"], "label": 1},
]


@pytest.fixture(scope="module", params=SEQ2SEQ)
def parts(request, tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp(request.param), request.param)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    if request.param == "bart":
        model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape))
    return model, AutoTokenizer.from_pretrained(folder)


def encoded(task, rows, model, tokenizer, **settings):
    return EncodedDataset(encode(task, rows, tokenizer, decoder=decoder_of(model, tokenizer), **settings))


def batched(dataset, tokenizer):
    return Collator(tokenizer.pad_token_id)([dataset[n] for n in range(len(dataset))])


def plain_scores(model, example):
    """Mean log-probability of every option, one at a time, from the model's own forward."""
    scores = []
    for option in example.option_ids:
        decoded = torch.tensor([[*example.decoder_start, *option[:-1]]])
        logits = model(input_ids=torch.tensor([example.prompt_ids]), decoder_input_ids=decoded).logits[0]
        logprobs = logits[len(example.decoder_start) - 1 :].log_softmax(-1)
        scores.append(logprobs.gather(1, torch.tensor(option)[:, None]).mean())
    return torch.stack(scores)


def test_tokens_of_prompt_and_options(parts):
    model, tokenizer = parts
    bos, pad, eos = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    t5 = model.config.model_type == "t5"
    start = (pad,) if t5 else (eos, bos)
    example = encoded(WORDS, REVIEWS, model, tokenizer).examples[0]
    text = tokenizer("a good movie It was", add_special_tokens=False)["input_ids"]
    assert example.prompt_ids == [*text, eos] if t5 else [bos, *text, eos]
    assert example.decoder_start == start
    assert example.option_ids == [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS.label_words]
    answer = encoded(ANSWER, QUESTIONS, model, tokenizer).examples[0]
    oslo = tokenizer("Oslo", add_special_tokens=False)["input_ids"]
    assert answer.option_ids == [[*oslo, eos]] if t5 else [[bos, *oslo, eos]]
    assert (answer.decoder_start, answer.forced) == ((start[0],), start[1:])


@pytest.mark.parametrize("name", ["words", "letters", "choice", "answer"])
@torch.no_grad()
def test_scores_are_those_of_one_option_at_a_time(parts, name):
    model, tokenizer = parts
    task = {"words": WORDS, "letters": LETTERS, "choice": CHOICE, "answer": ANSWER}[name]
    dataset = encoded(task, REVIEWS if task in (WORDS, LETTERS) else QUESTIONS, model, tokenizer)
    scores = option_scores(model, batched(dataset, tokenizer))
    assert scores.dtype == torch.float32
    for example, row in zip(dataset.examples, scores, strict=True):
        expected, actual = plain_scores(model, example), row[: len(example.option_ids)]
        # Single tokens are compared by their logits: equal up to a constant of the example.
        torch.testing.assert_close(actual.log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=1e-5)
        if name != "letters":
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert row[len(example.option_ids) :].isneginf().all()


@torch.no_grad()
def test_the_loss_of_answers_is_the_models_own(parts):
    model, tokenizer = parts
    dataset = encoded(ANSWER, QUESTIONS, model, tokenizer)
    objective = Objective(kind="generation", loss="answer", tokenizer=tokenizer)
    features = [
        {
            "input_ids": tokenizer(ANSWER.prompt(row))["input_ids"],
            "labels": tokenizer(text_target=ANSWER.references(row)[0])["input_ids"],
        }
        for row in QUESTIONS
    ]
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    for rows in ([0], [1], [0, 1]):
        loss = objective(model, Collator(tokenizer.pad_token_id)([dataset[n] for n in rows]))
        plain = model(**collate([features[n] for n in rows])).loss
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


@torch.no_grad()
def test_the_encoder_runs_once_per_example_and_the_head_on_scored_positions(parts):
    model, tokenizer = parts
    shapes: dict[str, tuple[int, ...]] = {}
    dataset = encoded(CHOICE, QUESTIONS, model, tokenizer)
    batch = batched(dataset, tokenizer)
    handles = [
        model.get_encoder().register_forward_hook(lambda m, a, out: shapes.update(encoder=tuple(out[0].shape))),
        model.get_decoder().register_forward_hook(lambda m, a, out: shapes.update(decoder=tuple(out[0].shape))),
        model.get_output_embeddings().register_forward_hook(lambda m, a, out: shapes.update(head=tuple(out.shape))),
    ]
    option_scores(model, batch)
    for handle in handles:
        handle.remove()
    longest = max(len(option) for example in dataset.examples for option in example.option_ids)
    lengths = [len(example.prompt_ids) for example in dataset.examples]
    # The hook of the test sees the encoder's own output before it is repeated, or after: both are rows of examples.
    assert shapes["encoder"][1] == max(lengths)
    assert shapes["decoder"][0] == 5
    assert shapes["head"] == (5, longest, len(tokenizer))
    assert not model.get_encoder()._forward_hooks
    assert not model.get_encoder()._forward_pre_hooks


@torch.no_grad()
def test_rows_of_the_encoder(parts):
    model, tokenizer = parts
    rows = []
    layer = next(module for module in model.get_encoder().modules() if isinstance(module, torch.nn.Linear))
    handle = layer.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    option_scores(model, batched(encoded(CHOICE, QUESTIONS, model, tokenizer), tokenizer))
    handle.remove()
    assert rows == [2]


@torch.no_grad()
def test_answers_are_decoded_greedily(parts):
    model, tokenizer = parts
    dataset = encoded(ANSWER, QUESTIONS, model, tokenizer)
    batch = batched(dataset, tokenizer)
    prompt = batch["decoder_prompt"][0].tolist()
    model.generation_config.num_beams, model.generation_config.no_repeat_ngram_size = 3, 2
    generated = []
    generate = model.generate
    model.generate = lambda **settings: generated.append(generate(**settings)) or generated[-1]
    try:
        objective = Objective(kind="generation", loss="answer", tokenizer=tokenizer, max_new_tokens=6)
        objective.evaluate(model, batch)
    finally:
        del model.generate
        model.generation_config.num_beams = model.generation_config.no_repeat_ngram_size = None
    for example, row in zip(dataset.examples, generated[0].tolist(), strict=True):
        assert row[: len(prompt)] == prompt
        ids = list(prompt)
        for token in row[len(prompt) : -1]:  # BART ends an answer that is cut off
            logits = model(input_ids=torch.tensor([example.prompt_ids]), decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
            assert ids[-1] == token
            if token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token]):
                break


def test_a_sentinel_in_the_template_starts_the_decoder(parts):
    model, tokenizer = parts
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_0>"]})
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    decoder = decoder_of(model, tokenizer)
    task = PromptTask("{text} It was <extra_id_0> .", ("bad", "good"))
    rows = [{"text": "a <extra_id_0> movie", "label": 1}]
    context = demonstrations(task, rows, seq2seq=True)
    assert context == "a <extra_id_0> movie It was good .\n\n"
    (example,) = encode(task, rows, tokenizer, decoder=decoder)
    assert example.decoder_start == (decoder.start, sentinel)
    assert example.prompt_ids.count(sentinel) == 1
    (example,) = encode(WORDS, rows, tokenizer, decoder=decoder)
    assert example.decoder_start == decoder.prompt
    assert example.prompt_ids.count(sentinel) == 0
    assert tokenizer.decode(example.prompt_ids, skip_special_tokens=True) == "a <extra_id_0> movie It was"


@torch.no_grad()
def test_copies_of_a_batch_have_the_loss_of_the_batch(parts):
    model, tokenizer = parts
    for task, rows in ((WORDS, REVIEWS), (LETTERS, REVIEWS), (CHOICE, QUESTIONS)):
        batch = batched(encoded(task, rows, model, tokenizer), tokenizer)
        for loss in ("options", "answer"):
            objective = Objective(loss=loss, kind=task.kind)
            model.requires_grad_(False)
            losses = objective.stacked(model, repeat_batch(batch, 3), 3)
            model.requires_grad_(True)
            torch.testing.assert_close(losses, objective(model, batch).expand(3), atol=1e-6, rtol=1e-6)


def test_trained_embeddings_are_not_stacked(parts):
    model, tokenizer = parts
    batch = batched(encoded(WORDS, REVIEWS, model, tokenizer), tokenizer)
    with pytest.raises(UsageError, match=r"stacked.*adapter"):
        Objective().stacked(model, repeat_batch(batch, 2), 2)


def test_long_prompts_lose_tokens_at_the_front_and_long_options_are_refused(parts):
    model, tokenizer = parts
    whole = encoded(WORDS, [{"text": "bad " * 40, "label": 0}], model, tokenizer).examples[0]
    cut = encoded(WORDS, [{"text": "bad " * 40, "label": 0}], model, tokenizer, max_length=20).examples[0]
    assert len(cut.prompt_ids) == 20
    assert cut.lost == len(whole.prompt_ids) - 20
    assert cut.prompt_ids[-18:] == whole.prompt_ids[-18:]
    with pytest.raises(UsageError, match="max_length"):
        encoded(WORDS, REVIEWS, model, tokenizer, max_length=3)
    with pytest.raises(UsageError, match="no token"):
        encoded(CHOICE, [{"q": "x", "options": ["", "b"], "label": 1}], model, tokenizer)


def test_the_language_is_forced_where_the_family_needs_it(tmp_path):
    """M2M100 writes it after the start token; mBART's first input is the language that ends its labels."""
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path, "bart"))
    bos, pad, eos = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": eos, "decoder_start_token_id": eos}
    m2m = build("bart", **ids)
    frame = lambda single: processors.TemplateProcessing(single=single, special_tokens=[("<s>", bos), ("</s>", eos)])  # noqa: E731
    tokenizer.backend_tokenizer.post_processor = frame("<s> $A </s>")  # <s> stands for a language
    assert decoder_of(m2m, tokenizer) == Decoder(eos, (bos,), (eos,))
    from transformers import MBartConfig, MBartForConditionalGeneration

    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    mbart = MBartForConditionalGeneration(MBartConfig(**sizes, **heads, **ids)).eval()
    tokenizer.backend_tokenizer.post_processor = frame("$A </s> <s>")
    decoder = decoder_of(mbart, tokenizer)
    assert decoder == Decoder(bos, (), (eos, bos))
    (example,) = encode(ANSWER, QUESTIONS[1:], tokenizer, decoder=decoder)
    labels = tokenizer(text_target="It was Rome")["input_ids"]
    assert (example.decoder_start, example.option_ids) == ((bos,), [labels])
    loss = Objective(kind="generation", loss="answer")(mbart, batched(EncodedDataset([example]), tokenizer))
    plain = mbart(input_ids=torch.tensor([example.prompt_ids]), labels=torch.tensor([labels])).loss
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_a_model_whose_scores_depend_on_the_batch_is_refused_before_training(parts):
    model, tokenizer = parts
    dataset = encoded(WORDS, REVIEWS, model, tokenizer)
    assert choose_collator(model, tokenizer.pad_token_id, dataset) == Collator(tokenizer.pad_token_id)
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_collator(model, tokenizer.pad_token_id, dataset) == Collator(tokenizer.pad_token_id)

    def in_company(module, args, output):  # states that depend on how many rows there are
        output[0].data.mul_(len(output[0]))

    other = model.get_decoder().register_forward_hook(in_company)
    try:
        with pytest.raises(UsageError, match=r"would differ by .*Seq2SeqTrainer"):
            choose_collator(model, tokenizer.pad_token_id, dataset)
    finally:
        other.remove()


@torch.no_grad()
def test_the_loss_keeps_its_digits_at_32128_words():
    """A softmax summed across strides is off by 1e-5 here."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32128}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model.lm_head.weight.data.normal_(std=0.5)
    prompts, labels = torch.randint(2, 32128, (2, 9)).tolist(), torch.randint(2, 32128, (2, 6)).tolist()
    features = [
        {"input_ids": prompt, "option_ids": [text], "label": 0, "decoder_start": (0,), "forced": ()}
        for prompt, text in zip(prompts, labels, strict=True)
    ]
    loss = Objective(loss="answer")(model, Collator(0)(features)).item()
    outputs = model(input_ids=torch.tensor(prompts), labels=torch.tensor(labels))
    exact = torch.nn.functional.cross_entropy(
        outputs.logits.double().flatten(0, 1), torch.tensor(labels).flatten()
    ).item()
    assert loss == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert loss == pytest.approx(exact, rel=1e-6)
