"""``--perturb``: losses taken in place, with in_forward and stacked train alike, for every kind of batch."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainers import make_trainer

from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig
from zokernel.finetune.data.repeat import repeat_batch
from zokernel.perturb import Stacked


def adapter(parts):
    model, tokenizer, data = parts
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).eval(), tokenizer, data


def train(parts, folder, **settings):
    trainer = make_trainer(parts, folder, **{"max_steps": 3, "eps": 1e-2, "num_perturbations": 2, **settings})
    trainer.train()
    return trainer, [row["loss"] for row in trainer.run_log.rows]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_adapters_are_stacked_and_train_the_same(parts, tmp_path, accumulation):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    found = {}
    for perturb in ("in_place", "auto"):
        model = adapter(parts)
        trainer, losses = train(model, tmp_path / perturb, perturb=perturb, **settings)
        found[perturb] = losses
        model[0].unload()
        assert isinstance(trainer.bare_optimizer.perturb, Stacked) == (perturb == "auto")
    assert found["auto"] == pytest.approx(found["in_place"], rel=1e-5)


def test_adapters_of_stacked_experts_take_one_loss_after_the_other(parts, tmp_path, caplog):
    """peft multiplies the factors of such an adapter outside any layer, which several copies have no form for."""
    import transformers as tf

    _, tokenizer, data = parts
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=2, **sizes)
    lora = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False)
    model = get_peft_model(tf.MixtralForCausalLM(config), lora).eval()
    with caplog.at_level("INFO"):
        trainer, losses = train((model, tokenizer, data), tmp_path, per_device_train_batch_size=4, perturb="auto")
    assert trainer.bare_optimizer.perturb.name == "in_place"
    assert "one loss after the other, since they cannot be stacked here. The model passes" in caplog.text
    assert len(losses) == 3
    assert len(set(losses)) == 3
    with pytest.raises(UsageError, match="has no form for several copies"):
        train((model, tokenizer, data), tmp_path / "asked", per_device_train_batch_size=4, perturb="stacked")


def test_whole_models_are_not_stacked_unless_asked(parts, tmp_path):
    trainer, _ = train(parts, tmp_path / "dense")
    assert trainer.bare_optimizer.perturb.name == "in_place"


def test_low_rank_directions_stacked(parts, tmp_path, tiny_lm_path):
    from transformers import AutoModelForCausalLM

    losses = []
    for perturb in ("in_place", "stacked", "in_forward"):
        model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval()
        losses.append(train((model, *parts[1:]), tmp_path / perturb, method="lozo", perturb=perturb)[1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_loss_of_ones_own_is_not_stacked(parts, tmp_path):
    model = adapter(parts)
    trainer = make_trainer(model, tmp_path, per_device_train_batch_size=4)

    class Own(type(trainer)):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    trainer.__class__ = Own
    trainer.create_optimizer()
    assert trainer.bare_optimizer.perturb.name == "in_place"
    model[0].unload()


def test_repeated_cells_count_for_their_own_copy():
    batch = {
        "labels": torch.tensor([0, 1]),
        "cells": torch.tensor([[0, 0, -1], [1, 2, 3]]),
        "option_mask": torch.ones(2, 2, dtype=torch.bool),
        "masked": True,
    }
    repeated = repeat_batch(batch, 2)
    assert repeated["cells"].tolist() == [[0, 0, -1], [1, 2, 3], [4, 4, -1], [5, 6, 7]]
    assert repeated["labels"].tolist() == [0, 1, 0, 1]
    assert repeated["option_mask"].shape == (4, 2)
    assert repeated["masked"] is True


def test_unknown_ways_are_refused(tmp_path):
    with pytest.raises(UsageError, match="perturb must be one of"):
        ZOConfig(output_dir=str(tmp_path), perturb="twice")
