"""The loss of answers of sequence-to-sequence models: the model's own, block by block, whatever follows its decoder."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_text_losses import loud

from zokernel.errors import UsageError
from zokernel.estimators.per_example import offsets_of
from zokernel.finetune.data.collate_text import TextCollator, TextDataset
from zokernel.finetune.data.repeat import repeat_batch
from zokernel.finetune.scoring.language import LanguageObjective
from zokernel.finetune.scoring.language_head import blocks_agree, token_losses
from zokernel.finetune.scoring.prepare_text import language_objective
from zokernel.finetune.tasks.encode_text import EncodedText
from zokernel.finetune.trainer.micro_batches import MicroBatches
from zokernel.optim import GRZO, MeZO
from zokernel.perturb import InForward, PerExampleRows, Stacked

PAD, END, V = 1, 2, 120
T5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": V, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
PADDED = {"decoder_start_token_id": PAD, "forced_eos_token_id": END}
FAMILIES = {
    "t5": ("T5", T5 | {"tie_word_embeddings": True}),
    "t5, untied": ("T5", T5 | {"tie_word_embeddings": False, "scale_decoder_outputs": False}),
    "flan-t5": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("Bart", BART),
    "mbart": ("MBart", BART),
    "pegasus": ("Pegasus", BART | PADDED),
    "marian": ("Marian", BART | PADDED),
    "m2m100": ("M2M100", BART),
    "led": (
        "LED",
        BART | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    ),
}
LIKE_T5 = ("T5", "MT5")


def build(name):
    family, sizes = FAMILIES[name]
    start = {} if family == "MBart" else {"decoder_start_token_id": PAD if family in LIKE_T5 else END}
    config = getattr(transformers, f"{family}Config")(**{"pad_token_id": PAD, "eos_token_id": END, **start, **sizes})
    config.tie_word_embeddings = sizes.get("tie_word_embeddings", True)  # of T5, which else only leaves out a factor
    torch.manual_seed(0)
    heads = ("MTModel",) if family == "Marian" else ("ForConditionalGeneration",)
    model = loud(getattr(transformers, family + heads[0])(config))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape))
    return model


def pairs(model, *sizes):
    """Return encoded rows of (source, answer) sizes whose decoder begins as the model's own training does."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for source, answer in sizes:
        draw = lambda count: torch.randint(5, V, (count,), generator=generator).tolist()  # noqa: E731
        labels = [*draw(answer - 1), END]
        ids = [first_input(model, labels), *labels]
        examples.append(EncodedText(ids, list(range(1, len(ids))), [len(ids)], [*draw(source - 1), END]))
    return examples


def first_input(model, labels):
    if model.config.model_type == "m2m_100":  # which has no method for it
        return model.config.decoder_start_token_id
    return int(model.prepare_decoder_input_ids_from_labels(torch.tensor([labels]))[0, 0])


SIZES = ((9, 5), (3, 11), (14, 2), (6, 7))


def collated(examples):
    return TextCollator(PAD)([vars(example) for example in examples])


def own_inputs(examples):
    """Return what transformers' own collator would make of rows: labels padded with -100, and no decoder inputs."""
    batch = collated(examples)
    width = max(len(e.input_ids) for e in examples) - 1
    labels = [[*e.input_ids[1:], *[-100] * (width - len(e.input_ids) + 1)] for e in examples]
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | {"labels": torch.tensor(labels)}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_models_own_whatever_the_block(name):
    model = build(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == FAMILIES[name][1].get("tie_word_embeddings", True)
    examples = pairs(model, *SIZES)
    expected = model(**own_inputs(examples)).loss.item()
    batch = collated(examples)
    for block in (1, 7, 512):
        assert token_losses(model, batch, block=block).mean().item() == pytest.approx(expected, rel=1e-6)
    assert LanguageObjective(whole=True)(model, batch).item() == pytest.approx(expected, rel=1e-6)
    assert blocks_agree(model, batch)
    sums = LanguageObjective().example_terms(model.requires_grad_(False), batch)
    assert (sums[:, 0].sum() / sums[:, 1].sum()).item() == pytest.approx(expected, rel=1e-6)
    per_example = [model(**own_inputs([example])).loss.item() for example in examples]
    torch.testing.assert_close((sums[:, 0] / sums[:, 1]).tolist(), per_example, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_the_encoder_and_the_decoder_run_once_and_the_head_on_a_block():
    model = build("bart")
    counts = {"encoder": [], "decoder": [], "head": []}
    layers = {"encoder": model.get_encoder().layers[0], "decoder": model.get_decoder().layers[0]}
    layers["head"] = model.get_output_embeddings()
    for name, module in layers.items():
        module.register_forward_hook(lambda m, args, out, name=name: counts[name].append(args[0].shape[:2].numel()))
    token_losses(model, collated(pairs(model, *SIZES)), block=10)
    # 25 tokens of answers; sources of up to 14 and answers of up to 11 tokens, padded.
    assert counts == {"encoder": [4 * 14], "decoder": [4 * 11], "head": [10, 10, 5]}


def test_a_model_whose_head_cannot_be_separated_uses_its_own_logits(caplog):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=48, pad_token_id=PAD)
    pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    pair.decoder_start_token_id, pair.pad_token_id = END, PAD
    model = loud(transformers.EncoderDecoderModel(config=pair))
    examples = pairs(model, *SIZES)
    objective = language_objective(model, TextCollator(PAD), TextDataset(examples))
    assert objective.whole
    assert "cannot compute its logits in blocks" in caplog.text
    with torch.no_grad():
        expected = model(**own_inputs(examples)).loss.item()
        assert objective(model, collated(examples)).item() == pytest.approx(expected, rel=1e-6)


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    names = ["q", "v", "lm_head"] if hasattr(model, "shared") else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    return peft.get_peft_model(model, config).eval()


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", ["flan-t5", "bart"])
def test_stacked_losses_of_an_adapter_are_those_taken_in_place(name):
    model, objective = lora(build(name)), LanguageObjective()
    batch = collated(pairs(model.get_base_model(), *SIZES))
    stacked = Stacked(lambda copies: objective.stacked(model, repeat_batch(batch, copies), copies))
    losses = []
    for perturb in ({}, {"perturb": stacked}):
        optimizer = MeZO(trained(model), lr=0.0, eps=1e-2, num_perturbations=3, **perturb)
        optimizer.step(lambda: objective(model, batch))
        losses.append(torch.tensor(optimizer.record()))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=2e-5)
    assert losses[0].std() > 1e-4


@pytest.mark.parametrize("block", [8, 512])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_losses_in_forward_are_those_taken_in_place(name, block):
    model = build(name)
    batch = collated(pairs(model, *SIZES))
    losses = []
    for perturb in ({}, {"perturb": InForward()}):
        optimizer = MeZO(model.named_parameters(), lr=0.0, eps=1e-3, num_perturbations=2, **perturb)
        for _ in range(2):  # the first forward is learned from
            optimizer.step(lambda: token_losses(model, batch, block=block).mean())
        losses.append(torch.tensor(optimizer.record()))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["flan-t5", "bart"])
def test_each_example_sees_its_own_weights(name):
    """Against the weights moved for one example after another: fp32, differences of losses to 2e-5."""
    model, objective = lora(build(name)), LanguageObjective()
    examples = pairs(model.get_base_model(), *SIZES)
    together = MicroBatches(
        lambda batch: objective(model, batch),
        None,
        objective.weight,
        lambda batch: objective.example_terms(model, batch),
    )
    for part in (examples[:3], examples[3:]):
        together.add(collated(part))
    optimizer = GRZO(trained(model), lr=0.0, eps=1e-2, whiten=False, perturb=PerExampleRows(together.examples))
    optimizer.step(lambda: 0.0)
    params = dict(trained(model))
    start = {name: p.detach().clone() for name, p in params.items()}
    expected = []
    with torch.no_grad():
        for offset in (1e-2, -1e-2):
            for example in range(4):
                for index, scale in offsets_of({0: offset}, example).items():
                    optimizer.directions.add_(params, scale, seed=0, step=0, index=index)
                expected.append(float(torch.cat([part.losses() for part in together.examples()])[example]))
                for name, p in params.items():
                    p.copy_(start[name])
    assert optimizer.record() == pytest.approx(expected, abs=2e-5)
    assert max(expected) - min(expected) > 1e-2


def test_rows_cannot_have_their_own_weights_while_embeddings_are_trained():
    model, objective = build("t5"), LanguageObjective()
    batch = collated(pairs(model, *SIZES))
    with pytest.raises(UsageError, match=r"stacked.*adapter"):
        objective.stacked(model, repeat_batch(batch, 2), 2)
    with pytest.raises(UsageError, match=r"directions of their own.*adapter"):
        objective.example_terms(model, batch)
