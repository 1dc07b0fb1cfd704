"""zeroth_order(Trainer): the plain trainer's loss, the same bits after a kill, and a model that reloads."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest
import torch
import transformers
from trainer_cases import CASES, arguments, make, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig, ZOTrainer, zeroth_order
from zokernel.finetune.data.sampling import ReseedingSampler
from zokernel.finetune.trainer import empty_cache
from zokernel.journal import Journal

WITH_TRL = [name for name in CASES if name not in list(CASES)[:8]]
SKIP_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
EVERY = [pytest.param(name, marks=SKIP_TRL if name in WITH_TRL else ()) for name in CASES]


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("name", EVERY)
def test_the_loss_is_that_of_the_plain_trainer(name, tmp_path):
    """Losses of a whole step, accumulation included, at the untrained weights and without dropout."""
    trainer, kwargs = CASES[name](tmp_path / "plain", max_steps=1, optim="sgd")

    class Plain(trainer):
        losses = ()

        def _get_train_sampler(self, *args):  # so that masks and augmentations are the same
            return ReseedingSampler(super()._get_train_sampler(*args), seed=self.args.seed)

        def training_step(self, model, *args, **options):
            for module in self.model.modules():  # dropout off, batch statistics fixed, which the plain trainer has not
                if module is not self.model:
                    module.train = lambda mode=True, module=module: module
                    module.training = False
            loss = super().training_step(model, *args, **options)
            self.losses += (loss.item(),)
            return loss

    plain = Plain(**kwargs)
    plain.train()

    class Recording(zeroth_order(trainer)):
        step_loss = None

        def check_loss(self):
            super().check_loss()
            with torch.no_grad():
                self.step_loss = self._step_loss().item()

    _, kwargs = CASES[name](tmp_path / "zo", max_steps=1)
    recording = Recording(**kwargs)
    recording.train()
    assert recording.step_loss == pytest.approx(sum(plain.losses), abs=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_a_killed_run_continues_to_the_same_bits_and_reloads(name, tmp_path):
    whole = make(name, tmp_path / "whole", save_steps=2)
    before = weights(whole)
    whole.train()
    after = weights(whole)
    assert any(not torch.equal(before[key], after[key]) for key in before)

    killed = make(name, tmp_path / "killed", save_steps=2)
    killed.add_callback(KillAfter(5))
    with pytest.raises(Killed):
        killed.train()
    assert Journal.read(tmp_path / "killed" / "run").num_steps == 5
    resumed = make(name, tmp_path / "killed", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert [row["loss"] for row in resumed.run_log.rows] == [row["loss"] for row in whole.run_log.rows]
    for key, tensor in weights(resumed).items():
        assert torch.equal(tensor, after[key]), key

    resumed.save_model(str(tmp_path / "saved"))
    model = resumed.model
    if hasattr(model, "peft_config"):
        from safetensors.torch import load_file

        saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        trained = {key.replace(".default", ""): value for key, value in after.items() if "lora_" in key}
        assert saved.keys() == trained.keys()
        assert all(torch.equal(saved[key], trained[key]) for key in trained)
    elif isinstance(model, transformers.PreTrainedModel):
        reloaded = type(model).from_pretrained(tmp_path / "saved").state_dict()
        assert all(torch.equal(reloaded[key], value) for key, value in after.items())


@pytest.mark.parametrize("settings", [{"method": "kerzoo", "num_perturbations": 2}, {"perturb": "in_forward"},
                                      {"method": "auto"}, {"save_strategy": "journal"}])  # fmt: skip
def test_every_method_and_way_of_perturbing_works_on_top(settings, tmp_path):
    trainer = make("text_classification", tmp_path, settings)
    trainer.train()
    journal = Journal.read(tmp_path / "run")
    assert journal.num_steps == 6
    assert len(journal.steps[0].losses) == trainer.forwards_per_step - (settings.get("method") == "none")
    assert trainer.run_log.forwards == 6 * trainer.forwards_per_step
    if "perturb" in settings:
        assert trainer.settings["perturb"] == "in_forward"
    if settings.get("save_strategy") == "journal":
        assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_logged_metrics_of_trl_are_those_of_training(tmp_path):
    pytest.importorskip("trl")
    trainer = make("supervised_finetuning", tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 6
    assert all("mean_token_accuracy" in row and "eval_mean_token_accuracy" not in row for row in rows)
    assert sum("eval_mean_token_accuracy" in row for row in trainer.state.log_history) == 2


def test_trl_counts_a_batch_once_and_no_loss_that_is_only_tried(tmp_path):
    trl = pytest.importorskip("trl")
    _, kwargs = CASES["supervised_finetuning"](tmp_path / "plain", max_steps=2, optim="sgd", learning_rate=0.0)
    plain = trl.SFTTrainer(**kwargs)
    plain.train()
    trainer = make("supervised_finetuning", tmp_path / "zo", max_steps=2, learning_rate=0.0)
    trainer.train()
    for name in ("num_tokens", "mean_token_accuracy", "entropy", "loss"):
        expected, actual = ([row[name] for row in t.state.log_history if "loss" in row] for t in (plain, trainer))
        # Averages over perturbed points, whose radius is 1e-3.
        assert actual == pytest.approx(expected, rel=0 if name == "num_tokens" else 2e-3), name
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["forwards"] for row in rows] == [4, 8]
    assert all("grad_norm" not in row and "projected_gradient" in row for row in rows)


def test_memory_that_only_a_backward_pass_needs_is_not_saved(tmp_path, caplog):
    pytest.importorskip("trl")
    with caplog.at_level("INFO"):
        make("supervised_finetuning", tmp_path, activation_offloading=True, gradient_checkpointing=True).train()
    for name in ("activation_offloading", "gradient_checkpointing"):
        assert f"{name} is off: without a backward pass, no activation is kept." in caplog.messages


def test_wrapping_twice_keeps_the_settings():
    twice = zeroth_order(zeroth_order(Trainer, method="kerzoo"), eps=1e-2)
    assert twice.zo_settings == {"method": "kerzoo", "eps": 1e-2}
    assert twice.__name__ == "ZerothOrderTrainer"


def test_dropout_and_batch_statistics_are_off_in_a_step_and_the_flag_is_kept(tmp_path):
    trainer = make("image_classification", tmp_path)
    statistics = {key: tensor.clone() for key, tensor in trainer.model.named_buffers()}
    modes = []
    step = trainer.training_step
    trainer.model.classifier.register_forward_pre_hook(lambda *_: modes.append(trainer.model.training))

    def look(model, *args, **kwargs):
        loss = step(model, *args, **kwargs)
        modes.append(("after", model.training, any(m.training for m in model.modules() if m is not model)))
        return loss

    trainer.training_step = look
    trainer.train()
    assert ("after", True, False) in modes
    assert False in modes
    assert True not in modes
    for key, tensor in trainer.model.named_buffers():
        assert torch.equal(tensor, statistics[key]), key


def test_the_cache_is_emptied_after_every_so_many_steps(tmp_path, monkeypatch):
    emptied = []
    monkeypatch.setattr(empty_cache, "clear_device_cache", lambda: emptied.append(trainer.state.global_step))
    trainer = make("text_classification", tmp_path, torch_empty_cache_steps=4)
    trainer.train()
    assert emptied == [4]


def test_label_smoothing_is_honoured_by_a_plain_trainer(tmp_path):
    smoothed = make("text_classification", tmp_path / "a", label_smoothing_factor=0.5, max_steps=1)
    plain = make("text_classification", tmp_path / "b", max_steps=1)
    smoothed.train()
    plain.train()
    assert abs(smoothed.run_log.rows[0]["loss"] - plain.run_log.rows[0]["loss"]) > 1e-4


def test_a_config_without_rate_or_evaluation_data_works(tmp_path):
    _, kwargs = CASES["image_classification"](tmp_path)
    kwargs["args"] = ZOConfig(output_dir=str(tmp_path / "run"), max_steps=2, report_to="none", use_cpu=True)
    trainer = zeroth_order(Trainer)(**kwargs)
    trainer.train()
    assert trainer.args.learning_rate == 1e-5
    assert trainer.args.eval_strategy == "no"
    assert kwargs["args"].learning_rate is None


def test_a_rate_meant_for_gradients_is_reported(tmp_path, caplog):
    _, kwargs = CASES["text_classification"](tmp_path)
    kwargs["args"] = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True)
    with caplog.at_level("WARNING"):
        trainer = zeroth_order(Trainer)(**kwargs)
    assert "learning_rate is 5e-05, the default of TrainingArguments, which is meant for gradients" in caplog.text
    assert trainer.args.learning_rate == 5e-5
    assert zeroth_order(Trainer, learning_rate=1e-4)(**kwargs).args.learning_rate == 1e-4


def test_auto_measures_the_walk_of_any_trainer(tmp_path, caplog):
    """The batches are those that the run begins with, and measuring changes neither their order nor the weights."""
    auto = {"method": "auto", "num_perturbations": 2}
    options = {"learning_rate": 5e-5, "max_steps": 36, "per_device_train_batch_size": 2}  # the rate is the default
    trainer = make("text_classification", tmp_path, auto, **options)
    batches, steps = [], []
    loss, step = trainer._loss, trainer.training_step
    trainer._loss = lambda batch: batches.append({k: v.clone() for k, v in batch.items()}) or loss(batch)
    trainer.training_step = lambda model, inputs, *a: steps.append(inputs) or step(model, inputs, *a)
    before = weights(trainer)
    with caplog.at_level("INFO"):
        trainer.create_optimizer()
        assert len(batches) == trainer.measuring_forwards
        assert len(batches) == 12  # four batches
        assert all(torch.equal(tensor, before[key]) for key, tensor in weights(trainer).items())
        measured = list(batches)
        trainer.train()
    rate = trainer.settings["learning_rate"]
    assert re.search(
        rf"learning_rate {rate:.3g}( instead of [\d.e-]+)?: a random walk of 0.0135 raises the loss", caplog.text
    )
    for number, batch in enumerate(steps[: len(measured) // 3]):
        assert all(torch.equal(batch[key], tensor) for key, tensor in measured[3 * number].items())
    caplog.clear()
    make("text_classification", tmp_path / "given", {"method": "auto", "learning_rate": 1e-3}).train()
    assert "random walk" not in caplog.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"learning_rate": 5e-5, "max_steps": 4}, "not measured: the run has 12 forwards"),
        ({"learning_rate": 1e-3, "max_steps": 4}, "learning_rate 0.001: as given, in place of one that auto would"),
    ],
)
def test_the_choice_of_auto_is_logged_once_without_any_logging_set_up(options, reason, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="zokernel"):
        make("text_classification", tmp_path, {"method": "auto", "num_perturbations": 2}, **options).create_optimizer()
    messages = [record.getMessage() for record in caplog.records if "Method auto" in record.getMessage()]
    assert len(messages) == 1
    assert messages[0].startswith("Method auto chose forward_difference. learning_rate 0.")
    assert reason in messages[0]


@pytest.mark.parametrize(
    ("name", "default"),
    [("text_classification", 5e-5), pytest.param("supervised_finetuning", 2e-5, marks=SKIP_TRL)],
)
def test_auto_lowers_the_rate_of_any_trainer_whose_loss_rises(name, default, tmp_path):
    """A loss that is steep around its start leaves a tenth of the walk."""
    auto = {"method": "auto", "num_perturbations": 2}
    trainer = make(name, tmp_path, auto, max_steps=36, per_device_train_batch_size=1, learning_rate=default)
    rate, loss = trainer.settings["learning_rate"], trainer._loss
    calls = iter(range(10**6))
    trainer._loss = lambda batch: loss(batch) + float(next(calls) % 3 > 0)  # 1 at both ends of every walk
    trainer.create_optimizer()
    assert trainer.settings["learning_rate"] == pytest.approx(0.1 * rate, rel=5e-3)


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_that_fits_is_tried_without_a_trace(name, tmp_path):
    """Columns that the model does not take, such as the text itself, went to the collator."""
    told, tried = (make(name, tmp_path / str(n), max_steps=2, auto_find_batch_size=n > 0) for n in range(2))
    for trainer in (told, tried):
        trainer.train()
    assert tried.args.per_device_train_batch_size == 3
    assert tried.args.gradient_accumulation_steps == told.args.gradient_accumulation_steps
    ends = [weights(trainer) for trainer in (told, tried)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("base", [ZOTrainer, zeroth_order(Trainer)])
def test_rows_without_a_length_are_drawn_at_random(base, tmp_path):
    """Images and a loss of one's own, with ``ZOConfig``, whose default groups rows by their tokens."""

    class Own(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            output = model(**inputs)
            return (output.loss, output) if return_outputs else output.loss

    def build_trainer(**settings):
        _, kwargs = CASES["image_classification"](tmp_path)
        args = ZOConfig(output_dir=str(tmp_path / "run"), max_steps=3, use_cpu=True, report_to="none", **settings)
        return Own(**(kwargs | {"args": args, "eval_dataset": kwargs["train_dataset"]}))

    trainer = build_trainer()
    trainer.train()
    assert trainer.settings["train_sampling_strategy"] == "random"
    assert len(trainer.run_log.rows) == 3
    with pytest.raises(UsageError, match="group_by_length needs rows with 'input_ids', or with the column"):
        build_trainer(train_sampling_strategy="group_by_length")


def test_positional_arguments_are_those_of_the_trainer(tmp_path):
    _, kwargs = CASES["token_classification"](tmp_path)
    kwargs["eval_dataset"] = kwargs["eval_dataset"].select(range(2))
    parts = [kwargs[name] for name in ("model", "args", "data_collator", "train_dataset", "eval_dataset")]
    trainer = zeroth_order(Trainer)(*parts, kwargs["processing_class"])
    trainer.train()
    assert trainer.state.global_step == kwargs["args"].max_steps
    assert (trainer.train_dataset, trainer.eval_dataset) == (parts[3], parts[4])
    assert (trainer.model, trainer.processing_class) == (parts[0], kwargs["processing_class"])
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 2


def test_one_plain_class_is_trained_by_gradients_with_the_same_words(tmp_path):
    trainer = make("text_classification", tmp_path, {"method": "adamw"}, save_strategy="no")
    before = weights(trainer)
    trainer.train()
    assert not trainer.zeroth_order
    assert any(not torch.equal(before[key], value) for key, value in weights(trainer).items())
    assert arguments(tmp_path).max_steps == 6


def test_a_process_computes_on_one_gpu(tmp_path, caplog):
    """With two, transformers would run replicas in threads, which no perturbation reaches."""
    _, kwargs = CASES["text_classification"](tmp_path)
    kwargs["args"]._n_gpu = 2
    with caplog.at_level("WARNING"):
        trainer = zeroth_order(Trainer, method="mezo")(**kwargs)
    assert (trainer.args.n_gpu, kwargs["args"].n_gpu) == (1, 2)
    assert trainer.args.train_batch_size == trainer.args.per_device_train_batch_size
    assert "one of 2 GPUs: start one process per GPU with torchrun" in caplog.text
    trainer.train()
    assert trainer.model_wrapped is trainer.model


def test_a_stream_of_rows_has_no_lengths(tmp_path):
    _, kwargs = CASES["image_classification"](tmp_path)
    rows = kwargs["train_dataset"]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows[n] for n in range(len(rows)))

    kwargs |= {"args": ZOConfig(output_dir=str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to="none")}
    trainer = zeroth_order(Trainer)(**(kwargs | {"train_dataset": Stream()}))
    trainer.train()
    assert len(trainer.run_log.rows) == 2
