"""What every registered method must do, whatever it is: one table, one test a promise."""

from __future__ import annotations

import copy
import inspect
import io
import math
import random

import numpy as np
import pytest
import torch
from method_cases import CASES, SETTINGS
from torch import nn

from zokernel.errors import RunError, UsageError
from zokernel.optim import get_method, methods

ZEROTH_ORDER = [case for case, (name, _) in CASES.items() if name not in ("sgd", "adamw")]
every_case = pytest.mark.parametrize("case", list(CASES))
every_zeroth_order = pytest.mark.parametrize("case", ZEROTH_ORDER)


class Problem:
    """A small loss in named parameters of several shapes."""

    def __init__(self, kind: str = "quadratic", dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)
        if kind == "quadratic":
            self.params = {
                "a": nn.Parameter(torch.ones(3, 2, dtype=dtype)),
                "b": nn.Parameter(torch.ones(4, dtype=dtype)),
            }
            scales = torch.linspace(0.5, 2.0, 10)

            def loss():
                flat = torch.cat([p.reshape(-1).float() for p in self.params.values()])
                return 0.5 * (scales * flat.square()).sum()
        else:
            x = torch.randn(64, 6, generator=generator)
            y = (x @ torch.linspace(-1, 1, 6) + 2.0 * torch.randn(64, generator=generator) > 0).float()
            self.params = {"w": nn.Parameter(torch.zeros(6)), "bias": nn.Parameter(torch.zeros(1))}

            def loss():
                logits = x @ self.params["w"] + self.params["bias"]
                return nn.functional.binary_cross_entropy_with_logits(logits, y)

        self.loss = loss

    def optimizer(self, case: str, lr: float | None = None, groups: list | None = None, **overrides):
        name, (rate, logistic_rate, options) = CASES[case]
        lr = lr if lr is not None else (rate if "a" in self.params else logistic_rate)
        return get_method(name)(groups or list(self.params.items()), lr=lr, **(options | overrides))

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1).clone() for p in self.params.values()])


def test_the_table_covers_every_method():
    assert set(SETTINGS) == set(methods())


@every_case
def test_converges_on_a_quadratic(case):
    problem = Problem()
    optimizer = problem.optimizer(case)
    start = float(problem.loss().detach())
    for _ in range(160):
        optimizer.step(problem.loss)
    # Sign and Adam steps have a fixed length, so they end in a ball around the optimum: 10 (3e-3)^2 and the like.
    assert float(problem.loss().detach()) < 0.02 * start


@every_case
def test_converges_on_logistic_regression(case):
    exact = Problem("logistic")
    newton = torch.optim.LBFGS(list(exact.params.values()), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        newton.zero_grad()
        loss = exact.loss()
        loss.backward()
        return loss

    newton.step(closure)
    best, start = float(exact.loss().detach()), math.log(2)
    problem = Problem("logistic")
    optimizer = problem.optimizer(case)
    for _ in range(160):
        optimizer.step(problem.loss)
    assert best <= float(problem.loss().detach()) < best + 0.15 * (start - best)


@every_case
def test_is_deterministic_given_a_seed(case):
    def run(seed):
        problem = Problem()
        optimizer = problem.optimizer(case, **({} if case in ("sgd", "adamw") else {"seed": seed}))
        losses = [optimizer.step(problem.loss) for _ in range(4)]
        return losses, problem.weights()

    first, second, other = run(1), run(1), run(2)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    if case not in ("sgd", "adamw"):
        assert not torch.equal(first[1], other[1])


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESUMED = [(case, dtype) for case in CASES for dtype in DTYPES if (case, dtype) != ("kerzoo_md_int8", "bf16")]


@pytest.mark.parametrize(("case", "dtype"), RESUMED)
def test_resumes_bit_identically(case, dtype):
    """Weights and optimizer state go through a file in the middle of a run, and nothing changes."""
    low, dtype = dtype == "bf16", DTYPES[dtype]
    options = {"perturb": "in_place:copy"} if low and case in ZEROTH_ORDER else {}

    def fresh():
        problem = Problem(dtype=dtype)
        return problem, problem.optimizer(case, **options)

    straight, optimizer = fresh()
    for _ in range(9):
        optimizer.step(straight.loss)

    first, optimizer = fresh()
    for _ in range(5):
        optimizer.step(first.loss)
    file = io.BytesIO()
    torch.save({"weights": first.params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    second, resumed = fresh()
    with torch.no_grad():
        for name, value in saved["weights"].items():
            second.params[name].copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(4):
        resumed.step(second.loss)
    assert torch.equal(second.weights(), straight.weights())
    for old, new in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert {k: getattr(v, "dtype", None) for k, v in old.items()} == {
            k: getattr(v, "dtype", None) for k, v in new.items()
        }
    if getattr(resumed, "averaging", "none") != "none":
        assert resumed.num_forwards == 9 * resumed.forwards_per_step


@every_case
def test_calls_the_closure_as_often_as_declared(case):
    problem = Problem()
    optimizer = problem.optimizer(case)
    total = 0
    for _ in range(3):
        expected, calls = optimizer.forwards_per_step, []
        optimizer.step(lambda: calls.append(1) or problem.loss())  # noqa: B023
        assert len(calls) == expected
        total += expected
    assert optimizer.num_forwards == total


@every_case
def test_leaves_the_users_random_state_alone(case):
    problem = Problem()
    optimizer = problem.optimizer(case)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in range(3):
        optimizer.step(problem.loss)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


@pytest.mark.parametrize("perturb", ["in_place:copy", "in_place:grid", "in_place"])
@every_zeroth_order
def test_a_step_of_length_zero_gives_the_weights_back(case, perturb):
    problem = Problem()
    if perturb == "in_place:grid" and not problem.optimizer(case).moves_along_directions:
        with pytest.raises(UsageError, match="grid"):
            problem.optimizer(case, perturb=perturb)
        return
    optimizer = problem.optimizer(case, lr=0.0, perturb=perturb)
    before = problem.weights()
    for _ in range(3):
        optimizer.step(problem.loss)
    if perturb == "in_place":
        # At most 10 sweeps per step, each of which rounds weights near one by half an ulp, 6e-8.
        assert torch.allclose(problem.weights(), before, rtol=0, atol=3 * 10 * 6e-8)
    else:
        assert torch.equal(problem.weights(), before)


@every_zeroth_order
def test_a_failed_step_restores_the_weights_and_says_so(case):
    problem = Problem()
    optimizer = problem.optimizer(case, perturb="in_place:copy")
    optimizer.step(problem.loss)
    before, saved = problem.weights(), copy.deepcopy(optimizer.state_dict())
    calls = []

    def breaks_on_the_second_call():
        calls.append(1)
        return problem.loss() * (float("nan") if len(calls) >= min(2, optimizer.forwards_per_step) else 1.0)

    with pytest.raises(RunError, match="put back"):
        optimizer.step(breaks_on_the_second_call)
    tolerance = 1e-6 if case == "kerzoo_md_int8" else 0.0
    assert torch.allclose(problem.weights(), before, rtol=0, atol=tolerance)
    assert optimizer.step_count == saved["zeroth_order"]["step"]
    assert math.isfinite(optimizer.step(problem.loss))


@every_case
def test_learning_rate_schedules_and_groups(case):
    problem = Problem()
    groups = [
        {"params": [("a", problem.params["a"])]},
        {"params": [("b", problem.params["b"])], "lr": 0.0},
    ]
    options = {"perturb": "in_place:copy"} if case in ZEROTH_ORDER else {}
    optimizer = problem.optimizer(case, groups=groups, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    start = problem.weights()
    for _ in range(2):
        optimizer.step(problem.loss)
        scheduler.step()
    after = problem.weights()
    assert (after[:6] != start[:6]).any()
    assert torch.equal(after[6:], start[6:])
    optimizer.step(problem.loss)
    assert torch.equal(problem.weights(), after)
    assert optimizer.effective_lr() == 0.0


@pytest.mark.parametrize("case", [case for case in CASES if case != "kerzoo_clip"])  # which projects besides
def test_weight_decay_is_decoupled_and_by_group(case):
    """On a flat loss, a step multiplies decaying weights by 1 - lr * decay and leaves the others."""
    problem = Problem()
    groups = [
        {"params": [("a", problem.params["a"])], "weight_decay": 0.5},
        {"params": [("b", problem.params["b"])], "weight_decay": 0.0},
    ]
    optimizer = problem.optimizer(case, lr=0.1, groups=groups)
    for _ in range(3):
        optimizer.step(lambda: 0.0 * problem.loss())
    assert torch.allclose(problem.params["a"], torch.tensor(0.95**3), rtol=1e-6)
    assert torch.allclose(problem.params["b"], torch.tensor(1.0), rtol=1e-6)


@every_case
def test_micro_batches_accumulate_in_the_closure(case):
    """The mean of the losses of micro-batches is the loss of the batch, so the step is the same up to round-off."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def run(parts):
        weight = nn.Parameter(torch.ones(4))
        name, (_, _, options) = CASES[case]
        options = options | ({"eps": 0.1} if "eps" in inspect.signature(get_method(name)).parameters else {})
        optimizer = get_method(name)([("w", weight)], lr=0.01, **options)
        for _ in range(3):
            optimizer.step(lambda: sum((part @ weight).square().mean() for part in x.chunk(parts)) / parts)
        return weight.detach()

    assert torch.allclose(run(1), run(4), atol=2e-4)


@pytest.mark.parametrize("case", [case for case in ZEROTH_ORDER if not case.startswith(("kerzoo_", "es_ranks"))])
def test_mean_estimate_is_the_gain_times_the_gradient(case):
    """On a linear loss: each coordinate's mean over n steps, |z| < 4.5 against its standard error (150 scores)."""
    slope = {"a": torch.linspace(-1, 1, 6).reshape(3, 2), "b": torch.linspace(0.5, 2, 4)}
    problem = Problem()
    options = {"refresh": 1} if "refresh" in CASES[case][1][2] else {}
    options |= {"angle": math.pi / 2} if "angle" in CASES[case][1][2] else {}  # a cone that is the whole space
    optimizer = problem.optimizer(case, lr=0.0, **options)
    fresh = {name: torch.zeros_like(p) for name, p in problem.params.items()}

    def linear():
        return sum((p * slope[name]).sum(dtype=torch.float64) for name, p in problem.params.items())

    samples = []
    for _ in range(200):
        for tensor in fresh.values():
            tensor.zero_()
        normalizes = getattr(optimizer.estimator, "normalize", False)
        gain = 1.0 if normalizes else optimizer.estimator.gain_at(optimizer.step_count)
        optimizer.step(linear)
        estimate = optimizer.last_estimate
        optimizer.step_count -= 1
        optimizer.add_estimate(fresh, estimate)
        optimizer.step_count += 1
        # A normalised estimate has a random gain; undone, it is the plain one-sided estimate.
        undo = estimate.loss_std / optimizer.estimator.eps if estimate.loss_std else 1.0
        samples.append(torch.cat([t.reshape(-1) for t in fresh.values()]).double() * undo)
    samples = torch.stack(samples)
    exact = gain * torch.cat([s.reshape(-1) for s in slope.values()]).double()
    scores = (samples.mean(0) - exact) / (samples.std(0) / math.sqrt(len(samples)))
    assert scores.abs().max() < 4.5


@every_zeroth_order
def test_changes_made_by_others_are_respected(case):
    """Weights loaded between steps are the ones that the next step starts from, also when a copy was kept."""
    problem = Problem()
    optimizer = problem.optimizer(case, lr=0.0, perturb="in_place:copy")
    optimizer.step(problem.loss)
    with torch.no_grad():
        for tensor in problem.params.values():
            tensor.fill_(7.0)
    optimizer.step(problem.loss)
    assert (problem.weights() == 7.0).all()


@every_zeroth_order
def test_needs_a_closure(case):
    optimizer = Problem().optimizer(case)
    with pytest.raises(UsageError, match="closure"):
        optimizer.step()


@every_zeroth_order
def test_bf16_weights_train(case):
    """Updates far below a bf16 ulp (4e-3 at one) must add up: stochastic rounding keeps them on average."""
    if case in ("kerzoo_md_int8",):
        with pytest.raises(UsageError, match="fp32"):
            Problem(dtype=torch.bfloat16).optimizer(case, perturb="in_place:copy")
        return
    problem = Problem(dtype=torch.bfloat16)
    options = {} if case == "forward_gradient" else {"eps": 0.05}
    if "estimator" in CASES[case][1][2]:
        options = {"estimator": CASES[case][1][2]["estimator"].replace("1e-3", "0.05")}
    optimizer = problem.optimizer(case, perturb="in_place:copy", **options)
    start = float(problem.loss().detach())
    for _ in range(100):
        optimizer.step(problem.loss)
    assert float(problem.loss().detach()) < 0.3 * start
    assert all(p.dtype == torch.bfloat16 for p in problem.params.values())


def test_default_settings_are_refused_for_bf16_with_the_remedy():
    with pytest.raises(UsageError, match="in_place:copy"):
        Problem(dtype=torch.bfloat16).optimizer("mezo")


@every_case
def test_trains_a_lora_adapter_and_nothing_else(case):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    )
    x, y = torch.randn(16, 5), torch.randn(16, 1)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    name, (rate, _, options) = CASES[case]
    optimizer = get_method(name)(model, lr=rate / 2, **options)
    assert set(optimizer.named_params) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in n for n in optimizer.named_params)
    loss = lambda: (model(x) - y).square().mean()  # noqa: E731
    start = float(loss().detach())
    for _ in range(60):
        optimizer.step(loss)
    assert float(loss().detach()) < start
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in frozen.items())
