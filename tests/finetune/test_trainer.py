"""ZOTrainer: the same steps as a textbook loop, checkpoints that continue, and errors that lose nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from trainer_cases import make
from trainers import make_trainer
from transformers import AutoModelForCausalLM

from zokernel.cli import main
from zokernel.directions import Dense
from zokernel.errors import RunError, UsageError
from zokernel.finetune import ZOConfig, ZOTrainer, option_scores
from zokernel.finetune.scoring.options import classification_loss
from zokernel.journal import Journal


class KeepBatches(ZOTrainer):
    """A trainer that remembers the batches it was given."""

    batches: list

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)


def test_training_equals_a_textbook_spsa_loop(parts, tmp_path, tiny_lm_path):
    trainer = make_trainer(parts, tmp_path, eps=1e-2)
    trainer.__class__, trainer.batches = KeepBatches, []
    trainer.train()
    reference = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval().to(trainer.args.device)
    weights, eps, lr = dict(reference.named_parameters()), 1e-2, 1e-3
    directions = Dense("rademacher")
    losses = []
    with torch.no_grad():
        for step, batch in enumerate(trainer.batches):
            z = directions(weights, seed=3, step=step, index=0)
            start = {name: w.clone() for name, w in weights.items()}
            ends = []
            for sign in (1, -1):
                for name, w in weights.items():
                    w.copy_(start[name] + sign * eps * z[name])
                ends.append(classification_loss(option_scores(reference, batch), batch["labels"]).item())
            for name, w in weights.items():
                w.copy_(start[name] - lr * (ends[0] - ends[1]) / (2 * eps) * z[name])
            losses.append(sum(ends) / 2)
    assert len(losses) == 20
    # Both are fp32; one step rounds each weight a few times (half an ulp of values below 1 is 3e-8), and the loop
    # feeds differences of rounding back through the loss at slope 1/eps.
    torch.testing.assert_close([row["loss"] for row in trainer.run_log.rows], losses, rtol=0, atol=2e-5)
    for name, w in dict(trainer.model.named_parameters()).items():
        torch.testing.assert_close(w, weights[name], rtol=0, atol=5e-6)


def test_it_learns(parts, tmp_path):
    trainer = make_trainer(parts, tmp_path, max_steps=150, num_perturbations=4, eps=1e-2, learning_rate=3e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    assert after["eval_accuracy"] > max(0.8, before["eval_accuracy"])
    assert trainer.run_log.forwards == 150 * 8


@pytest.mark.parametrize("method", ["mezo", "kerzoo"])
def test_a_resumed_run_ends_with_the_same_bits(parts, tmp_path, tiny_lm_path, method):
    model, tokenizer, data = parts
    start = {name: w.clone() for name, w in model.state_dict().items()}
    settings = {"method": method, "max_steps": 12, "save_strategy": "steps", "save_steps": 5, "save_total_limit": None}
    make_trainer(parts, tmp_path / "whole", **settings).train()
    whole = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(start)
    stopped = make_trainer(parts, tmp_path / "stopped", **settings)
    stopped.train()
    fresh = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval()
    resumed = make_trainer((fresh, tokenizer, data), tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-5"))
    assert resumed.state.global_step == 12
    for name, w in fresh.state_dict().items():
        assert torch.equal(w, whole[name]), name


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(parts, tmp_path):
    model, _, _ = parts
    start = {name: w.clone() for name, w in model.state_dict().items()}
    # The order of examples is random, not by length, so that both runs see the same sixteen examples per step.
    settings = {"max_steps": 3, "train_sampling_strategy": "random"}
    make_trainer(parts, tmp_path / "a", per_device_train_batch_size=16, **settings).train()
    whole = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(start)
    split = make_trainer(
        parts, tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=4, **settings
    )
    split.train()
    assert split.run_log.forwards == 3 * 2 * 4
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w, whole[name], rtol=0, atol=1e-5)


def test_accumulation_gives_first_order_methods_the_gradient_of_the_whole_batch(parts, tmp_path):
    model, _, _ = parts
    start = {name: w.clone() for name, w in model.state_dict().items()}
    settings = {"max_steps": 3, "train_sampling_strategy": "random", "method": "sgd", "learning_rate": 0.1}
    make_trainer(parts, tmp_path / "a", per_device_train_batch_size=16, max_grad_norm=0.0, **settings).train()
    whole = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(start)
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    make_trainer(parts, tmp_path / "b", **accumulated, **settings).train()
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w, whole[name], rtol=0, atol=1e-5)
    assert any((whole[name].cpu() - start[name].cpu()).abs().max() > 1e-3 for name in start)


def test_first_order_baseline_uses_the_same_loss_and_flags(parts, tmp_path):
    trainer = make_trainer(parts, tmp_path, method="adamw", learning_rate=1e-2, max_steps=30)
    trainer.train()
    assert not trainer.zeroth_order
    rows = trainer.run_log.rows
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert "projected_gradient" not in rows[0]


def test_the_plain_rate_of_a_step_is_that_of_its_schedule(parts, tmp_path):
    trainer = make_trainer(parts, tmp_path, method="mezo", max_steps=4, lr_scheduler_type="linear")
    trainer.train()
    assert trainer._course.rates == pytest.approx([1e-3 * (1 - step / 4) for step in range(4)], rel=1e-12)


def test_metrics_of_any_kind_are_recorded_and_restored(tmp_path, caplog, capsys):
    """Scores by class, as seqeval and compute_metrics of one's own return them."""
    scores = {"f1": [0.25, 0.5], "by_class": {"PER": {"number": np.int64(3)}}, "none": None, "mean": np.float32(0.5)}
    logs = []
    for resume in (False, True):
        journal = {"save_strategy": "journal"}
        trainer = make("text_classification", tmp_path, journal, eval_strategy="steps", eval_steps=2)
        trainer.compute_metrics = lambda _: scores | {"odd": object(), "tensor": torch.tensor(2)}
        trainer.train(resume_from_checkpoint=resume)
        logs.append([row for row in trainer.state.log_history if "eval_loss" in row])
    assert [message for message in caplog.messages if "odd" in message] == [
        "eval_odd: not in the journal, which holds numbers, texts and lists."
    ]
    for row in logs[0]:
        assert row.pop("eval_odd")
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3
    metrics = Journal.read(tmp_path / "run").events[0]["metrics"]
    assert (metrics["eval_f1"], metrics["eval_none"], metrics["eval_tensor"]) == ([0.25, 0.5], None, 2)
    assert metrics["eval_by_class"] == {"PER": {"number": 3}}
    assert main(["journal", "show", str(tmp_path / "run")]) == 0
    assert "eval_f1 [0.25, 0.5], eval_by_class {'PER': {'number': 3" in capsys.readouterr().out


def test_a_nan_loss_stops_and_keeps_the_last_good_weights(parts, tmp_path):
    model, _, _ = parts
    trainer = make_trainer(parts, tmp_path, max_steps=10)
    calls, good = [], {}

    def break_after_six_forwards(module, args, output):
        calls.append(1)
        if len(calls) == 6:
            good.update({name: w.clone() for name, w in model.state_dict().items()})
        if len(calls) > 6:
            output.logits = output.logits * math.nan

    handle = model.register_forward_hook(break_after_six_forwards)
    with pytest.raises(RunError, match=r"nan at step 4.*last-good"):
        trainer.train()
    handle.remove()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "last-good", dtype=torch.float32).state_dict()
    assert len(trainer.run_log.rows) == 3
    for name, w in model.state_dict().items():
        assert torch.equal(saved[name], w.cpu()), name


def test_an_interrupt_finishes_the_step_and_saves(parts, tmp_path):
    import os
    import signal

    from zokernel.finetune.monitor.interrupt import StopOnInterrupt

    # Evaluated and saved as best after every step before the signal: the checkpoint to resume from must survive that.
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True}
    trainer = make_trainer(parts, tmp_path, max_steps=50, **best)
    stopper = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StopOnInterrupt))
    model = parts[0]

    def interrupt_in_the_third_step(module, args, output):
        if trainer.state.global_step == 2 and not stopper.interrupted:
            os.kill(os.getpid(), signal.SIGINT)

    handle = model.register_forward_hook(interrupt_in_the_third_step)
    previous = signal.getsignal(signal.SIGINT)
    trainer.train()
    handle.remove()
    assert signal.getsignal(signal.SIGINT) is previous
    assert trainer.state.global_step == 3
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    assert stopper.interrupted


def test_failed_training_restores_ctrl_c(parts, tmp_path):
    """Whoever catches the error, a notebook say, needs Ctrl-C again; it would have been noted and then ignored."""
    import signal

    trainer = make_trainer(parts, tmp_path, max_steps=5)
    model = parts[0]
    previous = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def fails_in_the_second_step(module, args, output):
        if trainer.state.global_step == 1:
            raise ZeroDivisionError("in the model")

    handle = model.register_forward_hook(fails_in_the_second_step)
    with pytest.raises(ZeroDivisionError, match="in the model"):
        trainer.train()
    handle.remove()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == previous


def test_batches_of_another_trainer_are_refused_with_the_way_to_train_them(tmp_path):
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    rows = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 0}] * 4
    with pytest.raises(UsageError, match=r"use zeroth_order\(Trainer\)"):
        ZOTrainer(model=model, args=ZOConfig(output_dir=str(tmp_path), max_steps=2), train_dataset=rows)


def test_models_that_cannot_be_trained_are_refused(parts, tmp_path):
    model, tokenizer, data = parts
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable parameter"):
        make_trainer(parts, tmp_path)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    half = model.to(torch.bfloat16)
    with pytest.raises(UsageError, match=r"bfloat16.*dtype float32"):
        make_trainer((half, tokenizer, data), tmp_path, perturb="in_place")


def test_weights_stored_in_bf16_are_perturbed_exactly_unless_told_otherwise(parts, tmp_path):
    model, tokenizer, data = parts
    trainer = make_trainer((model.to(torch.bfloat16), tokenizer, data), tmp_path, max_steps=2, learning_rate=0.0)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    trainer.train()
    assert trainer.settings.setting("perturb").value == "in_forward"
    assert trainer.settings.setting("perturb").source == "auto"
    for name, w in model.state_dict().items():
        assert torch.equal(w, before[name]), name


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "mezzo"}, "There is no method 'mezzo': choose one of auto, adamw, .*grzo"),
        ({"precision": "fp8"}, "precision must be"),
        ({"method_args": ["radius"]}, "key=value"),
        ({"method_args": ["radius=0.5"]}, "Method 'mezo' has no option 'radius'"),
        ({"method_args": ["clip_slope=10"]}, r"\(--method qzo has clip_slope\)"),
        ({"method": "kerzoo", "method_args": ["radius=wide"]}, "is a number"),
        ({"method": "kerzoo", "method_args": ["grad_at=md"]}, r"\(--method kerzoo_printed has grad_at\)"),
    ],
)
def test_wrong_settings_are_named(settings, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        ZOConfig(output_dir=str(tmp_path), **settings).method_options()


def test_method_options_come_from_flags_and_pairs(tmp_path):
    config = ZOConfig(
        output_dir=str(tmp_path), method="kerzoo", eps=1e-2, method_args=["kernel_order=5", "radius_schedule=none"]
    )
    options = config.method_options()
    assert options["eps"] == 1e-2
    assert options["kernel_order"] == 5
    assert options["radius_schedule"] == "none"
    assert options["seed"] == config.seed


@pytest.mark.parametrize("lora", [False, True])
def test_the_run_ends_with_the_best_weights(parts, tmp_path, lora):
    model, tokenizer, data = parts
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2)).eval()
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "load_best_model_at_end": True}
    # So large a step that the loss rises again: the best weights are not the last.
    trainer = make_trainer(
        (model, tokenizer, data), tmp_path, max_steps=30, learning_rate=0.1 if lora else 0.02, **best
    )
    trainer.train()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert min(losses.values()) < losses[30]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-7)
