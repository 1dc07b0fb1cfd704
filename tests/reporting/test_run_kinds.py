"""The page of every kind of training run holds the numbers of the run's files, and says in words what happened."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from kinds import CUT, KINDS

from zokernel.commands.report import read
from zokernel.files import read_json
from zokernel.journal import Journal
from zokernel.readable import readable_bytes, readable_seconds
from zokernel.reporting.html import render
from zokernel.reporting.training import read_lines


def page_of(folder):
    """Return a run's page, its visible text, and its metrics (empty if it has not finished)."""
    page = read(folder)
    text = re.sub(r"<(style|script)\b.*?</\1>", " ", render(page), flags=re.DOTALL)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).replace("&#39;", "'").replace("&gt;", ">")
    path = folder / "metrics.json"
    return page, text, read_json(path) if path.exists() else {}


def section(page, anchor):
    return next((one for one in page.sections if one.anchor == anchor), None)


def pictures(page):
    return [picture.title for one in page.sections for picture in one.pictures]


def table(page, anchor, number=0):
    """Return a table's rows as dictionaries of texts."""
    html_table = section(page, anchor).tables[number]
    return [dict(zip(html_table.columns, (cell.text for cell in row), strict=True)) for row in html_table.rows]


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_shows_steps_and_command_and_leaves_nothing_empty(kind, kinds):
    page, text, metrics = page_of(kinds(kind))
    assert page.command.startswith("zokernel finetune --precision fp32")
    assert all(value not in ("", "nan", "None") for _, value in page.facts), page.facts
    assert all(one.pictures or one.tables or one.items or one.samples for one in page.sections)
    assert "nan" not in text.split()
    for row in table(page, "numbers") if metrics else []:
        assert row["value"], row
    rows = read_lines(kinds(kind) / "steps.jsonl")
    if rows:
        steps = table(page, "steps", -1)
        assert [row["step"] for row in steps] == [str(row["step"]) for row in rows]
        assert [float(row["loss"].replace(",", "")) for row in steps] == pytest.approx(
            [row["loss"] for row in rows], rel=1e-3
        )


def test_labels(kinds):
    page, text, metrics = page_of(kinds("classification"))
    before, after = (100 * metrics[when]["accuracy"] for when in ("before", "after"))
    shared = metrics["test_trained_on"]
    assert 0 < shared < 24
    beginning = f"Accuracy on 24 test examples ({shared} of them also training examples) went from"
    assert f"{beginning} {before:.1f}% to {after:.1f}%: {after - before:+.1f} points" in text
    assert ("accuracy", f"{before:.1f} → {after:.1f}%") in page.facts
    assert ("forward passes", f"{metrics['forwards']:,}") in page.facts
    assert ("training time", readable_seconds(metrics["train_seconds"])) in page.facts
    assert pictures(page) == ["Loss", "Accuracy", "Projected gradient"]
    assert (page.alert, section(page, "samples"), section(page, "offload")) == ("", None, None)


def test_a_first_order_baseline(kinds):
    page, text, _ = page_of(kinds("first_order"))
    assert "by backpropagation (a first-order baseline)" in text
    assert pictures(page) == ["Loss", "Accuracy"]


def test_a_model_that_was_only_judged(kinds):
    page, text, metrics = page_of(kinds("judged"))
    accuracy, loss = (metrics["after"][name] for name in ("accuracy", "loss"))
    assert f"No step was taken. On 24 test examples: accuracy {100 * accuracy:.1f}%" in text
    assert page.facts == [("accuracy", f"{100 * accuracy:.1f}%"), ("loss", f"{loss:.3f}"), ("examples", "24")]
    assert pictures(page) == []


def test_a_chat_run_shows_loss_perplexity_and_samples(kinds):
    page, text, metrics = page_of(kinds("chat"))
    before, after = metrics["before"], metrics["after"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]), rel=1e-4)
    change = 100 * (after["perplexity"] / before["perplexity"] - 1)
    assert (
        f"Perplexity on 6 validation examples went from {before['perplexity']:.4g} to {after['perplexity']:.4g}: "
        f"{change:+.1f} %; the loss from {before['loss']:.4f} to {after['loss']:.4f} nats per token." in text
    )
    assert page.facts[0] == ("perplexity", f"{before['perplexity']:.4g} → {after['perplexity']:.4g}")
    assert pictures(page) == ["Loss", "Perplexity", "Projected gradient"]
    samples = section(page, "samples").samples
    assert len(samples) == len(metrics["samples"]) == 3
    for texts, sample in zip(samples, metrics["samples"], strict=True):
        assert [name for name, _ in texts] == ["Prompt", "Before training", "After training", "In the data"]
        assert [text for _, text in texts] == [
            sample[key] or "(nothing)" for key in ("prompt", "before", "after", "answer")
        ]
    assert "test, before and after" not in text, "these are the validation examples"


def test_samples_are_shown_as_text_and_cut(kinds, tmp_path):
    metrics = read_json(kinds("chat") / "metrics.json")
    metrics["samples"] = [{"prompt": "<b>&", "answer": "", "before": "x" * 5000, "after": "two\nlines"}]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = read(tmp_path)
    assert section(page, "samples").samples == [
        [("Prompt", "<b>&"), ("Before training", "x" * 600 + " ..."), ("After training", "two\nlines")]
    ]
    assert "<pre>&lt;b&gt;&amp;</pre>" in render(page)


def test_a_reward_run_shows_every_generation_and_samples(kinds):
    page, text, metrics = page_of(kinds("reward"))
    before, after = metrics["before"], metrics["after"]
    assert f"went from {before['reward']:.3f} to {after['reward']:.3f} (standard errors" in text
    assert page.facts[0] == ("reward", f"{before['reward']:.3f} → {after['reward']:.3f}")
    assert pictures(page)[:2] == ["Rewards of the population", "Loss"]
    losses = {record.step + 1: record.losses for record in Journal.read(kinds("reward")).steps}
    steps = table(page, "steps", -1)
    assert len(steps) == len(losses) == 12
    for row in steps:
        members = -np.array(losses[int(row["step"])])
        expected = [members.min(), np.median(members), members.max()]
        actual = [float(row[name]) for name in ("least reward", "median reward", "most reward")]
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert len(section(page, "samples").samples) == 3
    assert "In the data" not in text, "prompts on rewards have no answer"


def test_an_offloaded_run_shows_bytes_time_per_pass_and_memory(kinds):
    page, _, metrics = page_of(kinds("offload"))
    measured = metrics["offload"]
    # Six steps and two evaluations; the loss of a step takes one pass, and each step writes all weights.
    assert measured["passes"] == 8
    assert measured["bytes_written"] >= 6 * measured["weights_bytes"] == 6 * 4 * metrics["num_parameters"]
    assert measured["bytes_read"] > 0
    assert measured["seconds_per_pass"] == pytest.approx(measured["seconds"] / 8, rel=0.01)
    assert measured["anonymous_peak"] >= measured["anonymous_before"] > 2**20
    facts = {row["quantity"]: row["value"] for row in table(page, "offload")}
    assert facts["passes over them"] == "8"
    for name in ("bytes_read", "bytes_written"):
        assert facts[name.replace("_", " ")] == (
            f"{readable_bytes(measured[name])} ({readable_bytes(measured[name] / 8)} per pass)"
        )
    assert facts["time per pass"] == readable_seconds(measured["seconds_per_pass"])
    assert facts["peak anonymous memory"].startswith(readable_bytes(measured["anonymous_peak"]))
    assert ("written", readable_bytes(measured["bytes_written"])) in page.facts


def test_memory_that_the_system_does_not_report_is_not_made_up(kinds, tmp_path):
    metrics = read_json(kinds("offload") / "metrics.json")
    metrics["offload"] |= {"anonymous_peak": None, "anonymous_before": None, "passes": 0, "seconds_per_pass": None}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    facts = {row["quantity"]: row["value"] for row in table(read(tmp_path), "offload")}
    assert facts["peak anonymous memory"] == "not told by this system"
    assert facts["time per pass"] == "not measured"


def test_a_run_that_was_continued_says_where(kinds):
    page, text, metrics = page_of(kinds("resumed"))
    assert read_json(kinds("resumed") / "run.json")["continued_at"] == [CUT]
    assert metrics["steps"] == 12
    assert f"The run was cut off after step {CUT} and continued from there" in text
    assert ("continued after step", str(CUT)) in page.facts


def test_a_run_that_was_cut_off_says_how_far_it_came(kinds):
    page, _, _ = page_of(kinds("cut"))
    assert page.title == f"Training with mezo, step {CUT} of 12"
    assert page.alert == f"The run stopped after step {CUT} of 12, before its end. The same command continues it."
    assert page.facts[:2] == [("steps done", f"{CUT} of 12"), ("time left", "none: the run stopped")]


def test_a_run_that_diverged_says_so_first_and_why(kinds):
    page, text, metrics = page_of(kinds("diverged"))
    assert page.alert.startswith(metrics["went_wrong"])
    assert "so the weights are the untrained ones" in page.alert
    assert page.facts[0] == ("outcome", "diverged")
    reasons = section(page, "reasons")
    assert reasons.items == metrics["diagnosis"]["reasons"]
    assert page.sections[0] is reasons
    assert metrics["diagnosis"]["outcome"] in text


def test_a_run_that_did_not_learn_says_so_first_and_why(kinds):
    page, text, metrics = page_of(kinds("not_learned"))
    assert metrics["went_wrong"] is None
    assert page.alert.startswith(metrics["diagnosis"]["outcome"])
    assert page.facts[0] == ("outcome", "did not learn")
    assert len(section(page, "reasons").items) >= 1
    assert all(reason in text for reason in metrics["diagnosis"]["reasons"])


def test_losses_that_are_not_finite_are_counted(kinds, tmp_path):
    rows = [{"step": n, "forwards": 2 * n, "loss": 1.0 if n < 8 else math.nan} for n in range(1, 11)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, text, _ = page_of(tmp_path)
    assert "In 3 of 10 steps the loss was no finite number." in text
    assert pictures(page) == ["Loss"]
