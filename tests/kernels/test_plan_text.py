"""What a plan logs while it measures: how many forward passes it takes and how far it is, without mention of a test."""

from __future__ import annotations

import re

import pytest
from plan_tasks import small_task

from zokernel.cli import main
from zokernel.kernels import prober
from zokernel.kernels.plan import make_plan
from zokernel.kernels.plan_verify import verify

COUNT = r"(\d+) to (\d+) forward passes"


class Clock:
    """Time that passes in forwards: so many seconds each."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 1000.0

    def monotonic(self):
        self.now += self.seconds
        return self.now


def lines_of(caplog):
    return [message for message in caplog.messages if "forward passes" in message]


def test_a_plan_says_how_many_forward_passes_it_takes_before_the_first(caplog):
    caplog.set_level("INFO", logger="zokernel")
    task = small_task()
    counts = []
    for probes, curvature_probes in ((16, 1), (20, 8)):
        caplog.clear()
        plan = make_plan(task, num_probes=probes, curvature_probes=curvature_probes)
        (line,) = lines_of(caplog)  # it takes less than five seconds
        fewest, most = map(int, re.search(COUNT, line).groups())
        # One at the start, two per probe, eight for rounding, four for 3 rough and all other derivatives.
        fixed = 1 + 2 * probes + 8 + 4 * (3 + curvature_probes)
        # Two at the start of each walk, and at 3 to 12 distances.
        assert (fewest, most) == (fixed + 8 * probes, fixed + 26 * probes)
        assert fewest <= plan.forwards <= most
        assert f"of {len(task.labels)} examples each" in line
        counts.append(plan.forwards)
    assert counts[0] < counts[1]


@pytest.mark.parametrize("seconds", [1.0, 7.0])
def test_a_plan_says_how_far_it_is_every_half_a_minute(caplog, monkeypatch, seconds):
    caplog.set_level("INFO", logger="zokernel")
    monkeypatch.setattr(prober, "time", Clock(seconds))
    plan = make_plan(small_task(), num_probes=64)
    fewest, most = map(int, re.search(COUNT, lines_of(caplog)[0]).groups())
    matches = [re.fullmatch(rf"(\d+) of {COUNT} are done, (.+) left\.", line) for line in lines_of(caplog)[1:]]
    assert all(matches)
    counts = [int(found[1]) for found in matches]
    every = -(-30 // seconds)
    first = -(-5 // seconds)
    expected = [first + every * n for n in range(plan.forwards) if first + every * n <= plan.forwards]
    assert counts == expected
    left = matches[0][4]
    assert left == " to ".join(prober.readable_seconds(seconds * (count - counts[0])) for count in (fewest, most))
    assert all(found[4].startswith("at most ") == (int(found[1]) >= fewest) for found in matches)


@pytest.mark.parametrize("seconds", [0.0, 1.0, 7.0])
def test_a_verification_says_what_it_takes_and_how_far_it_is(caplog, monkeypatch, seconds):
    task = small_task(classes=3, update=6, observe=4)
    plan = make_plan(task, num_probes=16)
    caplog.set_level("INFO", logger="zokernel")
    monkeypatch.setattr(prober, "time", Clock(seconds))
    verify(task, plan, num_draws=40)
    # The loss, each example's, 2 differences of each of 4 observed examples, and 2 of each of 6 for the Fisher matrix.
    parts = {"gradients": 1 + 6 + 2 * 4 + 2 * 6, "fresh directions": 40, "gradients at moved weights": 2 * 8}
    parts["forward passes"] = 2 * 4 * 7
    *most, last = (f"{count} {unit}" for unit, count in parts.items())
    assert f"Verifying takes {', '.join(most)} and {last}." in caplog.messages
    matches = [re.fullmatch(r"(\d+) of (\d+) (.+) are done, (.+) left\.", message) for message in caplog.messages]
    reports = [match.groups() for match in matches if match]
    expected = []
    for unit, count in parts.items():
        after, every = (-(-wait // seconds) if seconds else count for wait in (prober.FIRST_LINE, prober.NEXT_LINES))
        while after < count:
            left = prober.readable_seconds(seconds * (count - after))
            expected.append((f"{after:.0f}", str(count), unit, left))
            after += every
    assert reports == expected
    assert bool(reports) == bool(seconds)


def test_a_plan_of_rows_does_not_speak_of_a_test(caplog, tiny_lm_path, tiny_reviews_path, tmp_path):
    caplog.set_level("INFO", logger="zokernel")
    text = (tiny_reviews_path / "train.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text)
    words = ["plan", "--model_name_or_path", str(tiny_lm_path), "--train_file", str(tmp_path / "rows.jsonl")]
    words += ["--label_words", "bad", "good", "--num_probes", "8", "--curvature_probes", "1"]
    words += ["--update_examples", "4", "--observe_examples", "2"]
    assert main(words) == 0
    with_test = [*words, "--test_file", str(tmp_path / "rows.jsonl"), "--max_test_samples", "2"]
    assert main(with_test) == 0
    assert any(message.startswith("Validation: ") for message in caplog.messages)
    wrong = re.compile(r"^Test|[Tt]est example|checkpoint")
    assert not [message for message in caplog.messages if wrong.search(message)]
