"""A run that does not learn says why, in words and with numbers; a run that learns says nothing."""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import replace

import peft
import pytest
import torch
from trainer_cases import CASES
from trainers import load_parts, make_trainer
from transformers import Trainer

from zokernel.cli import main
from zokernel.finetune import EncodedDataset, zeroth_order
from zokernel.finetune.monitor.course import Course, change_of, summarise_evaluations
from zokernel.finetune.monitor.diagnosis import diagnose
from zokernel.finetune.monitor.findings import Options, Surroundings
from zokernel.finetune.monitor.verdict import LEARNED, NOT_LEARNED, ONLY_TRAINING, TOO_SHORT, judge_run
from zokernel.finetune.storage.run_folder import METRICS_FILE

LOGGER = "zokernel.finetune.trainer.zeroth_order_trainer"
EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 20,
    "load_best_model_at_end": True,
    "save_strategy": "journal",
    "max_steps": 40,
}
LEARNING = {"num_perturbations": 4, "eps": 1e-2, "learning_rate": 3e-3, "max_steps": 60}


@pytest.fixture
def run(tiny_lm_path, tiny_reviews_path, tmp_path, caplog):
    """A function that trains the tiny model, changed by the test, and returns its diagnosis and the words logged."""

    def train(*, change=None, **settings):
        parts = load_parts(tiny_lm_path, tiny_reviews_path)
        if change is not None:
            change(parts)
        caplog.clear()
        trainer = make_trainer(parts, tmp_path / str(len(list(tmp_path.iterdir()))), **(EVALUATED | settings))
        with caplog.at_level(logging.WARNING, logger=LOGGER):
            trainer.train()
        return trainer, "\n".join(record.message for record in caplog.records if record.name == LOGGER)

    return train


def changed(**how):
    """Return a function that changes every example of the training and validation sets."""

    def change(parts):
        for name, dataset in parts[2].items():
            examples = [replace(e, **{k: f(n, e) for k, f in how.items()}) for n, e in enumerate(dataset.examples)]
            parts[2][name] = EncodedDataset(examples)

    return change


@pytest.mark.parametrize(
    "settings",
    [
        LEARNING,
        LEARNING | {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False},
        {"method": "auto", "learning_rate": None, "max_steps": 100},
        {"method": "adamw", "learning_rate": 3e-3, "save_strategy": "best"},
        {"method": "zo_adam", "learning_rate": 3e-3, "num_perturbations": 4, "eps": 1e-2, "max_steps": 60},
        {"method": "fzoo", "learning_rate": 5e-3, "max_steps": 80},
    ],
    ids=["mezo", "mezo, not evaluated", "auto", "adamw", "zo_adam", "fzoo"],
)
def test_a_run_that_learns_is_silent(run, settings):
    trainer, warning = run(**settings)
    assert trainer.diagnosis.verdict == LEARNED
    assert (warning, trainer.diagnosis.reasons, trainer.diagnosis.forwards) == ("", (), 0)


@pytest.mark.parametrize("method", ["mezo", "auto", "zo_adam", "adamw"])
def test_a_rate_that_is_too_small_is_named(run, method):
    trainer, warning = run(method=method, learning_rate=1e-8, save_strategy="best")
    assert trainer.diagnosis.verdict == NOT_LEARNED
    assert trainer.diagnosis.reasons[0].startswith("The learning_rate is too small")
    assert "The loss did not fall" in warning
    assert trainer.diagnosis.reasons[0] in warning
    assert trainer.diagnosis.forwards == (0 if method == "adamw" else 17) + 2


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0.03}, {"learning_rate": 0.01}, {"method": "zo_adam", "learning_rate": 0.5}],
    ids=["far", "near", "adam"],
)
def test_a_rate_that_is_too_large_is_named(run, settings):
    trainer, warning = run(**settings)
    assert "The learning_rate is too large: the loss rose" in warning
    assert trainer.diagnosis.reasons[0].startswith("The learning_rate is too large")


def test_losses_that_are_all_equal_are_named(run):
    _, warning = run(eps=1e-30)
    assert "In 100 % of the steps all losses were equal, so eps is below the rounding of the loss" in warning
    assert "learning_rate" not in warning, "slopes that are none say nothing about the rate"


@pytest.mark.parametrize(
    "settings", [{"eps": 1e-9, "learning_rate": 1e-8}, {"eps": 1e-6, "precision": "bf16", "learning_rate": 1e-6}]
)
def test_an_eps_within_rounding_is_named(run, settings):
    trainer, warning = run(**settings)
    assert "the rounding of the loss" in trainer.diagnosis.reasons[0]
    assert "learning_rate" not in warning


def test_an_eps_that_leaves_the_neighbourhood_is_named(run):
    trainer, _ = run(eps=1.0, learning_rate=1e-6)
    assert trainer.diagnosis.reasons[0].startswith("eps 1 is too large: the perturbed weights have a loss of ")


def test_unpredictable_labels_leave_slopes_below_their_noise(run):
    generator = random.Random(1)
    shuffled = changed(label=lambda n, e: generator.randrange(2))
    trainer, warning = run(
        change=shuffled,
        learning_rate=2e-4,
        num_perturbations=4,
        per_device_train_batch_size=2,
        max_steps=200,
        eval_steps=200,
    )
    assert trainer.diagnosis.reasons[0].startswith("The slopes are below their noise")
    assert "of their mean square is common to the batches" in warning


def test_training_rows_of_one_class_are_named(run):
    def one_class(parts):
        validation = parts[2]["validation"]
        changed(label=lambda n, e: 1)(parts)
        parts[2]["validation"] = validation

    trainer, warning = run(change=one_class, **LEARNING)
    assert trainer.diagnosis.verdict in (ONLY_TRAINING, NOT_LEARNED)
    assert "64 of 64 training examples have the same label" in warning


def test_prompts_that_are_all_the_same_are_named(run):
    trainer, _ = run(change=changed(prompt_ids=lambda n, e: [3, 4, 5], suffix_ids=lambda n, e: ()), learning_rate=1e-4)
    assert trainer.diagnosis.reasons[0].startswith("All 64 training prompts are the same")


def nearly_constant(parts):
    """Shrink the weights of the layers, so that the model answers nearly the same whatever it reads."""
    with torch.no_grad():
        for name, parameter in parts[0].named_parameters():
            if "embed" not in name and parameter.ndim > 1:
                parameter.mul_(0.01)
        parts[0].get_input_embeddings().weight.mul_(0.02)


def test_a_model_that_does_not_use_the_prompt_is_named(run):
    _trainer, warning = run(change=nearly_constant, learning_rate=1e-8, save_strategy="best")
    assert "The model hardly uses the prompt: its scores differ by only" in warning


def test_label_words_that_begin_alike_are_named_and_can_learn(run):
    alike = changed(option_ids=lambda n, e: [[7, *e.option_ids[0]], [7, *e.option_ids[1]]])
    trainer, warning = run(change=alike, learning_rate=1e-8)
    assert "All label words begin with the same token" in warning
    trainer, warning = run(change=alike, **LEARNING | {"max_steps": 100})
    assert (trainer.diagnosis.verdict, warning) == (LEARNED, "")


def options(**changes):
    counts = {"labels": [30, 30], "num_prompts": 60, "num_scored": 60, "num_right": 40, "answers": (30, 30)}
    return Options(**{"words": [(1,), (2,)], "spread": 1.0} | counts | changes)


STUCK = change_of(Course([0.7, 0.71, 0.69] * 20, [1.0] * 60, [1e-6] * 60))


def test_reasons_are_two_at_most_and_the_certain_come_first():
    facts = options(words=[(1,), (1, 2)], labels=[0, 60], num_prompts=1, spread=0.0, answers=(0, 60))
    diagnosis = diagnose(STUCK, None, options=facts)
    assert [reason.split()[0] for reason in diagnosis.reasons] == ["60", "All"]
    assert diagnose(STUCK, None, options=options()).reasons[0].startswith("The learning_rate is too small")


def test_label_words_of_several_lengths_are_named_if_the_longest_always_wins():
    long = options(words=[(1,), (2, 3, 4)], answers=(1, 59))
    assert any(
        "have 1 to 3 tokens, and 59 of 60 answers" in reason for reason in diagnose(STUCK, None, options=long).reasons
    )
    facts = options(words=[(1,), (2, 3, 4)], answers=(25, 35))
    assert not any("tokens" in reason for reason in diagnose(STUCK, None, options=facts).reasons)


def test_too_few_steps_and_losses_that_vary_too_much_are_inconclusive():
    assert judge_run(change_of(Course([0.7] * 19)), None)[0] == TOO_SHORT
    noisy = Course([0.2, 1.4] * 20)
    assert judge_run(change_of(noisy), None)[0] == TOO_SHORT
    at_start = summarise_evaluations([{"step": 0, "loss": 0.7}, {"step": 40, "loss": 0.7}], 100)
    assert judge_run(change_of(noisy), at_start)[0] == NOT_LEARNED
    assert judge_run(change_of(noisy), replace(at_start, from_start=False))[0] == TOO_SHORT


def test_a_better_score_counts_only_above_its_noise():
    rows = [{"step": 0, "loss": 0.7, "accuracy": 0.5}, {"step": 9, "loss": 0.7, "accuracy": 0.6}]
    # Three errors of 100 examples at one half are 15 points.
    assert not summarise_evaluations(rows, 100).improved
    assert summarise_evaluations(rows, 400).improved
    assert not summarise_evaluations([rows[0], rows[1] | {"loss": 1.5}], 400).improved, "at twice the loss it is luck"


def test_curvature_is_that_of_a_quadratic_and_uncertain_where_losses_are_rounded():
    def losses(radius, h):
        return [(0.5 + radius * g + h / 2 * radius**2, 0.5 - radius * g + h / 2 * radius**2) for g in (1, -2, 3, 1)]

    exact = Surroundings(1e-2, 0.5, losses(1e-2, 10.0), losses(4e-2, 10.0))
    curvature, error = exact.curvature()
    assert curvature == pytest.approx(10.0, rel=1e-6)
    assert error < 1e-3 * curvature
    tiny = Surroundings(1e-6, 0.5, losses(1e-6, 10.0), losses(4e-6, 10.0))
    assert tiny.curvature()[1] > 2 * 10.0, "a second difference of 1e-10 is below fp32's rounding of 0.5"
    assert exact.forwards == 17


def test_the_promised_fall_is_exact_for_plain_descent():
    # A quadratic h w^2 / 2 in one weight: each step gains rate * s^2 and loses rate^2 s^2 h / 2 of it.
    weight, h, rate, course = 1.0, 2.0, 0.05, Course()
    for _ in range(30):
        course.losses.append(h * weight**2 / 2)
        course.slopes.append(h * weight)
        course.rates.append(rate)
        weight -= rate * h * weight
    change = change_of(course)
    assert change.promised_fall - change.curvature_term * h == pytest.approx(-change.change, rel=1e-9)


def test_a_continued_run_is_diagnosed_from_all_of_its_steps(tmp_path):
    """The loss falls for 25 steps and then stays, and the second process takes the last 40."""

    class Falls(zeroth_order(Trainer, method="mezo")):
        def compute_loss(self, *args, **options):
            step = self.state.global_step
            return 0 * super().compute_loss(*args, **options) + max(3 - 0.1 * step, 0.5) + 1e-3 * (step % 3)

    for steps, resume in ((30, False), (70, True)):
        _, kwargs = CASES["text_classification"](tmp_path, max_steps=steps, save_steps=30, lr_scheduler_type="constant")
        trainer = Falls(**kwargs)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.diagnosis.verdict == LEARNED
    assert len(trainer._course.losses) == 70


def test_the_losses_around_the_weights_are_means_over_one_batch(tmp_path):
    """Not of a new batch each time, and not divided by the number of tokens of a step."""
    _, kwargs = CASES["causal_language_modelling"](tmp_path, max_steps=20, save_strategy="no")
    rows = kwargs["train_dataset"]

    class Stream(torch.utils.data.IterableDataset):
        opened = 0

        def __iter__(self):
            self.opened += 1
            draw = random.Random(self.opened)
            while True:
                yield rows[draw.randrange(len(rows))]

    class Flat(zeroth_order(Trainer, method="mezo")):
        def compute_loss(self, model, inputs, *args, **options):
            loss = super().compute_loss(model, inputs, *args, **options)
            if self.is_in_train:
                return 0 * loss + 1
            calls.append((inputs["input_ids"].tolist(), float(loss), float(model(**inputs).loss)))
            return loss

    calls = []
    trainer = Flat(**(kwargs | {"train_dataset": Stream(), "eval_dataset": None}))
    trainer.train()
    assert trainer.diagnosis.forwards == len(calls) == 17
    assert all(ids == calls[0][0] for ids, _, _ in calls)
    assert [loss for _, loss, _ in calls] == pytest.approx([mean for _, _, mean in calls], rel=1e-6)


def test_the_rounding_of_a_frozen_base_counts(tmp_path, monkeypatch):
    """An adapter in float32 on a base in bfloat16: losses are as coarse as the base."""

    class Flat(zeroth_order(Trainer, method="mezo")):
        def compute_loss(self, *args, **options):
            return 0 * super().compute_loss(*args, **options) + 1

    dtypes = []
    monkeypatch.setattr(
        "zokernel.finetune.trainer.zeroth_order_trainer.probe_surroundings", lambda *_, dtype: dtypes.append(dtype)
    )
    for base in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(base)
        _, kwargs = CASES["causal_language_modelling"](folder, max_steps=20, save_strategy="no")
        adapter = peft.LoraConfig(target_modules="all-linear")
        kwargs["model"] = peft.get_peft_model(kwargs["model"].to(base), adapter, autocast_adapter_dtype=True)
        trainer = Flat(**(kwargs | {"eval_dataset": None}))
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        assert dtypes.pop() == base


METHODS = ("mezo", "auto", "fzoo", "kerzoo", "hizoo", "lozo", "zo_adam", "sgd")
KEPT = [(method, "best") for method in METHODS] + [(method, "journal") for method in ("mezo", "zo_adam")]


@pytest.mark.parametrize(("method", "save_strategy"), [*KEPT, ("auto", "steps"), ("sgd", "steps")])
def test_a_run_that_gets_worse_ends_with_its_start(tiny_lm_path, tiny_reviews_path, tmp_path, method, save_strategy):
    parts = load_parts(tiny_lm_path, tiny_reviews_path)
    start = {name: tensor.clone() for name, tensor in parts[0].state_dict().items()}
    # Every evaluation is worse than the one before, whatever the weights.
    settings = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "save_strategy": save_strategy}
    trainer = make_trainer(parts, tmp_path, **(EVALUATED | settings | {"method": method, "learning_rate": 1e-2}))
    evaluate, losses = trainer.evaluation_loop, iter(range(1, 100))

    def worse(*arguments, **options):
        output = evaluate(*arguments, **options)
        output.metrics["eval_loss"] = float(next(losses))
        return output

    trainer.evaluation_loop = worse
    trainer.train()
    assert trainer.final_step == 0
    assert all(torch.equal(tensor, start[name]) for name, tensor in trainer.model.state_dict().items())


def finetune(folder, model, data, *flags):
    words = [w for split in ("train", "validation", "test") for w in (f"--{split}_file", str(data / f"{split}.jsonl"))]
    words += ["--model_name_or_path", str(model), "--label_words", "bad", "good", "--output_dir", str(folder)]
    assert main(["finetune", *words, "--max_steps", "30", "--eval_steps", "15", "--precision", "fp32", *flags]) == 0
    return json.loads((folder / METRICS_FILE).read_text()), (folder / "report.md").read_text()


@pytest.mark.parametrize("seed", ["0", "1", "2"])
@pytest.mark.parametrize("rate", ["0.1", "1"])
def test_a_collapsed_run_did_not_learn_whatever_its_scores(tiny_lm_path, tiny_reviews_path, tmp_path, rate, seed):
    """The last loss is that of guessing, far below those on the way, and one answer for all rows can raise a score."""
    flags = ["--learning_rate", rate, "--load_best_model_at_end", "false", "--seed", seed]
    metrics, report = finetune(tmp_path / "run", tiny_lm_path, tiny_reviews_path, *flags)
    assert metrics["went_wrong"].startswith("Training diverged")
    assert metrics["diagnosis"]["verdict"] == NOT_LEARNED
    assert metrics["diagnosis"]["outcome"] == metrics["went_wrong"]
    assert metrics["diagnosis"]["reasons"][0].startswith("The learning_rate is too large: training diverged")
    assert "## Why the loss did not fall" in report


def test_the_report_says_why_and_that_the_last_weights_are_worse(tiny_lm_path, tiny_reviews_path, tmp_path, caplog):
    flags = ["--learning_rate", "0.02", "--load_best_model_at_end", "false"]
    metrics, report = finetune(tmp_path / "run", tiny_lm_path, tiny_reviews_path, *flags)
    assert metrics["after"]["loss"] > metrics["before"]["loss"]
    assert "## Why the loss did not fall" in report
    assert "1. The learning_rate is too large" in report
    assert "The held-out loss is higher than before training" in report
    assert "The held-out loss is higher" in caplog.text
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "The learning_rate is too large" in next((tmp_path / "run").glob("*.html")).read_text()


def test_the_report_of_a_short_run_says_that_it_is_short(tiny_lm_path, tiny_reviews_path, tmp_path, caplog):
    flags = ["--learning_rate", "1e-7", "--max_steps", "10"]
    metrics, report = finetune(tmp_path / "run", tiny_lm_path, tiny_reviews_path, *flags)
    assert metrics["diagnosis"]["verdict"] == TOO_SHORT
    assert math.isfinite(metrics["after"]["loss"])
    assert "Fewer than 20 steps are too few to tell" in report
    assert "too few to tell" not in caplog.text
