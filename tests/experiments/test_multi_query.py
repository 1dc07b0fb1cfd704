"""The multi-query experiment: its runs are the optimizers', and its verdicts come from its intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zokernel.directions import Dense
from zokernel.estimators import OneSided, TwoPoint
from zokernel.experiments.multi_query import budget
from zokernel.experiments.multi_query.runs import EPS, Quadratic, Softmax, aligned_coefficients, train
from zokernel.optim import ForwardDifference, MeZO


@pytest.mark.parametrize(("make", "method"), [(TwoPoint, MeZO), (OneSided, ForwardDifference)])
def test_runs_are_the_optimizers(make, method):
    problem, law, count, lr = Quadratic("it", np.linspace(0.5, 2, 6)), Dense("rademacher"), 3, 0.05
    params = {"w": torch.zeros(6, dtype=torch.float64)}

    def draw(step):
        return np.stack([law(params, seed=0, step=step, index=p)["w"].numpy()[None] for p in range(count)])

    estimator = make(EPS, count)
    budget = {"forwards": 5 * estimator.forwards_at(0), "seeds": 1, "seed": 0}
    decreases = train(problem, estimator, [lr], draw=draw, **budget)
    weight = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = method([("w", weight)], lr=lr, eps=EPS, num_perturbations=count, perturb="in_place:copy")
    loss = lambda: float(problem.full_loss(weight.detach().numpy()[None, None])[0, 0])  # noqa: E731
    start = loss()
    for _ in range(5):
        optimizer.step(loss)
    assert decreases[0, 0] == pytest.approx(math.log(start / loss()), rel=1e-6)


def test_the_softmax_problem_has_its_loss_and_trace():
    problem = Softmax.make("it", features=5, classes=3, examples=40, batch_size=7)
    theta = np.random.default_rng(1).normal(size=(2, 4, 15))
    batch = problem.batch(np.random.default_rng(0), 4)
    logits = torch.tensor(batch[0]) @ torch.tensor(theta[1]).view(4, 5, 3)
    for seed in range(4):
        exact = torch.nn.functional.cross_entropy(logits[seed], torch.tensor(batch[1][seed]))
        assert problem.losses(theta, batch)[1, seed] == pytest.approx(float(exact), rel=1e-12)
    x, y = torch.tensor(problem.x), torch.tensor(problem.y)
    full = lambda w: torch.nn.functional.cross_entropy(x @ w.view(5, 3), y)  # noqa: E731
    hessian = torch.autograd.functional.hessian(full, torch.zeros(15, dtype=torch.float64))
    assert problem.trace == pytest.approx(float(hessian.trace()), rel=1e-12)


def test_an_aligned_estimate_is_the_projection_and_nearly_the_average():
    generator = np.random.default_rng(0)
    z, gradient = generator.choice([-1.0, 1.0], size=(4, 1, 9)), generator.normal(size=9)
    estimate = aligned_coefficients((z[:, 0] @ gradient / 4)[None], z)[0] @ z[:, 0]
    basis = np.linalg.qr(z[:, 0].T)[0]
    assert estimate == pytest.approx(basis @ (basis.T @ gradient), rel=1e-10)
    for row in budget.distance_table((400, 6400), draws=60):
        # 60 draws of a mean of 56 products: its relative spread is well below a tenth.
        assert row["distance"] == pytest.approx(row["predicted"], rel=0.1)
        assert row["predicted"] == pytest.approx(math.sqrt(7 / row["d"]))


def test_on_equal_curvatures_runs_get_as_far_as_theory_says():
    r"""The mean loss after T steps at the best rate is (1 - P/(d+P-1))^T, aligned (1 - P/d)^T: z < 4.5, 600 runs."""
    dim, steps = 30, 4
    problem = Quadratic("it", np.ones(dim))
    for count in (1, 3, 10):
        for align, rate, factor in (
            (False, count / (dim + count - 1), 1 - count / (dim + count - 1)),
            (True, 1.0, 1 - count / dim),
        ):
            estimator = TwoPoint(EPS, count)
            forwards = steps * estimator.forwards_at(0)
            decreases = train(problem, estimator, [rate], forwards=forwards, seeds=600, seed=2, align=align)
            losses = np.exp(-decreases[0])
            score = (losses.mean() - factor**steps) / (losses.std() / math.sqrt(600))
            assert abs(score) < 4.5, (count, align)
    assert budget.predicted(problem, "two-point", 10) == pytest.approx(
        math.log(1 - 10 / 39) / 10 / math.log(1 - 1 / 30), rel=1e-12
    )
    assert budget.predicted(problem, "one-sided", 10) > 1 > budget.predicted(problem, "two-point", 10)
    assert budget.predicted(problem, "aligned", 30) == math.inf


def row(problem, scheme, directions, best):
    return {"problem": problem, "scheme": scheme, "P": directions, "best": best, "equal_rate": (0.1, 0.0, 0.2)}


@pytest.mark.parametrize(
    ("two", "one", "average", "align"),
    [
        ((0.8, 0.7, 0.9), (0.8, 0.7, 0.9), "holds", "does not hold"),
        ((0.8, 0.7, 0.9), (1.5, 1.4, 1.6), "holds under conditions", "does not hold"),
        ((1.0, 0.9, 1.1), (1.5, 1.4, 1.6), "does not hold", "not resolved"),
        ((1.0, 0.9, 1.1), (1.0, 0.9, 1.1), "not resolved", "not resolved"),
    ],
)
def test_verdicts_follow_the_intervals(two, one, average, align):
    rows = [row("q", "two-point", 16, two), row("q", "one-sided", 16, one), row("q", "aligned", 16, two)]
    rows += [row("q", scheme, 1, (1.0, 1.0, 1.0)) for scheme in budget.SCHEMES]
    distances = [{"d": 100, "P": 8, "distance": 0.1, "predicted": 0.1}]
    assert budget.judge_average(rows).verdict == average
    assert budget.judge_alignment(rows, distances).verdict == align
    better = [*rows, row("p", "aligned", 4, (1.3, 1.2, 1.4))]
    assert budget.judge_alignment(better, distances).verdict == "holds under conditions"
    assert f"{two[0]:.3f} [{two[1]:.3f}, {two[2]:.3f}]" in budget.judge_average(rows).reason


def test_it_runs_at_smoke_scale(smoke_run):
    record = smoke_run.record("multi_query/budget")
    rows = record["numbers"]["rows"]
    assert len(rows) == 4 * 3 * 3
    row_of = {(r["problem"], r["scheme"], r["P"]): r for r in rows}
    for problem in ("small quadratic", "large quadratic", "power-law quadratic", "softmax regression"):
        # At one nominal rate, averages of more directions take fewer steps of the same length.
        assert row_of[problem, "two-point", 16]["equal_rate"][0] < 0.6
        assert row_of[problem, "two-point", 16]["steps"] == row_of[problem, "two-point", 1]["steps"] // 16
    assert (
        row_of["small quadratic", "two-point", 16]["best"][2] < 1 < row_of["small quadratic", "aligned", 16]["best"][1]
    )
    assert row_of["large quadratic", "one-sided", 16]["best"][1] > 1.3
    assert {verdict["id"] for verdict in record["verdicts"]} == {"multi-query-average", "multi-query-align"}
