"""``--freeze_layers`` and ``--freeze_vectors``: what stays, in every architecture, and a run like any other."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trainers import make_trainer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune.models.freezing import freeze_, layers_of

SIZES = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2}
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=16)), "layers.{}."),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=6, n_head=2)), "h.{}."),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=8)), "layers.{}."),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, intermediate_size=16)), "layer.{}."),
}


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", MODELS)
def test_the_first_layers_of_every_architecture(name):
    build, pattern = MODELS[name]
    model = build()
    everything = trained(model)
    assert len(layers_of(model)) == 6
    freeze_(model, layers=1 / 3)
    frozen = everything - trained(model)
    assert frozen == {n for n in everything if any(pattern.format(k) in n for k in (0, 1))}
    freeze_(model, vectors=True)
    assert trained(model) == {n for n, p in model.named_parameters() if p.dim() > 1 and n not in frozen}


def test_adapters_of_the_first_layers():
    model = get_peft_model(MODELS["llama"][0](), LoraConfig(r=2))
    freeze_(model, layers=0.5)
    assert {int(n.split("layers.")[1].split(".")[0]) for n in trained(model)} == {3, 4, 5}


def test_what_cannot_be_frozen_is_said():
    with pytest.raises(UsageError, match=r"in \[0, 1\)"):
        freeze_(MODELS["llama"][0](), layers=1.0)
    with pytest.raises(UsageError, match="no list of layers"):
        freeze_(nn.Linear(2, 2), layers=0.5)


@pytest.mark.parametrize("settings", [{"freeze_vectors": True}, {"freeze_layers": 0.5}, {"method": "auto"}])
def test_frozen_weights_stay_and_the_others_move(parts, tmp_path, settings):
    model, tokenizer, data = parts
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer((model, tokenizer, data), tmp_path, max_steps=3, **settings).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    if "freeze_vectors" in settings:
        assert moved == {name for name, p in before.items() if p.dim() > 1}
    elif "freeze_layers" in settings:
        assert moved == {name for name in before if "layers.0." not in name}
    else:
        assert moved == set(before)


def test_a_run_with_frozen_weights_is_replayed(flags, tmp_path, tiny_lm_path):
    words = ["--freeze_layers", "0.5", "--freeze_vectors", "true", "--save_strategy", "journal"]
    assert main(["finetune", *flags, *words, "--load_best_model_at_end", "false"]) == 0
    rebuilt = ["--journal", str(tmp_path / "run"), "--output_dir", str(tmp_path / "rebuilt")]
    assert main(["replay", "--base", str(tiny_lm_path), *rebuilt]) == 0
    start, run, again = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (tiny_lm_path, tmp_path / "run", tmp_path / "rebuilt")
    )
    assert all(torch.equal(run[name], again[name]) for name in run)
    same = {name for name in run if torch.equal(run[name], start[name])}
    assert same == {name for name, p in run.items() if "layers.0." in name or p.dim() < 2}
