"""Kept runs: which one answers for a setting, and which file may not take more."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from zokernel.experiments.kept_runs import KeptRuns, rows_sha256

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_a_run_without_a_value_differs_from_one_with_none(tmp_path):
    runs = KeptRuns(tmp_path / "runs.jsonl")
    runs.add({"seed": 0, "loss": 0.5})
    runs.add({"seed": 0, "rate": None, "loss": 0.25})
    runs.add({"seed": 0, "rate": [1, 2], "loss": 0.125})
    for stored in (runs, KeptRuns(runs.path)):
        assert stored.find(seed=0)["loss"] == 0.5
        assert stored.find(seed=0, rate=None)["loss"] == 0.25
        assert stored.find(seed=0, rate=[1, 2])["loss"] == 0.125
        assert stored.find(seed=0, batch=None) is None


def test_runs_with_other_settings_are_not_extended(tmp_path, benchmark):
    require_same_settings = benchmark("same_settings").require_same_settings
    runs = KeptRuns(tmp_path / "runs.jsonl")
    runs.add({"task": "sst2", "data": "66e12348"})
    runs.add({"task": "trec"})
    require_same_settings(runs, {"task": "sst2"}, data="66e12348")
    require_same_settings(runs, {"task": "rte"}, data="0")
    with pytest.raises(SystemExit, match="a run that has data 66e12348, not 0: keep"):
        require_same_settings(runs, {"task": "sst2"}, data="0")
    with pytest.raises(SystemExit, match="a run that does not say its data, not 0: keep"):
        require_same_settings(runs, {"task": "trec"}, data="0")
    with pytest.raises(SystemExit, match="does not say its data"):
        require_same_settings(runs, {}, data="66e12348")


def test_the_hash_is_of_the_rows_in_their_order():
    assert rows_sha256([{"text": "good", "label": 1}]) == rows_sha256([{"label": 1, "text": "good"}]) == "66e12348"
    assert len({rows_sha256(rows) for rows in ([1, 2], [2, 1], [12], ["12"], [])}) == 5


def test_committed_runs_are_found_by_their_benchmarks(benchmark):
    rewards, long_runs, queries = map(benchmark, ("rewards", "long_runs", "query_efficiency"))
    committed = KeptRuns(RESULTS / "rewards.jsonl")
    benchmark("same_settings").require_same_settings(committed, {}, model="smollm2", generations=rewards.GENERATIONS)
    matches = []
    for name, contender in rewards.CONTENDERS.items():
        keys = [(rate, rewards.SWEPT_WITH, "validation") for rate in contender.rates]
        keys += [(rewards.best_rate(committed.rows, name), seed, "held-out") for seed in rewards.SEEDS]
        matches += [committed.find(method=name, rate=rate, seed=seed, split=split) for rate, seed, split in keys]
    assert len(matches) == len(committed.rows) == 18
    assert None not in matches
    committed = KeptRuns(long_runs.COMMITTED)
    assert committed.find(task="headlines", method="AdamW, LoRA", rate=1e-3, budget=3600, seed=0)["steps"] == 150
    for name, rate in (("auto, LoRA, batch 16", None), ("MeZO", 2e-5)):
        assert committed.find(task="headlines", method=name, rate=rate, budget=36_000, seed=0)["steps"] == 1125
    runs = queries.Runs(queries.COMMITTED)
    matches = runs.find(task="trec", train="full", contender="auto", lr=queries.rates_of("auto", "trec", "full")[0])
    assert [row["seed"] for row in matches] == list(range(1, 11))
    assert not any("data" in row for row in runs.rows)


def test_long_runs_on_other_headlines_go_to_another_file(tmp_path, monkeypatch, benchmark):
    """Runs are kept with the hash of their headlines; the committed ones, which have none, are not added to."""
    long_runs, trained = benchmark("long_runs"), []
    results = {"learning_rate": 2e-5, "steps": 1125, "before": [0.5, 1], "after": [0.5, 1], "validation": []}
    monkeypatch.setattr(long_runs, "run", lambda folder, *arguments, **options: trained.append(folder.name) or 0)
    monkeypatch.setattr(
        long_runs, "read_measurements", lambda folder, **options: results | {"seconds": 1, "peak_mib": 1}
    )
    monkeypatch.chdir(tmp_path)

    def start(title: str, *flags: str) -> None:
        row = {"input": [{}, {"content": title}], "ideal": "satire"}
        Path("samples.jsonl").write_text(json.dumps(row) + "\n")
        command = ["long_runs.py", "--headlines", "samples.jsonl", "--contenders", "MeZO", "--rate", "2e-5", *flags]
        monkeypatch.setattr("sys.argv", command)
        long_runs.main()

    start("Area man")
    start("Area man")
    runs = KeptRuns(long_runs.OWN)
    assert trained == ["headlines-MeZO-2e-05-36000-0"]
    assert len(runs.rows) == 1
    hashed = runs.rows[0]["data"]
    assert len(hashed) == 8
    with pytest.raises(SystemExit, match=f"runs/long_runs.jsonl holds a run that has data {hashed}, not "):
        start("Area woman")
    with pytest.raises(SystemExit, match="does not say its data"):
        start("Area man", "--runs", str(long_runs.COMMITTED))
    start("Area woman", "--runs", "others.jsonl")
    assert len(trained) == 2


def test_long_runs_take_the_whole_budget_at_the_best_rate_of_a_sweep(tmp_path, monkeypatch, benchmark):
    """SST-2's splits do not overlap; the least validation loss of a sweep decides, and a run that stopped has none."""
    long_runs, trained = benchmark("long_runs"), []
    monkeypatch.setitem(long_runs.SIZES, "train", 6)
    monkeypatch.setitem(long_runs.SIZES, "validation", 3)
    folder = tmp_path / "sst2"
    folder.mkdir()
    lines = [f"{n % 2}\tsentence {n}" for n in range(12)]
    (folder / "train.tsv").write_text("\n".join(["label\tsentence", *lines[:10]]) + "\n")
    (folder / "dev.tsv").write_text("\n".join(["label\tsentence", *lines[10:]]) + "\n")

    def measure(folder: Path, *, sweeps: bool) -> dict[str, Any]:
        assert sweeps == ("-800-" in folder.name)
        rate = float(folder.name.split("-MeZO-")[1].rsplit("-", 2)[0])
        loss = abs(rate - 3e-5) + 0.5
        row = {"learning_rate": rate, "steps": 9, "before": [0.5, 1], "after": [0.5, loss], "seconds": 1, "peak_mib": 1}
        return row | {"validation": [[9, 0.5, loss]]}

    monkeypatch.setattr(
        long_runs, "run", lambda folder, *arguments, **options: trained.append(folder.name) or "1e-05" in folder.name
    )
    monkeypatch.setattr(long_runs, "read_measurements", measure)
    monkeypatch.chdir(tmp_path)
    command = ["long_runs.py", "--data_folder", str(tmp_path), "--tasks", "SST-2", "--contenders", "MeZO"]
    monkeypatch.setattr("sys.argv", [*command, "--budget", "3200", "--seeds", "4", "5"])
    long_runs.main()
    swept = [f"SST-2-MeZO-{rate}-800-4" for rate in ("1e-05", "3e-05", "0.0001")]
    assert trained == [*swept, "SST-2-MeZO-3e-05-3200-4", "SST-2-MeZO-3e-05-3200-5"]
    files = [tmp_path / "runs/long/data/SST-2" / f"{split}.jsonl" for split in ("train", "validation", "test")]
    texts = [[json.loads(line)["sentence"] for line in path.read_text().splitlines()] for path in files]
    assert [len(split) for split in texts] == [6, 3, 2]
    assert len({text for split in texts for text in split}) == 11
    assert texts[2] == ["sentence 10", "sentence 11"]
