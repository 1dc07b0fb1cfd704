"""How far a run is: total steps, the time left from recorded step times, and whether it still goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from zokernel.cli import main
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
        progress = progress_of(read_training(folder))
        assert (progress.state, progress.steps, progress.total, progress.percent) == ("running", 126, 300, 42)
        assert progress.seconds_left == pytest.approx(174 * 0.5)
        assert (progress.steps_done, progress.time_left) == ("126 of 300", "about 1 min 27 s")
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


def test_unknown_progress_is_not_made_up(folder):
    (folder / LOCK_FILE).write_text(f"pid {os.getpid()}")
    (folder / "run.json").write_text(json.dumps({"settings": {"max_steps": -1}}))
    progress = progress_of(read_training(folder))
    assert (progress.total, progress.percent, progress.seconds_left) == (None, None, None)
    assert (progress.steps_done, progress.time_left) == (
        "126 of an unknown number",
        "not known: no number of steps was noted",
    )
    assert progress.title("a/b") == "step 126 · a/b"
    (folder / "run.json").write_text(json.dumps({"settings": {"max_steps": 300}}))
    rows = [{"step": n, "loss": 1.0} for n in range(1, 4)]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    progress = progress_of(read_training(folder))
    assert (progress.total, progress.seconds_left, progress.time_left) == (300, None, "not known yet")


def test_a_run_that_died_stopped_or_is_quiet(folder):
    stopped = progress_of(read_training(folder))
    assert (stopped.state, stopped.time_left) == ("stopped", "none: the run stopped")
    (folder / LOCK_FILE).write_text(f"pid {dead_process()}")
    assert progress_of(read_training(folder)).state == "running", "it may write from another machine"
    age(folder, 500)
    progress = progress_of(read_training(folder))
    assert (progress.state, progress.time_left, progress.seconds_left) == ("died", "none: the run died", None)
    assert live_data(folder)["title"] == "died at 42 % · runs/reviews"
    assert read(folder).alert == (
        "The run died after step 126 of 300: its process is gone. The same command continues it."
    )
    (folder / LOCK_FILE).write_text(f"pid {os.getpid()}")
    age(folder, 500)
    quiet = progress_of(read_training(folder))
    assert quiet.state == "running"
    assert quiet.description == "Running: step 126 of 300. Nothing was written for 8 min 20 s."


def copied(kinds, tmp_path, kind="classification"):
    """Return a copy of a run whose steps are all taken."""
    return shutil.copytree(kinds(kind), tmp_path / "run")


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[1]"])
def test_a_run_without_its_metrics_has_not_stopped_before_its_end(content, kinds, tmp_path):
    folder = copied(kinds, tmp_path)
    path = folder / "metrics.json"
    path.unlink()
    if content is None:
        words = "metrics.json, which says that the run has finished, is missing: the same command writes it."
    else:
        path.write_text(content)
        words = "metrics.json is damaged: remove it, and the same command writes it again."
    progress = progress_of(read_training(folder))
    assert progress.description == f"All steps are taken (60), but {words}"
    assert progress.time_left == f"none: metrics.json is {'missing' if content is None else 'damaged'}"
    assert ("time left", progress.time_left) in read(folder).facts
    page = read(folder)
    assert words in page.alert
    notes = [paragraph for paragraph in page.summary if str(path) in paragraph]
    assert len(notes) == (content is not None)
    assert live_data(folder)["status"] == page.alert


def test_files_that_are_cut_off_are_named(kinds, tmp_path):
    folder = copied(kinds, tmp_path)
    assert read_training(folder).unread == []
    for name, words in (
        ("steps.jsonl", "steps.jsonl is cut off after step "),
        ("journal.zkj", "journal.zkj is cut off: it holds "),
        ("run.json", "run.json is not valid JSON ("),
    ):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 9 // 10])
        (note,) = read_training(folder).unread
        assert f"{folder}/{words}" in note
        assert note in read(folder).summary
        path.write_bytes(whole)
    (folder / "steps.jsonl").unlink()
    assert read_training(folder).unread == [f"{folder}/steps.jsonl is missing: the steps are those of the journal."]
    (folder / "journal.zkj").write_bytes(b"ZKJ")
    assert "journal.zkj: This is not a zokernel journal" in read_training(folder).unread[0]


def test_a_run_without_its_run_json_is_told_so(kinds, tmp_path):
    folder = copied(kinds, tmp_path)
    (folder / "run.json").unlink()
    note = f"{folder}/run.json is missing: without it the run can be neither repeated nor continued."
    assert read_training(folder).unread == [note]
    assert note in read(folder).summary


def test_a_run_that_lost_all_that_a_page_is_made_from_is_named_with_its_files(kinds, tmp_path, capsys):
    folder = copied(kinds, tmp_path)
    for name in ("metrics.json", "steps.jsonl", "journal.zkj"):
        (folder / name).unlink()
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err == (
        f"zokernel: error: The run in {folder} has not taken a step yet, or has lost its metrics.json, steps.jsonl and "
        "journal.zkj: look again later, or restore one of them from a copy.\n"
    )
    (folder / "run.json").unlink()
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err == (
        f"zokernel: error: The run in {folder} has lost its run.json, metrics.json, steps.jsonl and journal.zkj: "
        "restore one of them from a copy.\n"
    )


def test_a_running_run_is_not_told_of_what_it_is_writing(folder):
    (folder / "metrics.json").write_text("{")
    with exclusive(folder):
        assert not any("metrics.json" in paragraph for paragraph in read(folder).summary)


def test_a_finished_run_and_one_that_waits(kinds, tmp_path):
    progress = progress_of(read_training(kinds("classification")))
    assert (progress.state, progress.steps_done, progress.percent, progress.time_left) == (
        "finished",
        "60 of 60",
        100,
        "none",
    )
    waiting = live_data(tmp_path)
    assert (waiting["state"], waiting["status"]) == ("waiting", "Waiting for the run to begin.")
    assert waiting["title"] == f"waiting · {run_name(tmp_path)}"
    assert progress_of(TrainingRun(tmp_path, [])).steps == 0


def test_a_run_notes_its_total_steps_when_it_begins(kinds):
    assert total_steps(json.loads((kinds("cut") / "run.json").read_text())) == 12
    data = live_data(kinds("cut"))
    assert dict(data["facts"])["steps done"] == "5 of 12"
    assert data["percent"] == 41
    assert Progress("stopped", 5, 12).title("runs/cut") == "stopped at 41 % · runs/cut"


def test_the_scores_of_a_live_run_are_named(kinds):
    assert live_data(kinds("chat"))["scores"] == [("perplexity", "perplexity")]
    assert live_data(kinds("classification"))["scores"] == [("accuracy", "accuracy"), ("f1", "F1")]
    assert live_data(kinds("reward"))["scores"][0] == ("reward", "reward")
