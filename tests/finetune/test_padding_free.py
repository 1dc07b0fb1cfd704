"""Rows that share one have the scores and losses of padded ones, and are fewer tokens."""

from __future__ import annotations

import copy
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from models import CAUSAL, MASKED, save_model

from zokernel.finetune import Collator, EncodedDataset, PromptTask, encode, option_scores
from zokernel.finetune.data.collate_text import TextCollator, TextDataset
from zokernel.finetune.data.repeat import repeat_batch
from zokernel.finetune.models.adapters import attach_adapter
from zokernel.finetune.scoring.language import LanguageObjective
from zokernel.finetune.scoring.language_head import token_losses
from zokernel.finetune.scoring.objective import Objective
from zokernel.finetune.scoring.padding_free import PaddingFree, choose_padding_free, in_shared_rows, share
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.tasks.encode_text import EncodedText
from zokernel.optim import MeZO
from zokernel.perturb import Stacked

TEXTS = (
    "so",
    "a good movie",
    "the movie the movie the movie was bad bad bad and the movie was bad",
    "the end was good",
)
WORDS = {"one token": ("bad", "good"), "several tokens": ("so so", "quite ok")}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Fresh copies of the models in float64, so that layouts differ by the rounding of the arithmetic alone."""
    root, cache = tmp_path_factory.mktemp("layouts"), {}

    def get(family):
        if family not in cache:
            folder = save_model(root / family, family)
            auto = transformers.AutoModelForMaskedLM if family in MASKED else transformers.AutoModelForCausalLM
            cache[family] = (
                auto.from_pretrained(folder, dtype=torch.float64).eval(),
                transformers.AutoTokenizer.from_pretrained(folder),
            )
        return copy.deepcopy(cache[family][0]), cache[family][1]

    return get


def prompts(tokenizer, words, *, masked=False):
    task = PromptTask("{text} It was {mask}" if masked else "{text} It was", words)
    return EncodedDataset(
        encode(task, [{"text": t, "label": n % 2} for n, t in enumerate(TEXTS)], tokenizer, masked=masked)
    )


def texts(vocabulary, lengths=(4, 20, 3, 9)):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return TextDataset([EncodedText(row, list(range(len(row) // 2, len(row))), [len(row)]) for row in ids])


def batch_of(collator, dataset):
    return collator([dataset[i] for i in range(len(dataset))])


def in_rows(batch, count):
    return in_shared_rows(batch, share(batch["attention_mask"].sum(1).tolist(), count))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("family", CAUSAL)
def test_options_have_the_scores_of_padded_rows(load, family, words, shared, attention, count):
    model, tokenizer = load(family)
    model.set_attn_implementation(attention)
    dataset = prompts(tokenizer, WORDS[words])
    batch = batch_of(Collator(tokenizer.pad_token_id, shared_prompt=shared), dataset)
    together = in_rows(batch, count)
    assert together["attention_mask"].sum() == batch["attention_mask"].sum()
    assert len(together["input_ids"]) == count
    assert together["input_ids"].numel() < batch["input_ids"].numel()
    objective = Objective(padding_free=PaddingFree(hidden_size=32))
    with torch.no_grad():
        expected = option_scores(model, batch)
        torch.testing.assert_close(option_scores(model, together), expected, rtol=0, atol=1e-5)
        loss, outputs = objective.evaluate(model, batch)
        torch.testing.assert_close(objective(model, batch), Objective()(model, batch), rtol=0, atol=1e-5)
        torch.testing.assert_close(loss, Objective()(model, batch), rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
def test_texts_have_the_losses_of_padded_rows(load, family, whole, count):
    model, tokenizer = load(family)
    batch = batch_of(TextCollator(tokenizer.pad_token_id), texts(len(tokenizer)))
    padded, free = LanguageObjective(whole), LanguageObjective(whole, PaddingFree(hidden_size=32))
    with torch.no_grad():
        expected = token_losses(model, batch, whole=whole)
        losses = token_losses(model, in_rows(batch, count), whole=whole)
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
        assert free(model, batch).item() == pytest.approx(padded(model, batch).item(), abs=1e-6)
        (_, terms), (_, padded_terms) = (objective.evaluate(model, batch) for objective in (free, padded))
    torch.testing.assert_close(terms["terms"], padded_terms["terms"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["one token", "several tokens", "shared prompt", "text", "text, whole head"])
def test_stacked_losses_of_rows_that_share_one_are_those_taken_in_place(load, kind, rows):
    model, tokenizer = load("llama")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).eval()
    if kind.startswith("text"):
        objective = LanguageObjective("whole" in kind, PaddingFree(hidden_size=320))
        batch = batch_of(TextCollator(tokenizer.pad_token_id), texts(len(tokenizer)))
    else:
        objective = Objective(padding_free=PaddingFree(hidden_size=320))
        words = WORDS["several tokens" if kind == "shared prompt" else kind]
        collator = Collator(tokenizer.pad_token_id, shared_prompt=kind == "shared prompt")
        batch = batch_of(collator, prompts(tokenizer, words))
    padded, together = replace(objective, padding_free=None), in_rows(batch, rows)
    assert len(together["input_ids"]) == rows
    losses = []
    for perturb in ("in_place", Stacked(lambda n: objective.stacked(model, repeat_batch(together, n), n))):
        params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = MeZO(params, lr=0.0, eps=1e-2, num_perturbations=3, perturb=perturb)
        optimizer.step(lambda: padded(model, batch))
        losses.append(torch.tensor(optimizer.record()))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    assert losses[0].std() > 1e-4


def test_the_model_sees_few_tokens_that_are_not_real_and_each_row_alone(load):
    model, tokenizer = load("llama")
    batch = batch_of(TextCollator(tokenizer.pad_token_id), texts(len(tokenizer)))
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    objective = LanguageObjective(padding_free=PaddingFree(hidden_size=64))
    with torch.no_grad():
        _, before = objective.evaluate(model, batch)
        batch["input_ids"][1, :20] = torch.arange(5, 25)
        _, after = objective.evaluate(model, batch)
    assert set(shapes) == {(2, 20)}  # 20, and 9, 4 and 3
    unchanged = [0, 2, 3]
    torch.testing.assert_close(after["terms"][unchanged], before["terms"][unchanged], rtol=0, atol=0)
    assert not torch.equal(after["terms"][1], before["terms"][1])


def test_a_batch_stays_padded_where_that_is_less_work():
    mask = torch.tensor([[1] * 64, [1] * 60 + [0] * 4])
    batch = {"attention_mask": mask, "input_ids": mask, "positions": torch.tensor([[63], [59]])}
    assert PaddingFree(hidden_size=32)(batch) is batch  # 124 (1 + 124 / 48) against 128 (1 + 64 / 48)
    assert PaddingFree(hidden_size=3200)(batch) is not batch  # 124 (1 + 124 / 4800) against 128 (1 + 64 / 4800)


@pytest.mark.parametrize("family", CAUSAL)
def test_models_that_keep_rows_apart_are_detected_and_logged(load, family, caplog):
    model, tokenizer = load(family)
    dataset = prompts(tokenizer, WORDS["one token"])
    with caplog.at_level("INFO"):
        assert choose_padding_free(model, Collator(tokenizer.pad_token_id), dataset, option_scores)
    assert "Short examples of a batch share one row" in caplog.text


@pytest.mark.parametrize("name", ["window", "alibi", "recurrent", "masked", "virtual tokens", "flash"])
def test_models_that_cannot_keep_rows_apart_stay_padded(load, name, caplog):
    tokenizer = load("llama")[1]
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    if name == "window":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**shape, **heads, sliding_window=4))
    elif name == "alibi":
        model = transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
        )
    elif name == "recurrent":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape, state_size=4))
    elif name == "masked":
        model, tokenizer = load("roberta")
    elif name == "virtual tokens":
        model = attach_adapter(load("llama")[0], ModelArguments(prompt_tuning=True, num_virtual_tokens=3))
    else:
        model = load("llama")[0]
        model.config._attn_implementation = "flash_attention_2"
    if name in ("window", "alibi", "recurrent"):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    dataset = prompts(tokenizer, WORDS["one token"], masked=name == "masked")
    collator = Collator(tokenizer.pad_token_id)
    with caplog.at_level("INFO"):
        assert choose_padding_free(model.eval(), collator, dataset, option_scores) is None
    assert ("Batches stay padded" in caplog.text) == (name in ("window", "alibi", "recurrent"))
