"""``--method auto`` asks how far it may walk before its first step, and lowers its rate if that is less."""

from __future__ import annotations

import json
import logging
import math

import peft
import pytest
import torch
from trainers import load_parts, make_trainer
from transformers import AutoConfig

from zokernel.cli import main
from zokernel.finetune.models.streamed import StreamingOptions, load_streamed
from zokernel.finetune.settings.auto import (
    LEAST_WALK,
    NOISE_SCALE,
    WALK,
    learning_rate,
    shorter_walk,
    walk_within_swing,
)
from zokernel.finetune.trainer import measuring
from zokernel.finetune.trainer.measure_rise import batches_to_try, measure_rise
from zokernel.journal import Journal
from zokernel.kernels.plan_walk import FIRST_WALK
from zokernel.kernels.walk_rise import Rise
from zokernel.offload import streamed_blocks

STEPS = 36  # of three forwards: a quarter of them measures eight batches and one more
RUN = {"method": "auto", "learning_rate": None, "max_steps": STEPS, "eval_strategy": "no", "save_strategy": "no"}
RUN |= {"load_best_model_at_end": False, "per_device_train_batch_size": 4}
DEFAULT = learning_rate("full parameters", num_perturbations=2, steps=STEPS)


@pytest.fixture
def trainer(tiny_lm_path, tiny_reviews_path, tmp_path):
    def make(**settings):
        return make_trainer(load_parts(tiny_lm_path, tiny_reviews_path), tmp_path / "run", **RUN | settings)

    return make


def steep(monkeypatch, *, rise=0.9, error=0.01):
    """Fake a rise of the loss at the end of the walk; return the arguments of every measurement."""
    calls = []

    def measured(optimizer, batches, loss, distance, *, perturb):
        calls.append((len(batches), distance, float(loss(batches[0]).detach())))
        return Rise(distance, 0.7, rise, error, 1.0, 3 * len(batches))

    monkeypatch.setattr(measuring, "measure_rise", measured)
    return calls


def test_losses_are_taken_at_both_ends_of_separate_walks_and_the_weights_stay(trainer):
    zo_trainer = trainer()
    zo_trainer.create_optimizer()
    optimizer, model = zo_trainer.bare_optimizer, zo_trainer.model
    batches = [zo_trainer._batch_of([4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3]) for n in range(3)]
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = measure_rise(optimizer, batches, zo_trainer._loss, 0.05)
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    rises = []
    for number, batch in enumerate(batches):
        losses = []
        for offset in (0.0, 0.05, -0.05):
            perturbed = {name: tensor.clone() for name, tensor in optimizer.named_params.items()}
            optimizer.directions.add_(perturbed, offset, seed=optimizer.seed, step=0, index=FIRST_WALK + number)
            with torch.no_grad():
                original = {name: tensor.clone() for name, tensor in optimizer.named_params.items()}
                for name, tensor in optimizer.named_params.items():
                    tensor.copy_(perturbed[name])
                losses.append(float(zo_trainer._loss(batch)))
                for name, tensor in optimizer.named_params.items():
                    tensor.copy_(original[name])
        rises.append((losses[1] + losses[2]) / 2 - losses[0])
    assert result.rise == pytest.approx(sum(rises) / 3, abs=1e-5)
    assert result.forwards == 9


def test_the_rate_follows_what_was_measured(trainer, monkeypatch, caplog):
    calls = steep(monkeypatch)
    zo_trainer = trainer()
    with caplog.at_level(logging.INFO, logger="zokernel.finetune.trainer.measuring"):
        zo_trainer.train()
    assert [(count, distance) for count, distance, _ in calls] == [(8, WALK["full parameters"])]
    rise = Rise(WALK["full parameters"], 0.7, 0.9, 0.01, 1.0, 24)
    share = shorter_walk(rise, directions=2 * STEPS, batch=4, sharing=4)
    assert share == LEAST_WALK
    rate = zo_trainer.settings.setting("learning_rate")
    assert (rate.value, rate.source) == (pytest.approx(LEAST_WALK * DEFAULT, rel=5e-3), "auto")
    assert zo_trainer.bare_optimizer.param_groups[0]["initial_lr"] == rate.value
    assert (
        f"learning_rate {rate.value:.3g} instead of {DEFAULT:.3g}: a random walk of 0.0135 raises the loss"
        in caplog.text
    )
    assert "(from 0.7; 24 forwards)" in caplog.text


@pytest.mark.parametrize("sharing", [16, 1], ids=["shared directions", "per example"])
def test_micro_batches_do_not_change_the_walk(sharing):
    """A smaller batch has steeper slopes by its noise alone; the step of 16 examples is the same."""
    shares = [
        shorter_walk(
            Rise(1.0, 1.0, 9.0, 0.01, math.sqrt(1 + NOISE_SCALE / b), 24), directions=64, batch=b, sharing=sharing
        )
        for b in (16, 4, 1)
    ]
    assert shares == pytest.approx([4 / 9 / math.sqrt(1 + NOISE_SCALE / sharing)] * 3)


def test_an_adapter_changes_the_loss_of_four_examples_by_15_percent_at_most():
    """By its noise alone, a batch of b has slopes sqrt((1 + 10 / b) / 3.5) times those of four."""
    for batch in (1, 4, 16):
        slope = 4.2 * math.sqrt((1 + NOISE_SCALE / batch) / (1 + NOISE_SCALE / 4))
        rise = Rise(0.065, 0.78, 0.2, 0.1, slope, 24)
        assert walk_within_swing(rise, trained="LoRA", batch=batch) == pytest.approx(0.15 * 0.78 / (4.2 * 0.065))
        assert walk_within_swing(rise, trained="full parameters", batch=batch) == 1
    calm, wild = Rise(0.065, 1.2, 0.0, 0.1, 1.9, 24), Rise(0.065, 0.78, 0.2, 0.1, 100.0, 24)
    assert walk_within_swing(calm, trained="LoRA", batch=4) == 1
    assert walk_within_swing(wild, trained="LoRA", batch=4) == LEAST_WALK
    for unknown in (Rise(0.065, -0.5, 0.2, 0.1, 4.2, 24), Rise(0.065, 1.0, math.inf, math.inf, math.nan, 24)):
        assert walk_within_swing(unknown, trained="LoRA", batch=4) == 1


def test_the_rate_of_an_adapter_follows_the_swing(trainer, monkeypatch, caplog):
    swings = Rise(WALK["LoRA"], 0.7, 0.01, 0.1, 4.0, 24)
    monkeypatch.setattr("zokernel.finetune.trainer.measuring.measure_rise", lambda *args, **options: swings)
    monkeypatch.setattr("zokernel.finetune.trainer.measuring.trained_part", lambda model: "LoRA")
    zo_trainer = trainer()
    with caplog.at_level(logging.INFO, logger="zokernel.finetune.trainer.measuring"):
        zo_trainer._choose_rate(zo_trainer.model, DEFAULT)
    share = 0.15 * 0.7 / (4.0 * WALK["LoRA"])
    assert zo_trainer.args.learning_rate == pytest.approx(share * DEFAULT, rel=5e-3)
    assert "changes the loss of a training batch by 37 % of itself (0.26 of 0.7; 24 forwards)" in caplog.text


def test_a_walk_without_harm_stays(trainer, caplog):
    zo_trainer = trainer()
    with caplog.at_level(logging.INFO, logger="zokernel.finetune.trainer.measuring"):
        zo_trainer.train()
    assert zo_trainer.args.learning_rate == pytest.approx(DEFAULT)
    assert f"learning_rate {DEFAULT:.3g}: a random walk of 0.0135 raises the loss of training batches by" in caplog.text


def test_losses_that_are_not_finite_leave_a_tenth_of_the_rate(trainer, caplog):
    zo_trainer = trainer()
    loss = zo_trainer._loss
    zo_trainer._loss = lambda batch: loss(batch) + float("inf")
    with caplog.at_level(logging.INFO, logger="zokernel.finetune.trainer.measuring"):
        zo_trainer._choose_rate(zo_trainer.model, DEFAULT)
    assert zo_trainer.args.learning_rate == pytest.approx(LEAST_WALK * DEFAULT, rel=5e-3)
    assert "leads to losses that are not finite (24 forwards), so the run walks 0.0014." in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e-3}, "auto chose forward_difference. learning_rate 0.001: as given, in place of one"),
        ({"max_steps": 6}, "not measured: the run has 18 forwards, and the test needs a run of 48."),
        ({"method": "mezo"}, ""),
    ],
)
def test_nothing_is_measured_where_the_rate_is_given_or_the_run_short(trainer, monkeypatch, caplog, settings, message):
    calls = steep(monkeypatch)
    with caplog.at_level(logging.INFO, logger="zokernel.finetune.trainer.measuring"):
        trainer(**settings).train()
    assert calls == []
    assert message in caplog.text
    assert ("Method auto" in caplog.text) == bool(message)
    assert [batches_to_try(n) for n in (0, 47, 48, 95, 96, 9999)] == [0, 0, 4, 7, 8, 8]


def test_a_resumed_run_keeps_the_rate_and_its_bits(flags, tmp_path, monkeypatch):
    start = flags.index("--learning_rate")
    flags = [*flags[:start], *flags[start + 2 :]]
    index = flags.index("--max_steps")
    flags[index + 1] = str(STEPS)
    command = ["finetune", *flags, "--method", "auto", "--save_strategy", "journal"]
    calls = steep(monkeypatch)
    assert main(command) == 0
    whole = Journal.read(tmp_path / "run").steps
    assert len(calls) == 1
    assert whole[0].learning_rates[0] == pytest.approx(LEAST_WALK * DEFAULT, rel=5e-3)

    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert next(row for row in settings if row["name"] == "learning_rate")["value"] == whole[0].learning_rates[0]
    # A kill after some steps: the end of the journal and all results are lost.
    (tmp_path / "run" / "metrics.json").unlink()
    journal = tmp_path / "run" / "journal.zkj"
    journal.write_bytes(journal.read_bytes()[: journal.stat().st_size * 2 // 3])
    assert main(command) == 0
    assert len(calls) == 1, "the recorded rate is taken, nothing is measured again"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["measuring_forwards"] == 24, "those of the process that was killed"
    resumed = Journal.read(tmp_path / "run").steps
    assert [(s.losses, s.learning_rates) for s in resumed] == [(s.losses, s.learning_rates) for s in whole]


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "weights"])
@pytest.mark.parametrize(("where", "updates"), [("disk", "disk"), ("disk", "journal"), ("cpu", "disk")])
def test_streamed_weights_rise_by_the_same_bits_in_few_passes(
    tiny_lm_path, tiny_reviews_path, tmp_path, monkeypatch, where, updates, lora
):
    """Batches of four take the memory of an evaluation by eight losses at a time: 24 of them are three passes."""
    results = []

    def watched(*args, **kwargs):
        results.append(measure_rise(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(measuring, "measure_rise", watched)
    resident, tokenizer, data = load_parts(tiny_lm_path, tiny_reviews_path)
    streaming = StreamingOptions(tmp_path / "files", trains_weights=not lora, where=where, updates=updates)
    architecture = AutoConfig.from_pretrained(tiny_lm_path)
    streamed = load_streamed(architecture, tiny_lm_path, torch.float32, streaming, kind="causal", name="tiny")
    rates, passes = [], []
    for model in (resident, streamed):
        blocks = streamed_blocks(model)
        if lora:
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
            torch.manual_seed(0)
            for name, tensor in model.named_parameters():
                if "lora_" in name:
                    tensor.data.normal_(std=0.3)
        before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        options = {**RUN, "per_device_eval_batch_size": 32, "method_args": ["per_example=false"]}
        zo_trainer = make_trainer((model, tokenizer, data), tmp_path / "run", **options)
        zo_trainer.create_optimizer()
        rates.append(zo_trainer.args.learning_rate)
        assert zo_trainer.measuring_forwards >= 24  # whether losses can be stacked takes one more
        if blocks is not None:
            passes = [blocks.passes[unit.name] for unit in blocks.units if unit.is_block]
            blocks.settle_all()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert results[0] == results[1]
    assert results[0].forwards == 24
    assert abs(results[0].rise) > 1e-4
    assert rates[0] == rates[1]
    assert set(passes) == {3}


def test_runs_on_streamed_weights_measure_and_count(flags, tmp_path, caplog):
    index = flags.index("--learning_rate")
    flags = [*flags[:index], *flags[index + 2 :]]
    flags[flags.index("--max_steps") + 1] = str(STEPS)
    options = ["--method", "auto", "--lora", "true", "--method_args", "per_example=false", "--precision", "fp32"]
    messages, metrics = [], []
    for folder, offload in ((tmp_path / "memory", []), (tmp_path / "disk", ["--offload", "disk"])):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert main(["finetune", *flags, *options, *offload, "--output_dir", str(folder)]) == 0
        messages.append(next(line for line in caplog.messages if line.startswith("Method auto")))
        metrics.append(json.loads((folder / "metrics.json").read_text()))
    assert messages[0] == messages[1]
    assert "raises the loss of training batches by" in messages[0]
    # In memory one more is taken, by which it is seen that adapters can be stacked.
    assert [found["measuring_forwards"] for found in metrics] == [25, 24]
    assert [found["rate_forwards"] for found in metrics] == [24, 24]
    assert metrics[0]["forwards"] == metrics[1]["forwards"] == 3 * STEPS
    report = (tmp_path / "disk" / "report.md").read_text()
    assert f"{STEPS} steps, {3 * STEPS} forward passes (and 24 before them to choose settings)" in report
    report = (tmp_path / "memory" / "report.md").read_text()
    assert "(and 25 before them: 24 for the learning rate, 1 for other settings)" in report
