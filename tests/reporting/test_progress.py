"""How far a run is: total steps, the time left from recorded step times, and whether it still goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from zokernel.commands.report import read
from zokernel.finetune.storage.lock import LOCK_FILE, exclusive, holder
from zokernel.reporting.progress import Progress, progress_of, total_steps
from zokernel.reporting.serve import live_data, live_page, run_name
from zokernel.reporting.training import TrainingRun, read_training


@pytest.fixture
def folder(tmp_path):
    """A run of 300 steps that is at step 126; its first step took long, the others half a second."""
    folder = tmp_path / "runs" / "reviews"
    folder.mkdir(parents=True)
    rows = [{"step": n, "loss": 1.0, "forwards": 2 * n, "seconds": 30.0 + 0.5 * n} for n in range(1, 127)]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"eval_strategy": "steps", "eval_steps": 50, "max_steps": -1}
    (folder / "run.json").write_text(json.dumps({"total_steps": 300, "settings": settings}))
    return folder


def age(folder, seconds):
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def dead_process():
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_running_run(folder):
    with exclusive(folder):
        assert holder(folder) == os.getpid()
        found = progress_of(read_training(folder))
        assert (found.state, found.steps, found.total, found.percent) == ("running", 126, 300, 42)
        assert found.seconds_left == pytest.approx(174 * 0.5)
        assert (found.steps_done, found.time_left) == ("126 of 300", "about 1 min 27 s")
        assert live_data(folder)["title"] == "42 % · runs/reviews"
        assert "<title>42 % · runs/reviews</title>" in live_page(folder)
    assert holder(folder) is None


def test_evaluations_to_come_take_time_too(folder):
    (folder / LOCK_FILE).write_text(f"pid {os.getpid()}")
    run = read_training(folder)
    run.evaluation_seconds = [9.0, 10.0, 12.0]
    assert progress_of(run).seconds_left == pytest.approx(174 * 0.5 + 4 * 10.0), "after steps 150, 200, 250 and 300"
    run.run["settings"]["eval_steps"] = 0.5
    assert progress_of(run).seconds_left == pytest.approx(174 * 0.5 + 2 * 10.0)
    run.run["settings"]["eval_strategy"] = "epoch"
    assert progress_of(run).seconds_left == pytest.approx(174 * 0.5)


def test_what_is_not_known_is_not_made_up(folder):
    (folder / LOCK_FILE).write_text(f"pid {os.getpid()}")
    (folder / "run.json").write_text(json.dumps({"settings": {"max_steps": -1}}))
    found = progress_of(read_training(folder))
    assert (found.total, found.percent, found.seconds_left) == (None, None, None)
    assert (found.steps_done, found.time_left) == (
        "126 of an unknown number",
        "not known: no number of steps was noted",
    )
    assert found.title("a/b") == "step 126 · a/b"
    (folder / "run.json").write_text(json.dumps({"settings": {"max_steps": 300}}))
    rows = [{"step": n, "loss": 1.0} for n in range(1, 4)]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = progress_of(read_training(folder))
    assert (found.total, found.seconds_left, found.time_left) == (300, None, "not known yet")


def test_a_run_that_died_stopped_or_is_quiet(folder):
    stopped = progress_of(read_training(folder))
    assert (stopped.state, stopped.time_left) == ("stopped", "none: the run stopped")
    (folder / LOCK_FILE).write_text(f"pid {dead_process()}")
    assert progress_of(read_training(folder)).state == "running", "it may write from another machine"
    age(folder, 500)
    died = progress_of(read_training(folder))
    assert (died.state, died.time_left, died.seconds_left) == ("died", "none: the run died", None)
    assert live_data(folder)["title"] == "died at 42 % · runs/reviews"
    assert read(folder).alert == (
        "The run died after step 126 of 300: its process is gone. The same command continues it."
    )
    (folder / LOCK_FILE).write_text(f"pid {os.getpid()}")
    age(folder, 500)
    quiet = progress_of(read_training(folder))
    assert quiet.state == "running"
    assert quiet.description == "Running: step 126 of 300. Nothing was written for 8 min 20 s."


def test_a_finished_run_and_one_that_waits(kinds, tmp_path):
    found = progress_of(read_training(kinds("classification")))
    assert (found.state, found.steps_done, found.percent, found.time_left) == ("finished", "60 of 60", 100, "none")
    waiting = live_data(tmp_path)
    assert (waiting["state"], waiting["status"]) == ("waiting", "Waiting for the run to begin.")
    assert waiting["title"] == f"waiting · {run_name(tmp_path)}"
    assert progress_of(TrainingRun(tmp_path, [])).steps == 0


def test_a_run_notes_its_total_steps_when_it_begins(kinds):
    assert total_steps(json.loads((kinds("cut") / "run.json").read_text())) == 12
    found = live_data(kinds("cut"))
    assert dict(found["facts"])["steps done"] == "5 of 12"
    assert found["percent"] == 41
    assert Progress("stopped", 5, 12).title("runs/cut") == "stopped at 41 % · runs/cut"


def test_the_scores_of_a_live_run_are_named(kinds):
    assert live_data(kinds("chat"))["scores"] == [("perplexity", "perplexity")]
    assert live_data(kinds("classification"))["scores"] == [("accuracy", "accuracy"), ("f1", "F1")]
    assert live_data(kinds("reward"))["scores"][0] == ("reward", "reward")
