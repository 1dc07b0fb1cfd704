"""How far noise may take the weights, and the learning rate that keeps them there, on losses with known answers."""

from __future__ import annotations

import importlib
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from plan_tasks import small_task

from zokernel.commands.plan_text import describe
from zokernel.errors import RunError
from zokernel.experiments.kept_runs import KeptRuns
from zokernel.kernels.plan import make_plan
from zokernel.kernels.plan_walk import measure_growth, reach, start_slopes, walk_rate
from zokernel.kernels.prober import ProbedTask
from zokernel.kernels.probes import Measurement, jackknife


def task_of_loss(loss, dim: int) -> ProbedTask:
    """Examples that all have a given loss, a function of the weights: the softplus of a score is exactly that."""
    weights = torch.nn.Parameter(torch.zeros(dim).double())

    def score(inputs):
        value = torch.log(torch.expm1(loss(weights)))
        return torch.stack([torch.zeros(len(inputs)).double(), value.expand(len(inputs))], 1)

    return ProbedTask({"w": weights}, score, torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), 3, 4)


def test_reach_and_rate_on_a_quadratic():
    """Slopes have mean square |g|^2 + R^2 |H|_F^2: four times that of the start at R = sqrt(3) |g| / |H|_F.

    They do not grow exponentially: measured at up to sqrt(2) of this distance, it seems up to a fifth farther.
    """
    generator = torch.Generator().manual_seed(0)
    h = 0.5 + torch.rand(400, generator=generator).double()
    g = 0.05 * torch.randn(400, generator=generator).double()
    task = task_of_loss(lambda w: 8 + g @ w + 0.5 * h @ w.square(), 400)
    expected = math.sqrt(3) * (g.norm() / h.norm()).item()
    # Long runs are bounded by the walk, short ones by the curvature: tr H for directions of signs has no spread.
    long = make_plan(task, num_probes=400, eps=1e-3, counts=(1, 4), num_steps=10_000)
    assert expected - 4 * long.reach.error < long.reach.value < 1.2 * expected + 4 * long.reach.error
    assert long.reach.error < 0.15 * expected
    for count, rate in long.run_rate.items():
        analytic = 0.8 * expected * math.sqrt(count / (10_000 * math.log(4))) / g.norm().item()
        assert analytic - 4 * rate.error < rate.value < 1.2 * analytic + 4 * rate.error
        assert rate.error < 0.2 * analytic
    short = make_plan(task, num_probes=400, eps=1e-3, counts=(1,), num_steps=20, curvature_probes=100)
    assert short.run_rate[1].value == pytest.approx(1 / h.sum().item(), rel=0.05)
    assert short.reach == long.reach
    assert long.slope.value == pytest.approx(g.norm().item(), abs=4 * long.slope.error)


@pytest.mark.parametrize("first", [1e-3, 1e-2, 1.0])
def test_reach_is_found_from_either_side(first):
    """Slopes of exactly exp(R^2 / 2 * 50): they double at sqrt(ln 4 / 50), whatever distance is tried first."""

    class Radial:
        def step_loss(self, walk, scales, indices):
            return scales[-1] * math.exp(25 * scales[0] ** 2 if len(scales) > 1 else 0)

    start = start_slopes(Radial(), first / 4, 3)
    assert torch.allclose(start, torch.ones(3).double())
    growth = measure_growth(Radial(), start, first / 4)
    assert reach(growth) == pytest.approx(math.sqrt(math.log(4) / 50), rel=1e-9)
    assert jackknife(growth, reach).error == pytest.approx(0, abs=1e-12)


def test_a_loss_that_is_not_finite_far_away_bounds_the_reach():
    """Slopes stay as they are up to 0.2; beyond, scores overflow."""

    class Cliff:
        def step_loss(self, walk, scales, indices):
            if scales[0] > 0.2:
                raise RunError("A score is NaN or infinite.")
            return scales[1]

    assert 0.14 < reach(measure_growth(Cliff(), torch.ones(3).double(), 1e-2)) <= 0.2


def test_the_advised_walk_keeps_its_distance_from_growth_without_bound():
    """A walk of slopes s^2 = s_0^2 exp(a R^2): s grows by 5/3 at the advised rate, without bound at 5/4 of it."""
    start, growth, steps = 3.0, 700.0, 2000
    distance = Measurement(math.sqrt(math.log(4) / growth), 0.0)
    rate = walk_rate(distance, Measurement(start, 0.0), num_perturbations=1, num_steps=steps).value

    def final_slope(rate):
        square = 0.0
        for _ in range(steps):
            if growth * square > 100:
                return math.inf
            square += (rate * start) ** 2 * math.exp(growth * square)
        return math.exp(growth * square / 2)

    assert final_slope(rate) == pytest.approx(5 / 3, rel=1e-3)
    assert final_slope(1.19 * rate) < 4
    assert final_slope(1.31 * rate) == math.inf
    four = walk_rate(distance, Measurement(start, 0.0), num_perturbations=4, num_steps=4 * steps).value
    assert four == pytest.approx(rate)


def test_slopes_that_do_not_grow_leave_the_rate_of_one_step():
    g = torch.linspace(0.01, 0.02, 50).double()
    plan = make_plan(task_of_loss(lambda w: 8 + g @ w, 50), num_probes=64, counts=(1,))
    assert math.isinf(plan.reach.value)
    assert plan.run_rate[1].known
    assert plan.run_rate[1].value == pytest.approx(plan.learning_rate[1].value)
    text = describe(plan, small_task(), 1.0)
    assert "distance where slopes double    they do not" in text
    assert "inf" not in text


def test_kept_plans_of_the_benchmark_are_told_apart_by_their_probes(tmp_path, monkeypatch):
    """So are those of the committed file, each of which has 32."""
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    benchmark = importlib.import_module("plan_followed")
    path = tmp_path / "runs.jsonl"
    planned = []
    monkeypatch.setattr(benchmark, "advice", lambda data, **flags: planned.append(flags["num_probes"]) or {"lr": None})
    settings = {"seeds": [0], "tasks": ["tickets"], "train": ["full"], "steps": 40, "batch": 8, "no_sweep": True}
    for probes in (32, 64, 64):
        sources = benchmark.Sources(*[tmp_path] * 3)
        benchmark.follow(KeptRuns(path), sources, Namespace(**settings, no_plan=False, num_probes=probes))
    assert planned == [32, 64]
    records = KeptRuns(benchmark.COMMITTED)
    settings |= {"tasks": benchmark.TASKS, "train": list(benchmark.SWEEP)}
    summaries = [benchmark.summary(records, Namespace(**settings, num_probes=probes)) for probes in (32, 64)]
    plans = [row for row in records.rows if row["kind"] == "plan" and row["seed"] == 0]
    assert {row["num_probes"] for row in plans} == {32}
    counts = [text.splitlines()[-1].split(",")[0] for text in summaries]
    assert counts == [f"{len(plans)} plans followed", "0 plans followed"]
