"""The held-out loss fell or not by paired differences of its examples; ``auto`` stops a run that only gets worse."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from trainers import load_parts, make_trainer

from zokernel.finetune.monitor.course import Course, change_of, summarise_evaluations
from zokernel.finetune.monitor.paired import StartLosses, paired_change
from zokernel.finetune.monitor.verdict import LEARNED, NOT_LEARNED, ONLY_TRAINING, TOO_SHORT, judge_run

EVALUATED = {"eval_strategy": "steps", "load_best_model_at_end": True, "save_strategy": "journal"}
LEARNING = {"num_perturbations": 4, "eps": 1e-2, "learning_rate": 3e-3}


def test_the_error_of_a_paired_difference_is_that_of_a_ratio_of_sums():
    """Examples of unequal numbers of tokens, drawn anew 4,000 times: their change has the reported error."""
    torch.manual_seed(0)
    counts = torch.randint(1, 20, (4000, 50)).double()
    before = counts * (2 + torch.randn(4000, 50))  # the examples differ by far more than they change
    after = before + counts * (-0.1 + 0.3 * torch.randn(4000, 50))
    estimates = [
        paired_change(torch.stack([b, n], 1), torch.stack([a, n], 1))
        for b, a, n in zip(before, after, counts, strict=True)
    ]
    changes, errors = torch.tensor(estimates, dtype=torch.float64).T
    # The mean of 4,000 changes is known within 4 errors, their spread within 4 / sqrt(8000) = 4.5 %.
    assert float(changes.mean()) == pytest.approx(-0.1, abs=4 * float(changes.std()) / 4000**0.5)
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(changes.std()), rel=0.06)
    assert paired_change(before[0, :1, None].expand(1, 2), after[0, :1, None].expand(1, 2))[1] == math.inf


def paired(change, error, *, before=()):
    """Return the evaluations of a run whose held-out loss was 2.0, with the last change given as a share of it."""
    rows = [{"step": 0, "loss": 2.0}]
    rows += [
        {"step": 10 * n, "loss": 2 * (1 + part), "loss_change": 2 * part, "loss_change_error": 2 * error}
        for n, part in enumerate((*before, change), 1)
    ]
    return summarise_evaluations(rows, 64)


FLAT = change_of(Course([2.0, 2.01, 1.99] * 20))  # losses that did not fall, for certain
NOISY = change_of(Course([1.0, 3.0] * 30))
FALLEN = change_of(Course([2.0, 1.99, 2.01] * 10 + [1.5, 1.49, 1.51] * 10))


@pytest.mark.parametrize("course", [FLAT, NOISY], ids=["flat", "noisy"])
def test_a_small_fall_of_the_same_examples_is_a_fall(course):
    """0.3 % is below half a percent, but five errors of the paired differences."""
    assert judge_run(course, paired(-0.003, 0.0006)) == (LEARNED, "")
    unpaired = summarise_evaluations([{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.994}], 64)
    assert judge_run(course, unpaired)[0] == NOT_LEARNED


@pytest.mark.parametrize("course", [FLAT, NOISY], ids=["flat", "noisy"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (0.01, "The loss did not fall: "),
        (0.0, "The loss did not fall: "),
        (-0.0005, "The loss did not fall: "),  # a thousandth at most, which nobody wants
        (-0.0008, "The held-out loss fell by 0.12 % at most: "),
    ],
)
def test_no_fall_of_the_same_examples_is_none(course, change, expected):
    """The error is small, so a fall by 3 % is excluded; the report says how large it may be."""
    verdict, outcome = judge_run(course, paired(change, 0.0002))
    assert verdict == NOT_LEARNED
    assert outcome.startswith(expected)
    assert f"(the same examples, at the end: {2 * change:+.2g} ± 0.0004)" in outcome


def test_differences_that_vary_too_much_are_undecided():
    verdict, outcome = judge_run(NOISY, paired(-0.01, 0.02))
    assert verdict == TOO_SHORT
    assert outcome.endswith(
        "held out 2 at the start and 1.98 at the end (the same examples, at the end: -0.02 ± 0.04)."
    )
    assert judge_run(FLAT, paired(-0.01, 0.02))[0] == NOT_LEARNED, "the training losses tell"
    assert judge_run(NOISY, paired(0.05, 0.02))[0] == NOT_LEARNED, "it rose"
    # A training loss that fell stands unless the held-out examples contradict it.
    assert judge_run(FALLEN, paired(-0.01, 0.02)) == (LEARNED, "")
    assert judge_run(FALLEN, paired(-0.0001, 0.0002))[0] == ONLY_TRAINING
    assert judge_run(FALLEN, paired(0.05, 0.02))[0] == ONLY_TRAINING


def test_the_best_of_several_evaluations_must_be_better_by_more_than_one():
    """2.2 errors are certain for the last evaluation alone; for the best of five, 2.6 are."""
    assert paired(-0.022, 0.01).fell
    assert not paired(0.0, 0.01, before=(0.0, -0.022, 0.0, 0.0)).improved
    assert paired(0.0, 0.01, before=(0.0, -0.028, 0.0, 0.0)).improved


def test_evaluations_are_paired_by_example_also_after_a_kill(tiny_lm_path, tiny_reviews_path, tmp_path):
    parts = load_parts(tiny_lm_path, tiny_reviews_path)
    settings = EVALUATED | LEARNING | {"max_steps": 40, "eval_steps": 20, "per_device_eval_batch_size": 4}
    trainer = make_trainer(parts, tmp_path / "run", **settings)
    results = []
    evaluate = trainer.objective.__class__.terms

    def noted(self, prediction):
        results.append(evaluate(self, prediction))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.objective.__class__, "terms", noted)
        trainer.train()
    start, middle, _end = (terms[:, 0] for terms in results[1::2])  # each is asked for its total, then for its examples
    row = next(row for row in trainer.state.log_history if row["step"] == 20 and "eval_loss" in row)
    difference = middle - start
    assert row["eval_loss_change"] == pytest.approx(float(difference.mean()), rel=1e-9)
    assert row["eval_loss_change_error"] == pytest.approx(float(difference.std()) / len(difference) ** 0.5, rel=1e-9)
    assert "eval_loss_change" not in next(row for row in trainer.state.log_history if "eval_loss" in row)
    start_losses = StartLosses(tmp_path / "run", writes=False)
    assert start_losses.change(torch.stack([middle, torch.ones_like(middle)], 1), continues=False) == {}
    resumed_change = start_losses.change(torch.stack([middle, torch.ones_like(middle)], 1), continues=True)
    assert resumed_change["loss_change"] == row["eval_loss_change"]
    assert start_losses.change(torch.ones(3, 2), continues=True) == {}, "other examples are not compared"


def test_a_loader_that_is_kept_repeats_its_order(tiny_lm_path, tiny_reviews_path, tmp_path):
    """As ``dataloader_persistent_workers`` keeps it: otherwise other examples would be paired."""
    trainer = make_trainer(load_parts(tiny_lm_path, tiny_reviews_path), tmp_path, **EVALUATED)
    loader = trainer.get_eval_dataloader()
    orders = [list(loader.batch_sampler), list(loader.batch_sampler), list(trainer.get_eval_dataloader().batch_sampler)]
    assert orders[0] == orders[1] == orders[2]
    assert sorted(n for batch in orders[0] for n in batch) == list(range(len(trainer.eval_dataset)))


def trained(model, data, folder, **settings):
    trainer = make_trainer(load_parts(model, data), folder, **EVALUATED | settings)
    trainer.train()
    return trainer


def test_auto_stops_a_run_that_only_gets_worse(tiny_lm_path, tiny_reviews_path, tmp_path, caplog):
    # Every evaluation has a loss of thousands then; at a rate of 1 the loss sometimes comes back in a step.
    settings = {"method": "auto", "learning_rate": 100.0, "max_steps": 40, "eval_steps": 4}
    with caplog.at_level(logging.WARNING, logger="zokernel.finetune.monitor.stop"):
        trainer = trained(tiny_lm_path, tiny_reviews_path, tmp_path, **settings, method_args=["polyak_share=inf"])
    assert (trainer.state.global_step, trainer.final_step) == (12, 0)
    assert "Step 12 of 40: the held-out loss was above that before training in the last 3 evaluations" in caplog.text


@pytest.mark.parametrize("settings", [{"method": "forward_difference"}, {"early_stopping_patience": 20}])
def test_nothing_else_is_stopped(tiny_lm_path, tiny_reviews_path, tmp_path, settings):
    settings = {"method": "auto", "learning_rate": 1.0, "max_steps": 16, "eval_steps": 4} | settings
    trainer = trained(tiny_lm_path, tiny_reviews_path, tmp_path, **settings, method_args=["normalize=true"])
    assert trainer.state.global_step == 16
