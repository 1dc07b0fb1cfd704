"""zeroth_order(Trainer): the plain trainer's loss, the same bits after a kill, and a model that reloads."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest
import torch
import transformers
from trainer_cases import CASES, arguments
from transformers import Trainer, TrainerCallback, TrainingArguments

from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig, ZOTrainer, zeroth_order
from zokernel.finetune.data.sampling import ReseedingSampler
from zokernel.finetune.trainer import empty_cache
from zokernel.journal import Journal

WITH_TRL = [name for name in CASES if name not in list(CASES)[:8]]
SKIP_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
EVERY = [pytest.param(name, marks=SKIP_TRL if name in WITH_TRL else ()) for name in CASES]


def make(name, folder, settings=None, **arguments):
    trainer, kwargs = CASES[name](folder, **arguments)
    return zeroth_order(trainer, **(settings or {}))(**kwargs)


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


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
        found = None

        def check_loss(self):
            super().check_loss()
            with torch.no_grad():
                self.found = self._step_loss().item()

    _, kwargs = CASES[name](tmp_path / "zo", max_steps=1)
    recording = Recording(**kwargs)
    recording.train()
    assert recording.found == pytest.approx(sum(plain.losses), abs=1e-6)


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
        again = type(model).from_pretrained(tmp_path / "saved").state_dict()
        assert all(torch.equal(again[key], value) for key, value in after.items())


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
        expected, found = ([row[name] for row in t.state.log_history if "loss" in row] for t in (plain, trainer))
        # Averages over perturbed points, whose radius is 1e-3.
        assert found == pytest.approx(expected, rel=0 if name == "num_tokens" else 2e-3), name
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["forwards"] for row in rows] == [4, 8]
    assert all("grad_norm" not in row and "projected_gradient" in row for row in rows)


def test_memory_that_only_a_backward_pass_needs_is_not_saved(tmp_path, caplog):
    pytest.importorskip("trl")
    with caplog.at_level("INFO"):
        make("supervised_finetuning", tmp_path, activation_offloading=True, gradient_checkpointing=True).train()
    for name in ("activation_offloading", "gradient_checkpointing"):
        assert f"{name} is off: without a backward pass, no activation is kept." in caplog.messages


@pytest.mark.parametrize("wrong", ["Trainer", None, dict, 3])
def test_what_is_no_trainer_class_is_refused(wrong):
    with pytest.raises(UsageError, match="takes a class"):
        zeroth_order(wrong)


def test_wrapping_twice_keeps_the_settings():
    twice = zeroth_order(zeroth_order(Trainer, method="kerzoo"), eps=1e-2)
    assert twice.zo_settings == {"method": "kerzoo", "eps": 1e-2}
    assert twice.__name__ == "ZerothOrderTrainer"


def test_dropout_and_batch_statistics_are_off_in_a_step_and_the_flag_is_kept(tmp_path):
    trainer = make("image_classification", tmp_path)
    statistics = {key: tensor.clone() for key, tensor in trainer.model.named_buffers()}
    seen = []
    step = trainer.training_step
    trainer.model.classifier.register_forward_pre_hook(lambda *_: seen.append(trainer.model.training))

    def look(model, *args, **kwargs):
        loss = step(model, *args, **kwargs)
        seen.append(("after", model.training, any(m.training for m in model.modules() if m is not model)))
        return loss

    trainer.training_step = look
    trainer.train()
    assert ("after", True, False) in seen
    assert False in seen
    assert True not in seen
    for key, tensor in trainer.model.named_buffers():
        assert torch.equal(tensor, statistics[key]), key


def test_a_loss_that_draws_is_refused(tmp_path):
    class Noisy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs) + torch.rand(())

    _, kwargs = CASES["text_classification"](tmp_path)
    with pytest.raises(UsageError, match=r"gave the losses .* at the same weights"):
        zeroth_order(Noisy)(**kwargs).train()


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (None, r"Own.compute_loss returned None: it must return the batch's loss"),
        (0.5, r"compute_loss returned a float"),
        (torch.zeros(3), r"compute_loss returned a tensor of shape \(3,\)"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss, match, tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return loss

    _, kwargs = CASES["text_classification"](tmp_path)
    with pytest.raises(UsageError, match=match):
        zeroth_order(Own)(**kwargs).train()


def test_trainers_that_sample_are_refused():
    trl = pytest.importorskip("trl")
    for trainer in (trl.GRPOTrainer, trl.RLOOTrainer, trl.DistillationTrainer):
        with pytest.raises(UsageError, match=f"{trainer.__name__} samples new completions"):
            zeroth_order(trainer)
    for module, name in (("iw_opd", "IWOPDTrainer"), ("sdft", "SDFTTrainer"), ("sdpo", "SDPOTrainer"),
                         ("a2po", "A2POTrainer"), ("async_grpo", "AsyncGRPOTrainer")):  # fmt: skip
        trainer = getattr(importlib.import_module(f"trl.experimental.{module}"), name)
        with pytest.raises(UsageError, match=f"{name} samples new completions"):
            zeroth_order(trainer)


def test_trainers_with_a_loop_of_their_own_are_refused(tmp_path):
    class OwnOptimizer(Trainer):
        def create_optimizer(self, *args):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    class OwnStep(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return torch.zeros(())

    _, kwargs = CASES["text_classification"](tmp_path / "a")
    with pytest.raises(UsageError, match="OwnOptimizer makes an optimizer of its own"):
        zeroth_order(OwnOptimizer)(**kwargs).train()
    _, kwargs = CASES["text_classification"](tmp_path / "b")
    with pytest.raises(UsageError, match=r"OwnStep\.training_step took no zeroth-order step"):
        zeroth_order(OwnStep)(**kwargs).train()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"methods": "mezo"}, r"no setting 'methods' \(did you mean method\?\)"),
        ({"method": "mezzo"}, "There is no method 'mezzo': choose one of auto, adamw, (?!.*grzo).*mezo"),
        ({"perturb": "sideways"}, "perturb must be one of"),
        ({"save_strategy": "sometimes"}, "save_strategy must be one of no, .*, journal, not 'sometimes'"),
        ({"zo_point_ranks": 2, "zo_parallel": "data"}, "zo_point_ranks is for zo_parallel hybrid"),
        ({"method": "adamw", "perturb": "in_place"}, "perturb says how the losses .* adamw takes gradients"),
        ({"method": "sgd", "zo_parallel": "perturbation"}, "zo_parallel says how .* sgd takes gradients"),
        ({"method_args": "kernel_order=3"}, r'write \["kernel_order=3"\]'),
        *(({"learning_rate": rate}, "learning_rate must be a finite") for rate in (-1.0, float("nan"), "1e-3")),
    ],
)
def test_wrong_settings_are_refused_when_the_class_is_made(settings, match):
    with pytest.raises(UsageError, match=match):
        zeroth_order(Trainer, **settings)


def test_arguments_that_a_step_cannot_honour_are_refused(tmp_path):
    _, kwargs = CASES["text_classification"](tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(UsageError, match=r"neftune_noise_alpha=5\.0 cannot be honoured"):
        zeroth_order(Trainer)(**kwargs)
    _, kwargs = CASES["text_classification"](tmp_path)
    with pytest.raises(UsageError, match="stacked"):
        zeroth_order(Trainer, perturb="stacked")(**kwargs).train()
    optimizer = torch.optim.SGD(kwargs["model"].parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"zeroth_order\(Trainer, method='kerzoo'\)"):
        zeroth_order(Trainer)(**kwargs, optimizers=(optimizer, None))


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


def test_a_rate_meant_for_gradients_is_said(tmp_path, caplog):
    _, kwargs = CASES["text_classification"](tmp_path)
    kwargs["args"] = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True)
    with caplog.at_level("WARNING"):
        trainer = zeroth_order(Trainer)(**kwargs)
    assert "learning_rate is 5e-05, the default of TrainingArguments, which is meant for gradients" in caplog.text
    assert trainer.args.learning_rate == 5e-5
    assert zeroth_order(Trainer, learning_rate=1e-4)(**kwargs).args.learning_rate == 1e-4


def test_a_run_that_gets_worse_ends_with_the_weights_it_began_with(tmp_path, caplog):
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = make("text_classification", tmp_path, learning_rate=0.1, **best)
    before, loss = weights(trainer), trainer.evaluate()["eval_loss"]
    with caplog.at_level("WARNING"):
        trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[0] == pytest.approx(loss, abs=1e-6)
    assert min(losses[1:]) > loss
    assert trainer.final_step == 0
    assert "No evaluation was better than that before training" in caplog.text
    for key, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[key]), key


def test_auto_measures_the_walk_of_any_trainer(tmp_path, caplog):
    """The batches are those that the run begins with, and measuring changes neither their order nor the weights."""
    auto = {"method": "auto", "num_perturbations": 2}
    few = {"learning_rate": 5e-5, "max_steps": 36, "per_device_train_batch_size": 2}  # the rate is the default
    trainer = make("text_classification", tmp_path, auto, **few)
    taken, steps = [], []
    loss, step = trainer._loss, trainer.training_step
    trainer._loss = lambda batch: taken.append({k: v.clone() for k, v in batch.items()}) or loss(batch)
    trainer.training_step = lambda model, inputs, *a: steps.append(inputs) or step(model, inputs, *a)
    before = weights(trainer)
    with caplog.at_level("INFO"):
        trainer.create_optimizer()
        assert len(taken) == trainer.measuring_forwards
        assert len(taken) == 12  # four batches
        assert all(torch.equal(tensor, before[key]) for key, tensor in weights(trainer).items())
        measured = list(taken)
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


@pytest.mark.parametrize("base", [ZOTrainer, zeroth_order(Trainer)])
def test_rows_without_a_length_are_drawn_at_random(base, tmp_path):
    """Images and a loss of one's own, with ``ZOConfig``, whose default groups rows by their tokens."""

    class Own(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            output = model(**inputs)
            return (output.loss, output) if return_outputs else output.loss

    def made(**settings):
        _, kwargs = CASES["image_classification"](tmp_path)
        args = ZOConfig(output_dir=str(tmp_path / "run"), max_steps=3, use_cpu=True, report_to="none", **settings)
        return Own(**(kwargs | {"args": args, "eval_dataset": kwargs["train_dataset"]}))

    trainer = made()
    trainer.train()
    assert trainer.settings["train_sampling_strategy"] == "random"
    assert len(trainer.run_log.rows) == 3
    with pytest.raises(UsageError, match="group_by_length needs rows with 'input_ids', or with the column"):
        made(train_sampling_strategy="group_by_length")


class Cliff(Trainer):
    """The loss is 1 at the start, then high, and far away 0.5 without a slope, as that of a collapsed model is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        w = model.weight.abs().sum()
        loss = torch.where(w < 2, 1 - 0.1 * model.weight.sum(), torch.where(w < 1e4, 1e3 * w, torch.tensor(0.5)))
        return (loss, {"w": w}) if return_outputs else loss


@pytest.mark.parametrize("save", ["best", "steps"])
@pytest.mark.parametrize("stops", [False, True])
def test_a_collapsed_model_is_no_candidate_for_the_best(save, stops, tmp_path, caplog):
    def run(folder, **settings):
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.zero_()
        settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": save, "save_steps": 1} | settings
        args = arguments(
            tmp_path / folder,
            remove_unused_columns=False,
            label_names=["labels"],
            **(settings | {"learning_rate": 1e3}),
        )
        rows = [{"labels": torch.ones(1)}] * 4
        trainer = zeroth_order(Cliff)(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        if stops:
            trainer.add_callback(transformers.EarlyStoppingCallback(3))
        trainer.train()
        return trainer, [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]

    trainer, losses = run("best", load_best_model_at_end=True)
    assert (losses[0], losses[-1]) == (1.0, 0.5)
    assert trainer.diverged.startswith("Training diverged: the loss of its batches rose from 1 to")
    assert (trainer.final_step, trainer.state.best_global_step, trainer.state.best_metric) == (0, 0, 1.0)
    assert trainer.model.weight.item() == 0.0
    assert "The weights are those of step 0, before that." in caplog.text
    if save == "steps" and not stops:
        caplog.clear()
        trainer, _ = run("last")
        assert abs(trainer.model.weight.item()) > 1e4
        assert "The last weights were kept, as asked." in caplog.text


@pytest.mark.parametrize("rate", [0.5, 1e-3])
def test_a_new_head_comes_back_too(rate, tmp_path):
    """Half of the model is in the folder that it was loaded from; its head is in no file."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "load_best_model_at_end": True}
    trainer, kwargs = CASES["text_classification"](tmp_path, learning_rate=rate, **best)
    kwargs["model"].bert.save_pretrained(tmp_path / "body")
    torch.manual_seed(3)
    kwargs["model"] = type(kwargs["model"]).from_pretrained(tmp_path / "body", num_labels=2)
    trainer = zeroth_order(trainer)(**kwargs)
    before = weights(trainer)
    trainer.train()
    same = all(torch.equal(before[key], value) for key, value in weights(trainer).items())
    assert same == (trainer.final_step == 0)
    assert (tmp_path / "run" / "checkpoint-0").exists() == same
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_a_run_that_is_too_short_to_be_evaluated_ends_with_its_last_weights(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 50, "save_steps": 50, "load_best_model_at_end": True}
    trainer = make("text_classification", tmp_path, eval_delay=50, **best)
    before = weights(trainer)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [0]
    assert trainer.final_step == 6
    assert any(not torch.equal(before[key], value) for key, value in weights(trainer).items())


def test_positional_arguments_are_those_of_the_trainer(tmp_path):
    _, kwargs = CASES["token_classification"](tmp_path)
    parts = [kwargs[name] for name in ("model", "args", "data_collator", "train_dataset", "eval_dataset")]
    zeroth_order(Trainer)(*parts, kwargs["processing_class"]).train()


def test_one_plain_class_is_trained_by_gradients_with_the_same_words(tmp_path):
    trainer = make("text_classification", tmp_path, {"method": "adamw"}, save_strategy="no")
    before = weights(trainer)
    trainer.train()
    assert not trainer.zeroth_order
    assert any(not torch.equal(before[key], value) for key, value in weights(trainer).items())
    assert arguments(tmp_path).max_steps == 6
