"""A run that diverges, or whose losses no longer differ, says so once and early."""

from __future__ import annotations

import logging

import pytest
from trainers import make_trainer

from zokernel.finetune.monitor.divergence import WINDOW, describe_divergence, describe_failure, find_trouble

WARNINGS = "zokernel.finetune.monitor.warn"


def rows(losses, slope=1.0):
    return [{"loss": loss, "projected_gradient": slope} for loss in losses]


def test_sound_runs_are_not_warned_about():
    noisy = [0.9, 0.2, 1.5, 0.7, 2.2, 0.1, 0.8] * 5
    assert find_trouble(rows(noisy)) is None
    assert find_trouble([{"loss": loss} for loss in noisy]) is None, "a first-order method logs no slopes"
    assert find_trouble(rows([0.9] * 20 + [400.0] * 4)) is None, "a few bad batches are not a divergence"
    assert find_trouble(rows([-0.5] * 20 + [-0.1] * 10)) is None, "an accuracy to be raised is no loss above zero"
    assert find_trouble(rows([0.9, 90.0] + [900.0] * (WINDOW - 3))) is None, "too early to tell"


def test_a_rise_is_measured_from_the_losses_at_the_start():
    kind, sentence = find_trouble(rows([0.9] * 4 + [900.0] * WINDOW))
    assert kind == "rise"
    assert "risen from 0.9 to 900" in sentence
    assert find_trouble(rows([4.0] * 4 + [8.0] * WINDOW)) is None
    assert "risen from 4 to 12.1" in find_trouble(rows([4.0] * 4 + [12.1] * WINDOW))[1]


def test_batches_of_four_that_begin_with_easy_ones_are_no_divergence():
    """The losses of 40 steps of a 1.5B model on SST-2, whose loss on other examples fell from 0.99 to 0.91."""
    losses = [0.02, 0.25, 0.79, 0.95, 0.77, 1.21, 0.27, 0.60, 1.05, 0.22, 0.83, 0.04, 2.42, 1.76, 0.35, 2.48]
    losses += [0.60, 0.59, 0.47, 0.47, 0.36, 0.03, 1.19, 0.09, 0.02, 0.83, 0.94, 0.46, 0.53, 0.42, 0.64, 1.21]
    losses += [2.19, 0.32, 0.42, 1.59, 0.77, 0.35, 1.17, 1.09]
    for end in range(1, len(losses) + 1):
        assert find_trouble(rows(losses[:end])) is None, end
        assert describe_divergence(rows(losses[:end])) is None, end
    assert describe_failure(rows(losses)) is None
    assert "rose from 0.25 to 7" in describe_failure(rows([*losses, *[7.0] * 10])), (
        "it is one where ten losses are high"
    )


def test_equal_losses_are_reported_whatever_the_loss():
    history = rows([0.9] * 5) + rows([0.693] * WINDOW, slope=0.0)
    kind, sentence = find_trouble(history)
    assert kind == "standstill"
    assert "did not move" in sentence
    assert find_trouble(history[:-1]) is None
    assert find_trouble([*history, *rows([0.693], slope=1e-9)]) is None


@pytest.mark.parametrize(
    ("settings", "warning"), [({"learning_rate": 0.03}, "diverges"), ({"eps": 1e-30}, "raise eps")]
)
def test_a_run_warns_once(parts, tmp_path, caplog, settings, warning):
    trainer = make_trainer(parts, tmp_path, max_steps=40, **settings)
    with caplog.at_level(logging.WARNING, logger=WARNINGS):
        trainer.train()
    messages = [record.message for record in caplog.records if record.name == WARNINGS]
    assert [warning in message for message in messages] == [True]


def test_a_run_that_learns_is_silent(parts, tmp_path, caplog):
    trainer = make_trainer(parts, tmp_path, max_steps=40, num_perturbations=4, eps=1e-2, learning_rate=3e-3)
    with caplog.at_level(logging.WARNING, logger=WARNINGS):
        trainer.train()
    assert [record for record in caplog.records if record.name == WARNINGS] == []
