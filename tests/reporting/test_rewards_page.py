"""Report and live page of a run on rewards: the spread of the members' rewards, step by step."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from zokernel.commands.report import read
from zokernel.journal import Journal
from zokernel.reporting.html import render
from zokernel.reporting.rewards import band
from zokernel.reporting.serve import live_data
from zokernel.reporting.training import read_training


@pytest.fixture
def folder(run_folders, tmp_path):
    """A finished run, presented as one on rewards: its losses are negative rewards."""
    folder = tmp_path / "rewarded"
    shutil.copytree(run_folders["finetune"], folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"objective": "reward", "metric": "reward"}
    metrics["before"] = {"loss": -0.25, "reward": 0.25, "reward_error": 0.06, "pass_rate": 0.125, "kl": 0.0}
    metrics["after"] = {"loss": -0.75, "reward": 0.75, "reward_error": 0.05, "pass_rate": 0.5, "kl": 0.0312}
    metrics["evaluations"] = [{k: v for k, v in e.items() if k != "accuracy"} for e in metrics["evaluations"]]
    for evaluation in metrics["evaluations"]:
        evaluation["reward"] = -evaluation["loss"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_bands_are_quantiles_of_the_members():
    losses = [0.3, -1.2, -0.7, math.nan, 2.0, -0.1]
    quantiles = band(losses)
    expected = np.quantile([-0.3, 1.2, 0.7, -2.0, 0.1], [0, 0.25, 0.5, 0.75, 1])
    assert list(quantiles.values()) == pytest.approx(list(expected))
    assert set(band([math.nan]).values()) == {None}


def test_the_report_shows_the_spread_and_says_rewards(folder):
    page = read(folder)
    titles = [picture.title for section in page.sections for picture in section.pictures]
    assert titles[:2] == ["Rewards of the population", "Loss"]
    summary = " ".join(page.summary)
    assert "went from 0.250 to 0.750 (standard errors 0.060 and 0.050)" in summary
    assert "the share that passes from 12.5% to 50.0%" in summary
    assert "0.0312 nats per token from the starting weights" in summary
    assert "%: +" not in summary, "a reward is no share"
    assert ("reward", "0.250 → 0.750") in page.facts
    html = render(page)
    assert "loss (negative reward)" in html
    assert "loss (nats)" not in html


def test_the_live_page_gets_the_spread_while_the_run_goes(folder):
    (folder / "metrics.json").unlink()
    assert live_data(folder)["rewarded"] is False
    run = json.loads((folder / "run.json").read_text())
    run["settings"] = {**run["settings"], "objective": "reward"}
    (folder / "run.json").write_text(json.dumps(run))
    data = live_data(folder, since=10)
    assert data["rewarded"] is True
    assert [row["step"] for row in data["rows"]] == list(range(11, 41))
    losses = {record.step + 1: record.losses for record in Journal.read(folder).steps}
    for row in data["rows"]:
        assert row["rewards"]["median"] == pytest.approx(-np.median(losses[row["step"]]))
        assert row["rewards"]["least"] == pytest.approx(-max(losses[row["step"]]))
    (folder / "journal.zkj").unlink()
    assert "rewards" not in live_data(folder)["rows"][0], "without a journal nobody knows"
    assert read_training(folder).rewards == {}


def test_a_model_that_was_only_judged_has_rewards_that_are_no_shares(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"steps": 0, "forwards": 0, "forwards_per_step": None, "evaluations": [], "after": metrics["before"]}
    for name in ("journal.zkj", "steps.jsonl"):
        (folder / name).unlink()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert "reward 0.250, " in read(folder).summary[0]
