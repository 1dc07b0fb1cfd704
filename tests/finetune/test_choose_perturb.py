"""``--perturb``: losses taken in place, with in_forward and stacked train alike, for every kind of batch."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainers import make_trainer
from transformers import Trainer, TrainingArguments

from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig, zeroth_order
from zokernel.finetune.data.repeat import repeat_batch
from zokernel.finetune.settings.record import Setting
from zokernel.finetune.settings.resolve import resolve
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
    by_perturb = {}
    for perturb in ("in_place", "auto"):
        model = adapter(parts)
        trainer, losses = train(model, tmp_path / perturb, perturb=perturb, **settings)
        by_perturb[perturb] = losses
        model[0].unload()
        assert isinstance(trainer.bare_optimizer.perturb, Stacked) == (perturb == "auto")
    assert by_perturb["auto"] == pytest.approx(by_perturb["in_place"], rel=1e-5)


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


def bf16(parts, *, hides_head=False):
    """Weights in bf16; with ``hides_head`` the head reads its own by another name of their memory."""
    model, tokenizer, data = parts
    model = model.bfloat16()
    if hides_head:
        hidden = model.get_output_embeddings().weight.detach()
        model.get_output_embeddings().forward = lambda x: x @ hidden.T
    return model, tokenizer, data


def test_weights_in_bf16_are_perturbed_in_forward_after_a_check(parts, tmp_path, caplog):
    start = [p.detach().clone() for p in parts[0].bfloat16().parameters()]
    with caplog.at_level("INFO"):
        trainer, _ = train(bf16(parts), tmp_path, eps=1e-1, learning_rate=0.0)
    assert trainer.settings.setting("perturb") == Setting("perturb", "in_forward", "auto")
    assert "perturb: in_forward, which keeps no copy of weights below fp32 (the same perturbed loss" in caplog.text
    assert trainer.measuring_forwards == 3
    assert all(torch.equal(left, right) for left, right in zip(start, parts[0].parameters(), strict=True))
    trainer.train()
    assert trainer.measuring_forwards == 3


def test_weights_in_bf16_that_are_read_by_another_name_are_copied(parts, tmp_path, caplog):
    settings = {"eps": 1e-1, "save_strategy": "journal"}
    start = {name: w.clone() for name, w in parts[0].bfloat16().state_dict().items()}
    trainer, losses = train(bf16(parts, hides_head=True), tmp_path / "auto", **settings)
    assert trainer.settings.setting("perturb") == Setting("perturb", "in_place:copy", "auto")
    assert "perturb: in_place:copy, which keeps a copy of the weights (the same perturbed loss is" in caplog.text
    parts[0].load_state_dict(start)
    expected = train(parts, tmp_path / "copy", perturb="in_place:copy", **settings)[1]
    assert losses == expected
    parts[0].load_state_dict(start)
    resumed = make_trainer(parts, tmp_path / "auto", max_steps=5, num_perturbations=2, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.bare_optimizer.perturb.name, resumed.measuring_forwards) == ("in_place:copy", 0)
    assert [row["loss"] for row in resumed.run_log.rows][:3] == losses


@pytest.mark.parametrize(
    ("settings", "perturb"),
    [
        ({}, "in_forward"),
        ({"method": "grzo"}, "auto"),
        ({"method": "forward_difference", "method_args": ["per_example=true"]}, "auto"),
        ({"method": "forward_gradient"}, "auto"),
        ({"distribution": "sphere"}, "in_place:copy"),
        ({"torch_compile": True}, "in_place:copy"),
    ],
    ids=str,
)
def test_what_auto_is_for_weights_below_fp32(settings, perturb, tmp_path):
    """A method may leave them in place by itself; compiled blocks and coupled directions need a copy."""
    config = ZOConfig(output_dir=str(tmp_path), **settings)
    resolved = resolve(config, trained="full parameters", num_examples=100, low_precision="torch.bfloat16")
    assert resolved["perturb"] == perturb


def test_examples_with_directions_of_their_own_train_weights_in_bf16(parts, tmp_path):
    trainer, losses = train(bf16(parts), tmp_path, method="grzo", num_perturbations=None)
    assert trainer.settings.setting("perturb") == Setting("perturb", "per_example", "auto")
    assert len(losses) == 3


def test_a_model_in_bf16_that_the_trainer_makes_is_perturbed_exactly(tmp_path):
    data = [{"x": torch.ones(8).bfloat16(), "labels": torch.ones(4)}] * 8
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = zeroth_order(Trainer, learning_rate=1e-3, save_strategy="no")(
        model_init=lambda: OfTwoNames(by_another_name=False), args=args, train_dataset=data
    )
    trainer.train()
    assert trainer.settings["perturb"] == "in_forward"


class OfTwoNames(torch.nn.Module):
    """Reads a matrix as an attribute of it, or by another name of its memory."""

    def __init__(self, *, by_another_name):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.matrix = torch.nn.Linear(8, 8).bfloat16(), torch.nn.Parameter(torch.randn(4, 8).bfloat16())
        self.hidden = [self.matrix.detach()] if by_another_name else []

    def forward(self, x, labels):
        logits = self.layer(x) @ (self.hidden[0].T if self.hidden else self.matrix.T)
        return {"loss": torch.nn.functional.mse_loss(logits.float(), labels), "logits": logits}


@pytest.mark.parametrize(("by_another_name", "perturb"), [(False, "in_forward"), (True, "in_place:copy")])
def test_any_trainer_of_a_model_in_bf16_takes_the_losses_of_moved_weights(by_another_name, perturb, tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(8, generator=generator).bfloat16(), "labels": torch.randn(4, generator=generator)}
        for _ in range(8)
    ]
    records = []
    for number, chosen in enumerate(("auto", "in_place:copy")):
        args = TrainingArguments(
            str(tmp_path / str(number)), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = zeroth_order(Trainer, perturb=chosen, eps=5e-2, learning_rate=1e-3, save_strategy="no")(
            model=OfTwoNames(by_another_name=by_another_name), args=args, train_dataset=data
        )
        trainer.train()
        records.append(trainer.method_optimizer.record())
        assert trainer.settings["perturb"] == (perturb if chosen == "auto" else chosen)
    assert records[0] == records[1]


def test_a_custom_loss_is_not_stacked(parts, tmp_path):
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
