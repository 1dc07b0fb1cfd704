"""The plan: unbiased probes, honest uncertainty, agreement with real gradients, and the command."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import mlp

from zokernel.cli import main
from zokernel.commands.plan import PlanArguments, describe, load_task
from zokernel.directions import Dense
from zokernel.errors import RunError, UsageError
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.kernels.plan import make_plan
from zokernel.kernels.plan_verify import exact_moments, gradients, table, verify
from zokernel.kernels.plan_walk import measure_growth, reach, walk_rate
from zokernel.kernels.prober import ProbedTask, Prober
from zokernel.kernels.probes import (
    Measurement,
    Slopes,
    belief_moments,
    fisher_moments,
    gradient_noise,
    jackknife,
    single_draw_variance,
    subset_error,
)
from zokernel.optim import MeZO


def small_task(classes=2, update=6, observe=3, seed=0) -> ProbedTask:
    torch.manual_seed(seed)
    net = mlp((5, 16, classes)).double()
    x = torch.randn(update + observe, 5).double()
    labels = torch.randint(0, classes, (update + observe,))
    return ProbedTask(dict(net.named_parameters()), net, x, labels, update, num_tokens=update + observe)


def true_slopes(task: ProbedTask, count: int, seed: int) -> Slopes:
    """Slopes along Gaussian directions from exact Jacobians."""
    leaves = list(task.params.values())
    scores = task.score(task.batch)
    losses = F.cross_entropy(scores[: task.num_update], task.labels[: task.num_update], reduction="none")
    beliefs = scores[task.num_update :].log_softmax(-1).flatten()

    def rows(values):
        grads = [torch.autograd.grad(value, leaves, retain_graph=True) for value in values]
        return torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])

    jac_losses, jac_beliefs = rows(losses), rows(beliefs)
    logp = scores[: task.num_update].log_softmax(-1)
    weights = (logp.exp() / task.num_update).sqrt().detach().flatten()
    jac_fisher = weights[:, None] * rows(logp.flatten())
    z = torch.randn(count, jac_losses.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    return Slopes(z @ jac_losses.T, z @ jac_beliefs.T, z @ jac_fisher.T)


@pytest.mark.parametrize("classes", [2, 4])
def test_probe_statistics_are_unbiased(classes):
    """Means over 400 sets of 10 probes, against exact gradients, by z-scores."""
    task = small_task(classes)
    rows = gradients(task)
    exact = exact_moments(rows)
    found = [true_slopes(task, 10, seed) for seed in range(400)]
    for name in ("rows_sq", "gradient_sq", "product_sq"):
        values = torch.tensor([getattr(belief_moments(s), name) for s in found])
        z = (values.mean() - getattr(exact, name)) / (values.std() / 20)
        assert abs(z) < 4, name
    for name, expected in (("rows_sq", rows.fisher_trace), ("product_sq", rows.fisher_along)):
        values = torch.tensor([getattr(fisher_moments(s), name) for s in found])
        assert abs(values.mean() - expected) / (values.std() / 20) < 4, name
    spread = torch.tensor([gradient_noise(s)[0] for s in found])
    assert abs(spread.mean() - rows.spread) / (spread.std() / 20) < 4
    signal = torch.tensor([gradient_noise(s)[1] for s in found])
    expected = exact.gradient_sq - rows.spread / task.num_update
    assert abs(signal.mean() - expected) / (signal.std() / 20) < 4


def test_exact_moments_are_those_of_dense_matrices():
    task = small_task(4)
    rows = gradients(task)
    flat = torch.cat([part.flatten(1) for part in rows.differences.values()], dim=1)
    g = torch.cat([part.flatten() for part in rows.gradient.values()])
    matrix = rows.to_beliefs(flat.T).T
    exact = exact_moments(rows)
    assert exact.rows_sq == pytest.approx(matrix.square().sum().item())
    assert exact.product_sq == pytest.approx((matrix @ g).square().sum().item())
    assert exact.diagonal == pytest.approx((matrix.square().sum(0) @ g.square()).item())
    # the rows are gradients of log-probabilities: compare one with autograd
    logp = task.score(task.batch)[task.num_update :].log_softmax(-1).flatten()[5]
    expected = torch.cat([p.flatten() for p in torch.autograd.grad(logp, list(task.params.values()))])
    torch.testing.assert_close(matrix[5], expected, rtol=1e-5, atol=1e-7)


def test_jackknife_is_calibrated():
    """The standard error that one plan states is the spread over plans, to 25%."""
    task = small_task()
    estimates = [jackknife(true_slopes(task, 40, s), lambda p: math.sqrt(single_draw_variance(p))) for s in range(150)]
    spread = torch.tensor([e.value for e in estimates]).std().item()
    stated = torch.tensor([e.error for e in estimates]).median().item()
    assert stated == pytest.approx(spread, rel=0.3)
    assert not math.isfinite(jackknife(Slopes(*torch.randn(3, 3, 2)), lambda p: math.inf).error)


def test_subset_error_is_the_average_over_subsets():
    from itertools import combinations

    e = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    for size in (1, 2, 4):
        squares = [e[list(s)].mean(0).square().sum() for s in combinations(range(6), size)]
        assert subset_error(e, size) == pytest.approx(math.sqrt(torch.stack(squares).mean()))


def test_plan_against_real_gradients():
    """Every prediction within four of its own standard errors (and 20%) of the truth, on a small network."""
    task = small_task(update=8, observe=4)
    before = {name: p.detach().clone() for name, p in task.params.items()}
    plan = make_plan(task, num_probes=300, eps=1e-3, counts=(1, 10, 100), tolerances=(0.5,))
    found = {c.quantity: c for c in verify(task, plan, num_draws=400)}
    assert all(torch.equal(before[name], p) for name, p in task.params.items())
    for count in (1, 10, 100):
        for source in ("exact formula", "400 fresh directions"):
            comparison = found[f"relative error at P = {count}, {source}"]
            assert comparison.ratio == pytest.approx(1, abs=0.2), comparison
    for name in (
        "rho",
        "gradient norm",
        "trace of the Fisher matrix",
        "curvature ratio r",
        "eta_zo / eta_fo at P = 10",
    ):
        comparison = found[name]
        assert abs(comparison.predicted - comparison.measured) < 4 * comparison.error, comparison
    assert plan.required[0.5] == math.ceil(plan.relative_error_one.value**2 / 0.25)
    assert "relative error at P = 10, exact formula" in table(list(found.values()))
    # two a probe, eight for the noise, four for each of 3 + 8 directions, one at the centre, the rest for eight walks
    distances, rest = divmod(plan.forwards - (2 * 300 + 8 + 4 * 11 + 1), 2 * 8)
    assert rest == 0
    assert 2 <= distances <= 12
    assert plan.tokens == plan.forwards * task.num_tokens


def test_the_best_step_follows_from_noise_and_curvature_or_is_not_known():
    task = small_task(update=8, observe=4)
    plan = make_plan(task, num_probes=100, eps=1e-3)
    known = replace(plan, noise_scale=Measurement(5.5, 0.5), curvature_ratio=Measurement(50.0, 5.0))
    found = known.best_step(16)
    # Decrease per forward: 1/Q with Q = 1 + s nu + (1 + nu) (1 + r) / (B P) and s = 1/16, over that of MeZO.
    share = 1 + 5.5 / 16
    reference = 2 * (2 * share + 50 * share)
    gains = {p: reference / ((1 + p) * (share + (6.5 + 50 * 6.5) / (16 * p))) for p in (1, 2, 4, 8, 16, 32)}
    best = max(gains, key=gains.get)
    assert (found.scheme, found.num_perturbations, found.one_sided) == ("per_example", best, True)
    assert found.gain == pytest.approx(gains[best])
    assert f"at batch 16: {best} directions per example, one-sided, {best + 1} forwards" in describe(known, task, 1.0)
    assert known.as_dict()["best_step"][16]["gain"] == pytest.approx(gains[best])
    for lost in ({"noise_scale": Measurement(5.5, math.inf)}, {"curvature_ratio": Measurement(-3.0, 4.0)}):
        unknown = replace(known, **lost)
        assert unknown.best_step(16) is None
        assert unknown.as_dict()["best_step"][16] is None
        assert "The best step at batch 16 is not known" in describe(unknown, task, 1.0)


def test_curvature_and_learning_rates_on_a_quadratic():
    """Scores linear in the weights and a loss close to quadratic: tr H and g'Hg have known values."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter(0.01 * torch.randn(12, 2).double())
    x, labels = torch.randn(40, 12).double(), torch.randint(0, 2, (40,))
    task = ProbedTask({"w": weights}, lambda inputs: inputs @ weights, x, labels, 36, 40)
    plan = make_plan(task, num_probes=400, eps=1e-2, counts=(1, 10))

    def loss(w):
        return F.cross_entropy(x[:36] @ w, labels[:36])

    hessian = torch.autograd.functional.hessian(loss, weights.detach()).reshape(24, 24)
    g = torch.autograd.grad(loss(weights), weights)[0].flatten()
    trace, along = hessian.trace().item(), (g @ hessian @ g).item()
    assert abs(plan.trace_hessian.value - trace) < 4 * plan.trace_hessian.error
    # for scores linear in the weights the Fisher matrix is the Hessian
    rows = gradients(task)
    assert rows.fisher_trace == pytest.approx(trace, rel=1e-6)
    assert rows.fisher_along == pytest.approx(along, rel=1e-6)
    assert abs(plan.trace_fisher.value - trace) < 4 * plan.trace_fisher.error
    ratio = trace * (g @ g).item() / along
    assert abs(plan.curvature_ratio.value - ratio) < 4 * plan.curvature_ratio.error
    best = {p: (g @ g).item() * p / ((p + 1) * along + (g @ g).item() * trace) for p in (1, 10)}
    for count, rate in plan.learning_rate.items():
        assert abs(rate.value - best[count]) < 4 * rate.error


def test_best_eps_balances_noise_and_bias():
    """A loss with known rounding noise and third derivative: eps from the plan is that of the closed form."""
    weights = torch.nn.Parameter(torch.zeros(1).double())
    generator = torch.Generator().manual_seed(0)

    def score(inputs):
        steep = 2 * weights + weights**3 / 3
        noise = 1e-7 * torch.randn(1, generator=generator).double()
        return torch.stack([torch.zeros(len(inputs)).double(), (steep + noise).expand(len(inputs))], 1)

    task = ProbedTask({"w": weights}, score, torch.zeros(4, 1), torch.tensor([0, 0, 1, 1]), 3, 4)
    plan = make_plan(task, num_probes=24, eps=5e-2)
    assert plan.loss_noise == pytest.approx(1e-7 / 6, rel=0.7)  # the mean residual is (2 - 1) / 3 * 1 / 2
    assert 1e-3 < plan.eps.value < 5e-2
    assert plan.finite_difference_error < 1e-3


def test_weights_return_after_an_error():
    task = small_task()
    before = {name: p.detach().clone() for name, p in task.params.items()}
    broken = ProbedTask(task.params, lambda x: torch.full((9, 2), float("nan")), task.batch, task.labels, 6, 9)
    with pytest.raises(RunError, match="NaN or infinite"), Prober(broken) as prober:
        prober.evaluate([0.1], [0])
    assert all(torch.equal(before[name], p) for name, p in task.params.items())


def test_probes_are_the_directions_of_training():
    task = small_task()
    with Prober(task, "rademacher", seed=7) as prober:
        above, below = (prober.evaluate([s * 1e-4], [2]) for s in (1, -1))
    z = Dense("rademacher")({n: p.detach() for n, p in task.params.items()}, seed=7, step=0, index=2)
    leaves = list(task.params.values())
    losses = F.cross_entropy(task.score(task.batch)[:6], task.labels[:6])
    exact = sum((g * z[n]).sum() for n, g in zip(task.params, torch.autograd.grad(losses, leaves), strict=True))
    slope = (above.losses_B - below.losses_B).mean().item() / 2e-4
    assert slope == pytest.approx(exact.item(), rel=1e-3)


def test_refusals():
    with pytest.raises(UsageError, match="too few"):
        make_plan(small_task(), num_probes=4)
    with pytest.raises(UsageError, match="at least two examples"):
        make_plan(small_task(update=1))


def nearly_unrelated_task() -> ProbedTask:
    """A linear model whose observed inputs share little with those it is trained on: rho is small."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.zeros(30, 2).double())
    x = torch.zeros(8, 30).double()
    x[:6, :10] = torch.randn(6, 10, generator=generator).double()
    x[6:, 10:] = torch.randn(2, 20, generator=generator).double()
    x[6:] += 0.7 * x[:2]
    return ProbedTask({"w": weights}, lambda inputs: inputs @ weights, x, torch.tensor([0, 1] * 4), 6, 8)


def test_few_probes_give_no_number_that_they_do_not_carry():
    """With 8 probes rho is lost in their noise; with as many as it takes it is known, and right."""
    task, unknown = nearly_unrelated_task(), 0
    for seed in range(10):
        plan = make_plan(task, num_probes=8, seed=seed, tolerances=(0.1,))
        shown, text = plan.as_dict(), describe(plan, task, 1.0)
        for name in ("rho", "relative_error_one", "curvature_ratio", "noise_scale", "trace_hessian", "eps"):
            value = getattr(plan, name)
            carried = math.isfinite(value.error) and value.error <= abs(value.value)
            assert (shown[name] is not None) == carried, name
        json.dumps(shown, allow_nan=False)
        assert "inf" not in text
        assert "nan" not in text
        if shown["relative_error_one"] is None:
            unknown += 1
            assert plan.probes_needed()["relative_error_one"] >= 4 * 8
            assert "relative error of one step      not known from 8 probes; about" in text
            assert re.search(r"from 8 probes; about ([\d,]+) would be needed \(--num_probes \d+\)", text)
            assert " gives a relative error" not in text
    assert unknown >= 3
    rho = exact_moments(gradients(task)).rho
    found = make_plan(task, num_probes=800).rho
    assert found.known
    assert abs(found.value - rho) < 4 * found.error


@pytest.mark.parametrize(
    ("value", "error", "known", "needed"),
    [
        (1.17, 0.2, True, 64),
        (1.17, math.inf, False, 64),
        (math.inf, math.inf, False, 64),
        (-2.0, 3.0, False, 150),
        (0.0, 0.1, False, 64),
        (6.11, 6.12, False, 65),
    ],
)
def test_what_counts_as_known(value, error, known, needed):
    """An error of 1.5 times the estimate is half of it with (2 * 1.5)^2 times the 16 probes: 144."""
    found = Measurement(value, error)
    assert (found.known, found.probes_needed(16)) == (known, needed)


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
    long = make_plan(task, num_probes=400, eps=1e-3, counts=(1, 4), num_steps=10_000, curvature_probes=100)
    assert expected - 4 * long.reach.error < long.reach.value < 1.2 * expected + 4 * long.reach.error
    assert long.reach.error < 0.15 * expected
    for count, rate in long.run_rate.items():
        analytic = expected * math.sqrt(count / (4 * 10_000 * math.log(4))) / g.norm().item()
        assert analytic - 4 * rate.error < rate.value < 1.2 * analytic + 4 * rate.error
        assert rate.error < 0.2 * analytic
    short = make_plan(task, num_probes=400, eps=1e-3, counts=(1,), num_steps=20, curvature_probes=100)
    assert short.run_rate[1].value == pytest.approx(1 / h.sum().item(), rel=0.05)
    assert short.reach == long.reach


@pytest.mark.parametrize("first", [1e-3, 1e-2, 1.0])
def test_reach_is_found_from_either_side(first):
    """Slopes of exactly exp(R^2 / 2 * 50): they double at sqrt(ln 4 / 50), whatever distance is tried first."""

    class Radial:
        def loss(self, scales, indices):
            return scales[1] * math.exp(25 * scales[0] ** 2)

    growth = measure_growth(Radial(), 1.0, first / 4, 3)
    assert reach(growth) == pytest.approx(math.sqrt(math.log(4) / 50), rel=1e-9)
    assert jackknife(growth, reach).error == pytest.approx(0, abs=1e-12)


def test_a_loss_that_is_not_finite_far_away_bounds_the_reach():
    """Slopes stay as they are up to 0.2; beyond, scores overflow."""

    class Cliff:
        def loss(self, scales, indices):
            if scales[0] > 0.2:
                raise RunError("A score is NaN or infinite.")
            return scales[1]

    assert 0.14 < reach(measure_growth(Cliff(), 1.0, 1e-2, 3)) <= 0.2


def test_the_advised_walk_keeps_its_distance_from_growth_without_bound():
    """A walk of slopes s^2 = s_0^2 exp(a R^2): s grows by sqrt(4/3) at the advised rate, without bound at twice."""
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

    assert final_slope(rate) == pytest.approx(math.sqrt(4 / 3), rel=1e-3)
    assert final_slope(1.9 * rate) < 4
    assert final_slope(2.1 * rate) == math.inf
    four = walk_rate(distance, Measurement(start, 0.0), num_perturbations=4, num_steps=4 * steps).value
    assert four == pytest.approx(rate)


def test_slopes_that_do_not_grow_leave_the_rate_of_one_step():
    g = torch.linspace(0.01, 0.02, 50).double()
    plan = make_plan(task_of_loss(lambda w: 8 + g @ w, 50), num_probes=64, counts=(1,))
    assert math.isinf(plan.reach.value)
    assert plan.run_rate[1].value == pytest.approx(plan.learning_rate[1].value) or not plan.run_rate[1].known
    text = describe(plan, small_task(), 1.0)
    assert "distance where slopes double    they do not" in text
    assert "inf" not in text


def test_one_walk_gives_no_rate_but_says_how_many_would():
    task = small_task(update=8, observe=2)
    plan = make_plan(task, num_probes=64, counts=(1,), curvature_probes=1, num_steps=10**6)
    assert math.isfinite(plan.reach.value)
    assert not plan.run_rate[1].known
    assert plan.as_dict()["run_rate"][1] is None
    assert (
        "No learning rate is advised: how far noise may take the weights is not known from 1 curvature probe; about 4 "
        "would be needed (--curvature_probes 4)."
    ) in describe(plan, task, 1.0)


def test_a_plan_says_which_probes_were_too_few_and_takes_as_many_as_are_asked_for():
    """The trace of the Hessian comes from the curvature probes, of which there may be more than probes of slopes."""
    task = small_task(update=8, observe=2)
    plan = make_plan(task, num_probes=64, counts=(1,))
    unknown = replace(plan, trace_hessian=Measurement(1.0, 9.0), gradient_norm=Measurement(1.0, 2.0))
    text = describe(unknown, task, 1.0)
    assert (
        "trace of the Hessian            not known from 8 curvature probes; about 2,600 would be needed "
        "(--curvature_probes 2600)"
    ) in text
    assert "gradient norm                   not known from 64 probes; about 1,100 would be needed (--num_probes" in text
    more = make_plan(task, num_probes=8, counts=(1,), curvature_probes=40)
    assert (more.num_probes, more.num_curvature_probes) == (8, 40)
    assert more.trace_hessian.error < plan.trace_hessian.error


@pytest.mark.parametrize("lora", [False, True])
def test_advice_can_be_followed(lora, tiny_lm_path, tiny_reviews_path):
    """Training with the advised rate lowers the loss of all examples."""
    model = ModelArguments(model_name_or_path=str(tiny_lm_path), lora=lora)
    data = DataArguments(
        train_file=str(tiny_reviews_path / "train.jsonl"), template="{sentence} It was", label_words=["bad", "good"]
    )
    task, _ = load_task(model, data, PlanArguments(update_examples=24, observe_examples=4, precision="fp32"))
    eps, steps = 1e-2 if lora else 1e-3, 60
    plan = make_plan(task, num_probes=48, eps=eps, counts=(1,), num_steps=steps)
    rate = plan.run_rate[1]
    assert rate.known
    assert lora or rate.value < plan.learning_rate[1].value / 3  # slopes of this adapter do not grow

    def loss(rows=slice(24)):
        return F.cross_entropy(task.score({k: v[rows] for k, v in task.batch.items()}), task.labels[rows])

    with torch.no_grad():
        before = loss().item()
        optimizer = MeZO(list(task.params.items()), lr=rate.value, eps=eps, perturb="in_place:copy")
        for step in range(steps):
            rows = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:8]
            optimizer.step(lambda: loss(rows))  # noqa: B023
        assert loss().item() < before


def test_command(tiny_lm_path, tiny_reviews_path, tmp_path, capsys):
    out = tmp_path / "plan.json"
    flags = ["--model_name_or_path", str(tiny_lm_path), "--train_file", str(tiny_reviews_path / "train.jsonl")]
    flags += ["--num_probes", "12", "--update_examples", "4", "--observe_examples", "2", "--output_file", str(out)]
    assert main(["plan", *flags, "--verify", "true", "--verify_draws", "20"]) == 0
    text = capsys.readouterr().out
    assert "no gradient" in text
    assert "Against real gradients" in text
    record = json.loads(out.read_text())
    assert record["plan"]["num_probes"] == 12
    assert record["plan"]["num_steps"] == 1000
    assert "Infinity" not in out.read_text()
    assert "NaN" not in out.read_text()
    assert main(["plan", *flags, "--max_steps", "0"]) == 2
    assert "--max_steps must be at least 1" in capsys.readouterr().err
    assert any(row["quantity"] == "rho" for row in record["verify"])
    assert main(["plan", *flags, "--eps", "-1"]) == 2
    assert "--eps must be above 0" in capsys.readouterr().err
    assert main(["plan", "--num_probe", "3"]) == 2
    assert "There is no flag" in capsys.readouterr().err
