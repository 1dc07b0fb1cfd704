"""``--freeze_layers`` and ``--freeze_vectors``: what stays, in every architecture, and a run like any other."""

from __future__ import annotations

import pytest
import torch
from models import build
from peft import LoraConfig, get_peft_model
from torch import nn
from trainers import make_trainer
from transformers import AutoModelForCausalLM

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune.models.freezing import freeze_, layers_of

# What a layer's parameters are called.
LAYERS = {"llama": "layers.{}.", "gpt2": "h.{}.", "opt": "layers.{}.", "roberta": "layer.{}."}


def six_layers(family):
    return build(family, num_hidden_layers=6, hidden_size=8)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_layers_of_every_architecture(name):
    model, pattern = six_layers(name), LAYERS[name]
    all_names = trained(model)
    assert len(layers_of(model)) == 6
    freeze_(model, layers=1 / 3)
    frozen = all_names - trained(model)
    assert frozen == {n for n in all_names if any(pattern.format(k) in n for k in (0, 1))}
    freeze_(model, vectors=True)
    assert trained(model) == {n for n, p in model.named_parameters() if p.dim() > 1 and n not in frozen}


def test_adapters_of_the_first_layers():
    model = get_peft_model(six_layers("llama"), LoraConfig(r=2))
    freeze_(model, layers=0.5)
    assert {int(n.split("layers.")[1].split(".")[0]) for n in trained(model)} == {3, 4, 5}


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(UsageError, match=r"in \[0, 1\)"):
        freeze_(six_layers("llama"), layers=1.0)
    with pytest.raises(UsageError, match="no list of layers"):
        freeze_(nn.Linear(2, 2), layers=0.5)


@pytest.mark.parametrize("settings", [{"freeze_vectors": True}, {"freeze_layers": 0.5}, {"method": "auto"}])
def test_frozen_weights_stay_and_the_others_move(parts, tmp_path, settings):
    model, tokenizer, data = parts
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer((model, tokenizer, data), tmp_path, max_steps=3, **settings).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    if "freeze_vectors" in settings:
        assert changed == {name for name, p in before.items() if p.dim() > 1}
    elif "freeze_layers" in settings:
        assert changed == {name for name in before if "layers.0." not in name}
    else:
        assert changed == set(before)


def test_a_run_with_frozen_weights_is_replayed(flags, tmp_path, tiny_lm_path):
    words = ["--freeze_layers", "0.5", "--freeze_vectors", "true", "--save_strategy", "journal"]
    assert main(["finetune", *flags, *words, "--load_best_model_at_end", "false"]) == 0
    rebuilt = ["--journal", str(tmp_path / "run"), "--output_dir", str(tmp_path / "rebuilt")]
    assert main(["replay", "--base", str(tiny_lm_path), *rebuilt]) == 0
    start, run, replayed = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (tiny_lm_path, tmp_path / "run", tmp_path / "rebuilt")
    )
    assert all(torch.equal(run[name], replayed[name]) for name in run)
    same = {name for name in run if torch.equal(run[name], start[name])}
    assert same == {name for name, p in run.items() if "layers.0." in name or p.dim() < 2}
