"""KerZOO experiments: replicas are the optimizers, every experiment runs at smoke scale, and its numbers make sense."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.experiments.base import MODULES
from zokernel.experiments.criteria import interval
from zokernel.experiments.kept_runs import rows_sha256
from zokernel.experiments.kerzoo import methods
from zokernel.experiments.kerzoo.replicas import Task, iterations_to, train
from zokernel.optim import KerZOO, MeZO

SMOKE = [name for name in MODULES if name.startswith("kerzoo/")]


@pytest.mark.parametrize("method", ["mezo", "kerzoo"])
def test_replicas_take_the_optimizers_own_steps(method):
    """With the optimizer's directions and radii, one replica follows it to fp32 round-off, its average too."""
    task, steps, lr, seed = Task.make(examples=100), 8, 1e-3, 1000
    law, dim = Dense("rademacher"), task.start.numel()

    def draw(step, index):
        return law({"theta": torch.zeros(dim)}, seed=seed, step=step, index=index)["theta"][None]

    line = methods.mezo(3) if method == "mezo" else methods.kerzoo()
    curves = train(task, line, lrs=[lr], seeds=1, iterations=steps, every=1, draw=draw)
    theta = torch.nn.Parameter(task.start.clone())
    options = {"seed": seed, "num_perturbations": 3, "eps": methods.EPS}
    optimizer = (
        MeZO([("theta", theta)], lr=lr, **options)
        if method == "mezo"
        else KerZOO([("theta", theta)], lr=lr, averaging="fp32", **options)
    )
    batches = torch.Generator().manual_seed(1)
    for step in range(steps):
        rows = torch.randint(0, 100, (1, 64), generator=batches)
        optimizer.step(lambda: task.losses(theta.detach()[None], task.x[rows], task.y[rows]).item())  # noqa: B023
        exact = task.losses(theta.detach()[None], task.x[None], task.y[None]).item()
        # A loss difference of 1e-7 over 2 eps moves a weight by lr * 5e-5 * 30 (the kernel's largest weight).
        assert curves.losses[0, 0, step + 1] == pytest.approx(exact, abs=2e-4)
    if method == "kerzoo":
        average = optimizer.averaged_weights()["theta"]
        exact = task.losses(average[None], task.x[None], task.y[None]).item()
        assert curves.averaged[0, 0, -1] == pytest.approx(exact, abs=2e-4)


def test_replicas_of_different_seeds_and_rates_differ_and_repeat():
    task = Task.make(examples=100)
    first, second = (train(task, methods.kerzoo(), lrs=[1e-3, 2e-3], seeds=3, iterations=4, every=2) for _ in range(2))
    assert np.array_equal(first.losses, second.losses)
    assert len(np.unique(first.losses[:, :, -1])) == 6
    assert first.forwards_per_iteration == 6
    sequential = train(task, methods.sequential_mezo(), lrs=[1e-3], seeds=2, iterations=4, every=2)
    assert sequential.forwards_per_iteration == 6


def test_crossings_and_intervals():
    curve = np.array([[4.0, 2.0, 1.0], [4.0, 3.5, 3.0]])
    assert iterations_to(curve, np.array([0, 10, 20]), np.array([3.0, 1.0])).tolist() == [5.0, np.inf]
    mean, low, high = interval(np.array([1.0, 2.0, 4.0]))
    assert mean == pytest.approx(2.0)
    assert low * high == pytest.approx(4.0)
    assert np.log(high / 2) == pytest.approx(4.303 * np.log(2) / 3**0.5, rel=1e-3)


def test_published_curve_is_mezos_three_times_faster():
    scale = methods.published_time_scale()
    assert scale["iterations_ratio"] == pytest.approx([3.0] * 5, abs=0.04)
    assert all(1.1 < ratio < 1.35 for ratio in scale["seconds_ratio"])


@pytest.mark.parametrize("name", SMOKE)
def test_runs_at_smoke_scale(name, smoke_run):
    record = smoke_run.record(name)
    assert record["title"]
    assert record["summary"]
    assert record["verdicts"]
    if (smoke_run.folder / name / "arrays.npz").exists():
        with np.load(smoke_run.folder / name / "arrays.npz") as arrays:
            assert all(np.isfinite(arrays[key]).any() for key in arrays)


def test_accuracy_rows_cover_the_tables_and_their_settings():
    from zokernel.experiments.base import Config
    from zokernel.experiments.kerzoo.accuracy import MODELS, ROWS, TASKS, select

    assert {row.table for row in ROWS} == {"1", "2", "3", "8", "9", "10", "15", "16"}
    assert all(row.model in MODELS and row.task in TASKS for row in ROWS)
    published = {(r.table, r.task, r.method, r.lora, r.k_shot): r.published for r in ROWS if not r.num_perturbations}
    assert published["1", "TREC", "kerzoo", False, 512] == 96.0
    assert published["2", "SQuAD", "hizoo", False, None] == 66.0
    assert published["2", "DROP", "kerzoo", True, None] == 14.7
    assert published["10", "SQuAD", "kerzoo", False, None] == 85.0
    smoke = select(Config("smoke"))
    assert {row.method for row in smoke} == {row.method for row in ROWS}
    forms = {(row.masked, row.task in ("SQuAD", "DROP")) for row in smoke}
    assert forms == {(True, False), (False, False), (False, True)}
    kerzoo = next(row for row in ROWS if row.method == "kerzoo" and row.lora and not row.masked)
    settings = kerzoo.settings(4000)
    assert settings["learning_rate"] == 1e-4
    assert settings["eps"] == 1e-2
    assert "total_steps=4000" in settings["method_args"]


def test_a_sweep_takes_the_rate_with_the_lowest_validation_loss_at_equal_effective_rates():
    from zokernel.experiments.kerzoo.language_model import METHODS, SWEEP, best

    trials = []

    def train(line, seed):
        trials.append((line["learning_rate"], seed))
        loss = {0: 0.7, 1: 0.4, 2: 0.5, 3: float("nan")}[len(trials) - 1]
        return {"evaluations": [{"loss": loss}]}

    trial = best("KerZOO as printed", 3e-4, 40, train, seed=5)
    assert [rate * 4 for rate, _ in trials] == pytest.approx([3e-4 * factor for factor in SWEEP])
    assert {seed for _, seed in trials} == {5}
    assert trial["learning_rate"] == trials[1][0]
    assert trial["method_args"] == [*METHODS["KerZOO as printed"]["method_args"], "total_steps=40"]
    assert "total_steps=40" not in METHODS["KerZOO as printed"]["method_args"]


def test_a_stopped_comparison_continues_from_its_file(tmp_path, monkeypatch):
    from zokernel.experiments.base import Config
    from zokernel.experiments.kerzoo import language_model

    options = {"sweep": True, "runs": str(tmp_path / "runs.jsonl"), "trained": ["all weights"], "steps": 2}
    first = language_model.run(Config("smoke", options=dict(options))).numbers
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    # Four methods at one nominal rate; four methods at four effective ones.  MeZO-3 at KerZOO's is one of these, and
    # so is KerZOO at the nominal one.
    assert len(lines) == 4 + 4 * 4 - 2
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    trained = []
    job = language_model.finetune_job
    monkeypatch.setattr(
        language_model, "finetune_job", lambda **arguments: trained.append(arguments) or job(**arguments)
    )
    resumed = language_model.run(Config("smoke", options=dict(options))).numbers
    assert len(trained) == 1
    assert [row["test_loss"] for row in resumed["rows"]] == [row["test_loss"] for row in first["rows"]]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(lines)


def test_a_run_that_diverged_is_kept_with_infinite_losses_and_the_others_continue(tmp_path):
    from zokernel.experiments.base import Config
    from zokernel.experiments.kerzoo import language_model

    path = tmp_path / "runs.jsonl"
    # Four times this rate is above the largest fp32 number.
    options = {"runs": str(path), "trained": ["all weights"], "lr": 1e38}
    for _ in range(2):  # the second time from the file
        result = language_model.run(Config("smoke", options=dict(options)))
        rows = {row["method"]: row for row in result.numbers["rows"]}
        assert rows["KerZOO"]["test_loss"] == [np.inf]
        assert rows["KerZOO"]["test_accuracy"] == [None]
        assert rows["KerZOO"]["test_loss_before"] == rows["MeZO-1"]["test_loss_before"]
        assert np.isfinite(rows["MeZO-1"]["test_loss"]).all()
        assert " and inf (" in result.summary
        assert len(path.read_text().splitlines()) == 5

    def diverges_above(line, seed):
        return {"evaluations": [] if line["learning_rate"] > 1.1e-3 else [{"loss": 9.0}]}

    assert language_model.best("KerZOO", 1e-3, 3, diverges_above, 0)["learning_rate"] == pytest.approx(1e-3 / 9)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    runs = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [run["metrics"]["evaluations"] for run in runs].count([]) >= 1
    assert {run["task"] for run in runs} == {"movie reviews"}


def test_gaps_pair_both_variants_with_mezo_by_seed():
    from zokernel.experiments.kerzoo import language_model

    losses = {"KerZOO": [3.0, 5.0], "KerZOO as printed": [1.0, 1.0], language_model.MATCHED: [2.0, 2.0]}
    rows = [
        {"task": "TREC", "trained": "LoRA", "method": method, "test_loss": loss, "test_loss_before": 4.0}
        for method, loss in losses.items()
    ]
    gaps = language_model.gaps_by_panel(rows, beside=language_model.MATCHED)
    half = 12.706  # Student's t of one degree of freedom; the differences 1 and 3 have a standard error of 1
    assert gaps["TREC, LoRA"] == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert gaps["TREC, LoRA, as printed"] == pytest.approx((-1.0, -1.0, -1.0))
    assert language_model.judge({"as printed": gaps["TREC, LoRA, as printed"]}, 5, 300).verdict == "holds"
    assert language_model.summary_of(rows) == (
        "TREC, LoRA: the mean test loss, 4.000 before training, ends between 1.000 (KerZOO as printed) and 4.000 "
        "(KerZOO)."
    )


def test_every_comparison_has_a_panel_with_every_line_and_seed():
    from zokernel.experiments.kerzoo import language_model

    rows = [
        {"task": task, "trained": "LoRA", "method": method, "test_loss": [2.0, 1.0], "test_loss_before": 3.0}
        | {"forwards": 600}
        for task in ("SST-2", "TREC", "RTE")
        for method in ("MeZO-3", "KerZOO", "KerZOO as printed", language_model.MATCHED)
    ]
    figure = language_model.draw(language_model.by_panel(rows))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"{task}, LoRA, a dot per seed, a line at the median" for task in ("SST-2", "TREC", "RTE")]
    for axis in figure.axes:
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [list(dot.get_ydata()) for dot in dots] == [[2.0, 1.0]] * 4
        assert axis.get_xticklabels()[3].get_text() == "MeZO-3,\nKerZOO's rate\n600"


def test_runs_on_other_data_are_other_runs(tmp_path):
    from zokernel.experiments.base import Config
    from zokernel.experiments.kerzoo import language_model

    options = {"runs": str(tmp_path / "runs.jsonl"), "tasks": ["SST-2"], "trained": ["all weights"]}
    for folder, lines in (("first", 5), ("second", 10), ("first", 10)):
        language_model.run(Config("smoke", options=options | {"data_folder": folder}))
        assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == lines


def test_every_task_is_read_from_its_files(tmp_path):
    from zokernel.experiments.base import Config
    from zokernel.experiments.kerzoo import real_tasks
    from zokernel.finetune.settings.arguments import DataArguments

    options = {"data_folder": str(tmp_path), "tasks": list(real_tasks.DATA)}
    tasks = real_tasks.tasks(Config("cpu", options=options))
    assert list(tasks) == ["SST-2", "TREC", "RTE", "headlines"]
    assert list(real_tasks.tasks(Config("cpu", options={"data_folder": "d"}))) == ["SST-2", "TREC", "RTE"]
    for name, arguments in tasks.items():
        assert DataArguments(**arguments).train_file.startswith(str(tmp_path)), name
    assert tasks["headlines"]["train_file"] == str(tmp_path / "headlines/train.jsonl")
    assert tasks["headlines"]["label_words"] == ["news", "satire"]
    with pytest.raises(UsageError, match="no task 'CB'"):
        real_tasks.tasks(Config("cpu", options=options | {"tasks": ["CB"]}))


def test_a_file_with_other_rows_is_other_data(tmp_path):
    from zokernel.experiments.kerzoo.real_tasks import hashes

    data = {"train_file": str(tmp_path / "train.csv"), "column_names": ["label", "question"]}
    (tmp_path / "train.csv").write_text("1,Who?\n2,Where?\n")
    first = hashes(data)
    assert first == {
        "train_file": rows_sha256([{"label": "1", "question": "Who?"}, {"label": "2", "question": "Where?"}])
    }
    (tmp_path / "train.csv").write_text("1,Who?\n3,Where?\n")
    assert hashes(data) != first
    assert hashes({"dataset_name": "movie-reviews"}) == {}


def test_the_figure_writes_losses_that_would_hide_the_others_at_its_top():
    from zokernel.experiments.kerzoo.loss_figure import draw

    row = {"method": "KerZOO", "test_loss_before": 1.5, "forwards": 1800}
    rows = [row | {"test_loss": losses} for losses in ([0.7, 0.8, 1449.64], [0.9, float("inf"), float("inf")])]
    (axis,) = draw({"headlines, LoRA": rows}).axes
    assert [text.get_text() for text in axis.texts] == ["1,450", "inf, inf"]
    low, high = axis.get_ylim()
    assert low < 0.7
    assert 1.5 < high < 2
