"""One trainer that trains again: anew, continued after an interrupt, with arguments that were changed."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from interrupted import same
from trainer_cases import make, weights
from trainers import load_parts, make_trainer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from zokernel.errors import UsageError
from zokernel.finetune import replay, zeroth_order
from zokernel.finetune.settings.auto import cooldown_steps
from zokernel.journal import Journal

STEPS = 8


class Interrupted(Exception):
    pass


class InterruptOnce(TrainerCallback):
    done = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6 and not self.done:
            self.done = True
            raise Interrupted


@pytest.fixture
def make_run(tiny_lm_path, tiny_reviews_path, tmp_path):
    """A function that makes a trainer in a folder, on a fresh model."""

    def make_one(name, **settings):
        parts = load_parts(tiny_lm_path, tiny_reviews_path)
        return make_trainer(parts, tmp_path / name, **({"max_steps": STEPS, "save_strategy": "journal"} | settings))

    return make_one


@pytest.mark.parametrize("method", ["mezo", "zo_adam"])
def test_a_second_run_begins_at_its_first_step(method, make_run, tmp_path):
    settings = {"method": method, "lr_scheduler_type": "linear", "overwrite_output_dir": True}
    trainer, other = make_run("twice", **settings), make_run("other", **settings)
    trainer.train()
    middle = weights(trainer)
    trainer.train()
    other.model.load_state_dict(middle)
    other.train()
    assert same(weights(trainer), weights(other))
    assert [row["loss"] for row in trainer.run_log.rows] == [row["loss"] for row in other.run_log.rows]
    assert trainer.bare_optimizer.step_count == STEPS
    replayed = replay(middle, tmp_path / "twice")
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in replayed.items())


def test_a_run_is_not_continued_from_a_checkpoint_of_the_one_it_overwrote(make_run):
    make_run("run", save_strategy="steps", save_steps=4).train()
    settings = {"save_strategy": "steps", "save_steps": 100, "seed": 9, "overwrite_output_dir": True}
    cut, resumed, whole = make_run("run", **settings), make_run("run", **settings), make_run("whole", **settings)
    cut.add_callback(InterruptOnce())
    with pytest.raises(Interrupted):
        cut.train()
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    "settings",
    [{"save_strategy": "steps", "save_steps": 4}, {"save_strategy": "steps", "save_steps": 100}, {}],
    ids=["checkpoint", "before the first checkpoint", "journal"],
)
@pytest.mark.parametrize("method", ["mezo", "zo_adam"])
def test_an_interrupted_run_is_continued_by_the_same_trainer(method, settings, make_run):
    whole = make_run("whole", method=method, **settings)
    whole.train()
    trainer = make_run("cut", method=method, **settings)
    trainer.add_callback(InterruptOnce())
    with pytest.raises(Interrupted):
        trainer.train()
    with pytest.raises(UsageError, match=r"call trainer\.train\(resume_from_checkpoint=True\) to continue it"):
        trainer.train()
    mean = trainer.train(resume_from_checkpoint=True).training_loss
    losses = [row["loss"] for row in trainer.run_log.rows]
    assert same(weights(trainer), weights(whole))
    assert losses == [row["loss"] for row in whole.run_log.rows]
    first = 4 if settings.get("save_steps") == 4 else 0  # of the steps of this call; a journal takes all of them again
    assert mean == pytest.approx(sum(losses[first:]) / len(losses[first:]), rel=1e-6)


@pytest.mark.parametrize("kind", ["ZOTrainer", "zeroth_order(Trainer)"])
def test_a_second_run_is_refused_with_what_makes_it_possible(kind, make_run, tmp_path):
    """As when a cell of a notebook is run again: the first journal is not replaced unless that is asked for."""
    plain = kind == "zeroth_order(Trainer)"
    trainer = make("text_classification", tmp_path) if plain else make_run("run")
    folder = tmp_path / "run"
    trainer.train()
    first = weights(trainer)
    with pytest.raises(UsageError) as caught:
        trainer.train()
    assert str(caught.value) == (
        f"{folder} holds the journal of an earlier run: call trainer.train(resume_from_checkpoint=True) to continue "
        "it, set trainer.args.overwrite_output_dir = True before trainer.train() to replace it by a run from the "
        "model's present weights, or make a trainer with another output_dir to keep both."
    )
    assert same(weights(trainer), first)
    trainer.args.overwrite_output_dir = True
    trainer.train()
    assert not same(weights(trainer), first)
    replayed = replay(first, folder)
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in replayed.items())


@pytest.mark.parametrize("settings", [{}, {"save_strategy": "no"}, {"method": "adamw", "save_strategy": "best"}])
def test_a_run_that_is_not_there_is_not_continued(settings, make_run, tmp_path):
    """``transformers.Trainer`` raises a ValueError, too."""
    if "method" in settings:
        settings = settings | {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    trainer = make_run("run", **settings)
    before = weights(trainer)
    kinds = "no checkpoint" if settings else "neither a checkpoint nor a journal"
    with pytest.raises(UsageError) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert str(caught.value) == (
        f"{tmp_path / 'run'} holds {kinds} to continue from: call trainer.train() without resume_from_checkpoint to "
        "begin a run, or make the trainer with the output_dir of the run to be continued."
    )
    assert same(weights(trainer), before)
    trainer.train()
    assert trainer.state.global_step == STEPS


def test_a_run_that_stopped_before_its_first_step_is_continued_from_there(make_run, monkeypatch):
    """Its journal says that it was begun."""
    cut, resumed, whole = make_run("run"), make_run("run"), make_run("whole")
    monkeypatch.setattr(cut, "begin_step", lambda: (_ for _ in ()).throw(Interrupted()))
    with pytest.raises(Interrupted):
        cut.train()
    assert Journal.read(cut.folder).num_steps == 0
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert same(weights(resumed), weights(whole))


def test_a_model_that_cannot_be_loaded_again_has_to_be_built_anew(tmp_path):
    trainer = make("text_classification", tmp_path, max_steps=STEPS, save_steps=100)
    trainer.add_callback(InterruptOnce())
    with pytest.raises(Interrupted):
        trainer.train()
    with pytest.raises(UsageError, match="make the model anew before resuming in the same process"):
        trainer.train(resume_from_checkpoint=True)
    resumed = make("text_classification", tmp_path, max_steps=STEPS, save_steps=100)
    resumed.train(resume_from_checkpoint=True)
    whole = make("text_classification", tmp_path / "whole", max_steps=STEPS, save_steps=100)
    whole.train()
    assert same(weights(resumed), weights(whole))


def test_changed_arguments_count_everywhere(make_run, tmp_path):
    changed = {"learning_rate": 2e-3, "max_steps": 5, "seed": 7, "per_device_train_batch_size": 4, "eps": 2e-3}
    changed |= {"num_perturbations": 2, "save_strategy": "steps"}
    trainer, other = make_run("changed"), make_run("other", **changed)
    base = weights(trainer)
    for name, value in changed.items():
        setattr(trainer.args, name, value)
    trainer.train()
    other.train()
    assert same(weights(trainer), weights(other))
    headers = [Journal.read(tmp_path / name).header for name in ("changed", "other")]
    assert headers[0] == headers[1]
    assert replay(base, tmp_path / "changed").keys() == headers[0]["parameters"].keys()
    settings = {
        row["name"]: row for row in json.loads((tmp_path / "changed" / "settings.json").read_text())["settings"]
    }
    assert {name: settings[name]["value"] for name in changed} == changed
    assert {settings[name]["source"] for name in changed} == {"user"}
    trainer.args.max_steps = 7
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.state.global_step, trainer.args.learning_rate) == (7, 2e-3)


def test_a_rate_that_falls_at_the_end_does_so_at_the_end_of_each_run(make_run):
    trainer = make_run("run", save_strategy="no", lr_scheduler_type="warmup_stable_decay")
    trainer.train()
    trainer.args.max_steps = 3 * STEPS
    trainer.train()
    assert trainer.settings["lr_scheduler_kwargs"]["num_decay_steps"] == cooldown_steps(3 * STEPS)
    assert trainer._course.rates[STEPS] == 1e-3
    trainer.args.lr_scheduler_type = "cosine"
    trainer.train()
    assert trainer._course.rates[12] == pytest.approx(5e-4, rel=1e-9)


def test_what_a_callback_or_a_search_changes_counts(make_run):
    class Logs(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            args.logging_first_step = True

    trainer = make_run("run", logging_steps=6)
    trainer.add_callback(Logs())
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 6]
    trainer.hp_search_backend = HPSearchBackend.WANDB
    trainer._hp_search_setup({"learning_rate": 0.25, "seed": 11})
    trainer.create_optimizer()
    assert (trainer.settings["learning_rate"], trainer.settings["seed"]) == (0.25, 11)
    assert (trainer.bare_optimizer.param_groups[0]["lr"], trainer.bare_optimizer.seed) == (0.25, 11)


@dataclass
class Trial:
    """What optuna hands to transformers."""

    number: int
    params: dict[str, float]


@pytest.mark.parametrize("strategy", ["journal", "steps"])
def test_each_trial_of_a_search_has_its_own_model_and_folder(strategy, tmp_path, monkeypatch):
    # Asks optuna, which is not installed here, whether a trial is one of its own.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    points = torch.linspace(-1, 1, 12)

    class Regression(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return (model(inputs["x"]) - inputs["y"]).square().mean()

    def model_init(trial):
        width = 4 if trial is None else trial.params["width"]
        return torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    trainer = zeroth_order(Regression, method="mezo", learning_rate=1.0, save_strategy=strategy)(
        model_init=model_init,
        args=TrainingArguments(
            str(tmp_path), max_steps=3, save_steps=3, max_grad_norm=0.0, remove_unused_columns=False, report_to="none"
        ),
        train_dataset=[{"x": x.view(1), "y": x.square().view(1)} for x in points],
    )
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: {"learning_rate": trial.params["learning_rate"]}
    for trial in (Trial(0, {"width": 6, "learning_rate": 1e-3}), Trial(1, {"width": 9, "learning_rate": 2e-3})):
        trainer.train(trial=trial)
        assert trainer.model[0].out_features == trial.params["width"]
        folder = tmp_path / f"run-{trial.number}"
        journal = Journal.read(folder)
        assert journal.header["parameters"]["0.weight"][1] == [trial.params["width"], 1]
        assert journal.steps[0].learning_rates == (trial.params["learning_rate"],)
        assert len((folder / "steps.jsonl").read_text().splitlines()) == 3
        assert (folder / "checkpoint-3").is_dir() == (strategy == "steps")
    assert {path.name for path in tmp_path.iterdir()} == {"run-0", "run-1"}


def test_what_a_trainer_was_made_with_cannot_be_changed(make_run):
    trainer = make_run("run")
    trainer.args.method = "kerzoo"
    with pytest.raises(UsageError, match="The trainer was made with another method: make a new one to change that"):
        trainer.train()
