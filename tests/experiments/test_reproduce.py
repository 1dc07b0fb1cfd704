"""``zokernel reproduce``: results say how they were made, finished parts are kept, failures do not stop the others."""

from __future__ import annotations

import json

import pytest

from zokernel.cli import main
from zokernel.commands import reproduce as command
from zokernel.experiments import base
from zokernel.experiments.base import MODULES, Config, Result, Verdict, experiment
from zokernel.experiments.runner import ERROR_FILE, expected_seconds, run_all
from zokernel.experiments.storage import load_record, same_settings


@pytest.fixture
def two_experiments(monkeypatch):
    """One experiment that counts its runs and reads an option, and one that always fails."""
    runs = []

    @experiment("test/good", "A good one")
    def good(config):
        runs.append(config.pick("size", smoke=1, cpu=2))
        return Result("Fine.", {"size": runs[-1]}, verdicts=[Verdict("It runs.", "holds", "It did.", id="test-runs")])

    @experiment("test/bad", "A bad one")
    def bad(config):
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(base, "MODULES", {"test/bad": __name__, "test/good": __name__})
    monkeypatch.setattr(command, "MODULES", base.MODULES)
    monkeypatch.setattr("importlib.import_module", lambda name: None)
    yield runs
    for name in ("test/good", "test/bad"):
        del base._REGISTRY[name]


def test_a_failure_is_reported_and_the_others_run(two_experiments, tmp_path, capsys):
    from zokernel.commands.reproduce import add_arguments
    from zokernel.commands.reproduce import main as reproduce

    def run(*words):
        import argparse

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return reproduce(parser.parse_args([*words, "--output_dir", str(tmp_path)]))

    assert run("all", "--scale", "smoke", "--set", "size=7") == 1
    printed = capsys.readouterr().out
    assert "ZeroDivisionError: by design" in printed
    assert "1 run, 0 kept, 1 failed" in printed
    assert "ZeroDivisionError" in (tmp_path / "test/bad" / ERROR_FILE).read_text()
    assert load_record(tmp_path / "test/bad") is None
    assert two_experiments == [7]
    # again: the finished one is kept, and only with the same settings
    assert run("test/good", "--scale", "smoke", "--set", "size=7") == 0
    assert two_experiments == [7]
    printed, record = capsys.readouterr().out, load_record(tmp_path / "test/good")
    assert "1 kept" in printed
    assert f"with zokernel {record['versions']['zokernel']}" in printed
    assert (record["commit"] is None) or f", commit {record['commit']} (--overwrite" in printed
    with pytest.raises(ValueError, match="other settings"):
        run("test/good", "--scale", "smoke")
    assert run("test/good", "--scale", "smoke", "--overwrite") == 0
    assert two_experiments == [7, 1]
    # an option that nobody reads is an error, not a silent nothing
    assert run("test/good", "--scale", "smoke", "--overwrite", "--set", "sise=7") == 1
    assert "No experiment read the option sise" in capsys.readouterr().out


def test_a_result_records_how_it_was_made(two_experiments, tmp_path):
    (outcome,) = run_all(["test/good"], Config("smoke", seed=3, options={"size": 2}), tmp_path, report=lambda _: None)
    assert outcome.state == "finished"
    record = json.loads((tmp_path / "test/good/result.json").read_text())
    assert record["config"] == {"scale": "smoke", "seed": 3, "options": {"size": 2}}
    assert record["command"] == "zokernel reproduce test/good --scale smoke --seed 3 --set size=2"
    assert {"zokernel", "python", "torch", "numpy"} <= set(record["versions"])
    assert record["verdicts"][0]["id"] == "test-runs"
    assert same_settings(record, Config("smoke", 3, {"size": 2}))
    assert not same_settings(record, Config("smoke", 4, {"size": 2}))
    assert expected_seconds("test/good", "smoke", tmp_path) == record["seconds"]


def test_processes_give_the_same_numbers(smoke_run, tmp_path):
    names = ["kerzoo/estimator", "nzk/mixture"]
    lines = []
    outcomes = run_all(names, Config("smoke"), tmp_path, jobs=2, report=lines.append)
    assert {outcome.state for outcome in outcomes} == {"finished"}, [o.message for o in outcomes]
    key = {"kerzoo/estimator": "slopes", "nzk/mixture": "kernel_z_rms"}
    for name in names:  # up to the order of sums, which follows the number of threads
        parallel, sequential = (
            found["numbers"][key[name]] for found in (load_record(tmp_path / name), smoke_run.record(name))
        )
        assert parallel == pytest.approx(sequential, rel=1e-6)
    assert len(lines) == 3
    assert "left" in lines[1]


def test_a_process_that_dies_is_a_failure(tmp_path):
    bad = Config("smoke", options={"per_class": "many"})
    (outcome,) = run_all(["nzk/linear_mnist_01"], bad, tmp_path, jobs=2, report=lambda _: None)
    assert outcome.state == "failed"
    assert "log.txt" in outcome.message
    assert "many" in (tmp_path / "nzk/linear_mnist_01/log.txt").read_text()


def test_every_experiment_at_smoke_scale(smoke_run, capsys):
    """``reproduce all`` over what other tests have run already: it keeps that and runs the rest."""
    for name in MODULES:
        smoke_run.record(name)
    assert main(["reproduce", "all", "--scale", "smoke", "--output_dir", str(smoke_run.folder)]) == 0
    assert f"0 run, {len(MODULES)} kept, 0 failed" in capsys.readouterr().out
    records = [load_record(smoke_run.folder / name) for name in MODULES]
    assert all(record["config"]["scale"] == "smoke" for record in records)
    assert all((smoke_run.folder / r["name"] / f"{f}.svg").exists() for r in records for f in r["figures"])


def test_wrong_requests(tmp_path, capsys):
    assert main(["reproduce", "entk/nothing"]) == 2
    assert main(["reproduce", "nzk/laws", "--set", "nothing", "--output_dir", str(tmp_path)]) == 2
    assert main(["reproduce", "nzk/laws", "--jobs", "0", "--output_dir", str(tmp_path)]) == 2
    assert main(["reproduce", "--list"]) == 0
    assert "kerzoo/loss_curves" in capsys.readouterr().out
