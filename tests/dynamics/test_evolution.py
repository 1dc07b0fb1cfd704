"""Closed forms in function space against step-by-step iteration, the published targets and simulated runs."""

import math

import numpy as np
import pytest
import torch

from zokernel.dynamics import (
    Evolution,
    dense_path,
    gradient_descent,
    query_budget,
    simulate,
    spectral_path,
    steps_to_reach,
    zo_descent,
)
from zokernel.dynamics.checks import as_vector
from zokernel.errors import UsageError
from zokernel.experiments.nzk.problems import linear_problem
from zokernel.theory import expected_nzk, process_moments, stability_limit_of_features
from zokernel.theory.checks import as_kernel
from zokernel.theory.nzk_moments import ProcessMoments

# The runs of the public code of Zhang et al. (2026), arXiv:2603.21169: loss at t = 0, 100, 1000, 4000, last, eta = 1e-3
TARGETS = {
    "d=2": (
        2,
        1 / 20,
        15_999,
        (12.808, 10.849, 2.564, 0.1558, 0.00576),
        (12.808, 6.622, 0.1556, 0.00576, 0.00125),
    ),
    "d=30": (30, 0.0, 7_999, (274.42, 236.0, 61.15, 1.539, 0.817), (274.42, 2.948, 0.476, 0.0871, 0.0204)),
}


def problem(n=7, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    f0 = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, y, f0


@pytest.mark.parametrize("name", TARGETS)
def test_published_targets_to_one_percent(name):
    d, noise, last, first_order, shared = TARGETS[name]
    data = linear_problem(d, noise)
    steps = [0, 100, 1000, 4000, last]
    kernel = data.features @ data.features.T
    for matrix, targets in ((kernel, first_order), (expected_nzk(data.features), shared)):
        losses = Evolution(data.f0, data.y, matrix, 1e-3).mean_loss(steps)
        np.testing.assert_allclose(losses, targets, rtol=0.01)


def test_the_nzk_curve_is_the_ntk_curve_with_time_multiplied_by_c():
    data = linear_problem(2, 1 / 20)
    kernel, steps = data.features @ data.features.T, torch.tensor([1, 10, 100, 1000, 3999])
    first = Evolution(data.f0, data.y, kernel, 1e-3).mean_loss(4 * steps)
    zeroth = Evolution(data.f0, data.y, 4 * kernel, 1e-3).mean_loss(steps)
    # (1 - eta l)^(4t) and (1 - 4 eta l)^t agree to 6 t (eta l)^2 relative in the residual, l <= 1
    np.testing.assert_allclose(zeroth, first, rtol=5e-3)


def test_gradient_descent_is_the_iteration():
    x, y, f0 = problem()
    kernel, f, lr = x @ x.T, f0.clone(), 0.1
    for _ in range(50):
        f = f - lr / len(y) * kernel @ (f - y)
    torch.testing.assert_close(gradient_descent(f0, y, kernel, lr, 50), f)
    path = gradient_descent(f0, y, kernel, lr, [0, 50])
    torch.testing.assert_close(path, torch.stack([f0, f]))


def test_gradient_descent_of_several_outputs():
    """(n, V) predictions with an (n, V, n, V) kernel: the loss divides by examples, not by outputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 9, generator=generator, dtype=torch.float64)
    y, f0 = torch.zeros(4, 3, dtype=torch.float64), torch.randn(4, 3, generator=generator, dtype=torch.float64)
    theta, lr = torch.zeros(9, dtype=torch.float64), 0.05
    for _ in range(20):
        theta = theta - lr * torch.einsum("nvd,nv->d", x, f0 + x @ theta - y) / 4
    kernel = torch.einsum("nvd,mwd->nvmw", x, x)
    torch.testing.assert_close(gradient_descent(f0, y, kernel, lr, 20), f0 + x @ theta)


@pytest.mark.parametrize("coupling", ["zo_sgd", "shared", "independent"])
@pytest.mark.parametrize("perturbations", [1, 4])
def test_closed_form_is_the_recursion(coupling, perturbations):
    x, y, f0 = problem()
    limit = stability_limit_of_features(x, perturbations, coupling, distribution="gaussian")
    moments = process_moments("gaussian", 5, coupling)
    run = Evolution(f0, y, x @ x.T, 0.4 * limit, moments=moments, num_perturbations=perturbations)
    squares, values = run.residual_R.square().numpy(), run.eigenvalues.numpy()
    path = np.array(list(spectral_path(squares, values, 0.4 * limit, moments, perturbations, steps=300)))
    np.testing.assert_allclose(run.expected_loss(range(301)), run.floor + path.sum(1) / 14, rtol=1e-9)


def brute_force(x, y, f0, lr, perturbations, moments, steps):
    """The recursion of docs/theory.md, "Second moment", in function space, straight from its matrices."""
    n, kernel = len(y), x @ x.T
    e = f0 - y
    c, p = torch.outer(e, e), perturbations
    for _ in range(steps):
        q = x.T @ c @ x
        spread = (
            moments.outer * q
            + moments.trace * q.trace() * torch.eye(len(q)).double()
            + moments.diagonal * torch.diag(q.diagonal())
        )
        noise = (1 - 1 / p) * moments.mean**2 * kernel @ c @ kernel + x @ spread @ x.T / p
        c = c - lr / n * moments.mean * (kernel @ c + c @ kernel) + (lr / n) ** 2 * noise
    return c


def test_numbers_keep_their_precision_whatever_the_default_dtype():
    """Lists become float64 at once, not float32 first."""
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            assert as_vector([0.1, 0.2], "values").tolist() == [0.1, 0.2]
            assert as_kernel([[0.1]], 1).tolist() == [[0.1]]
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("distribution", ["gaussian", "sphere", "rademacher", "laplace"])
@pytest.mark.parametrize("coupling", ["zo_sgd", "shared", "independent"])
def test_variance_of_every_prediction(distribution, coupling):
    x, y, f0 = problem()
    moments = process_moments(distribution, 5, coupling)
    lr = 0.3 * stability_limit_of_features(x, 2, coupling, distribution=distribution)
    run = Evolution(f0, y, x @ x.T, lr, moments=moments, num_perturbations=2, features=x)
    for steps in (0, 1, 40):
        c = brute_force(x, y, f0, lr, 2, moments, steps)
        torch.testing.assert_close(run.second_moment(steps)[0], c.diagonal(), rtol=1e-9, atol=1e-12)
        assert float(run.expected_loss(steps)[0]) == pytest.approx(float(c.trace() / 14), rel=1e-9)
        mean = run.mean(steps)[0] - y
        torch.testing.assert_close(run.variance(steps)[0], c.diagonal() - mean.square(), rtol=1e-7, atol=1e-12)


def test_learning_rate_schedule():
    x, y, f0 = problem()
    moments = process_moments("gaussian", 5, "zo_sgd")
    run = Evolution(f0, y, x @ x.T, 0.1, moments=moments)
    squares, values = run.residual_R.square().numpy(), run.eigenvalues.numpy()
    constant = list(spectral_path(squares, values, [0.1] * 5, moments, 1, steps=5))
    np.testing.assert_allclose(constant[-1], list(spectral_path(squares, values, 0.1, moments, 1, steps=5))[-1])
    decayed = list(spectral_path(squares, values, [0.1, 0.0], moments, 1, steps=2))
    np.testing.assert_allclose(decayed[2], decayed[1])
    with pytest.raises(UsageError, match="learning rates"):
        list(spectral_path(squares, values, [0.1], moments, 1, steps=2))
    with pytest.raises(UsageError, match="dense_path"):
        next(spectral_path(squares, values, 0.1, ProcessMoments(1, 1, 1, -1), 1, steps=2))
    state = np.diag(squares)
    dense = list(dense_path(state, values, np.zeros((len(values), 5)), 0.1, moments, 1, steps=5))
    np.testing.assert_allclose(dense[-1].diagonal(), constant[-1])


CASES = [
    ("gaussian", "zo_sgd", 1),
    ("gaussian", "zo_sgd", 4),
    ("sphere", "zo_sgd", 2),
    ("rademacher", "zo_sgd", 1),
    ("uniform", "shared", 2),
    ("rademacher", "shared", 1),
    ("sphere", "shared", 1),
    ("gaussian", "shared", 4),
    ("gaussian", "independent", 4),
    ("rademacher", "independent", 4),
]


@pytest.mark.parametrize(("distribution", "coupling", "perturbations"), CASES)
@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_simulated_runs_follow_mean_and_second_moment(distribution, coupling, perturbations, shape):
    """Mean and second moment of 20,000 runs, within 3 standard errors (rms over predictions and steps below 1.5)."""
    x, y, f0 = problem(*shape, seed=3)
    steps = [1, 3, 10]
    lr = 0.2 * stability_limit_of_features(x, perturbations, coupling, distribution=distribution)
    moments = process_moments(distribution, x.shape[1], coupling)
    run = Evolution(f0, y, x @ x.T, lr, moments=moments, num_perturbations=perturbations, features=x)
    kwargs = {"num_perturbations": perturbations, "distribution": distribution, "coupling": coupling}
    simulated = simulate(x, y, f0, lr, steps, runs=20_000, seed=2, **kwargs)
    z_mean = (simulated.mean - run.mean(steps)) / simulated.mean_error
    z_square = (simulated.square - run.second_moment(steps)) / simulated.square_error
    loss_error = simulated.losses.std(1) / math.sqrt(20_000)
    z_loss = (simulated.losses.mean(1) - run.expected_loss(steps)) / loss_error
    assert z_loss.abs().max() < 3
    for z in (z_mean, z_square):  # many correlated values: the largest is allowed a little more than 3
        assert z.abs().max() < 3.8
        assert z.square().mean().sqrt() < 1.5


def test_test_points():
    """Mean and variance away from the training set, against simulated weights."""
    x_all, y_all, f0_all = problem(9, 12, seed=4)
    x, y, f0, other = x_all[:6], y_all[:6], f0_all[:6], x_all[6:]
    moments, lr = process_moments("gaussian", 12, "zo_sgd"), 0.1
    run = Evolution(f0, y, x @ x.T, lr, moments=moments, num_perturbations=2)
    steps, runs = 30, 40_000
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(runs, 12, dtype=torch.float64)
    for _ in range(steps):
        gradient = ((f0 - y) + weights @ x.T) @ x / 6
        z = torch.randn(runs, 2, 12, generator=generator, dtype=torch.float64)
        weights = weights - lr / 2 * torch.einsum("rpd,rd,rpe->re", z, gradient, z)
    values = f0_all[6:] + weights @ other.T
    mean = run.test_mean(steps, f0_all[6:], other @ x.T)[0]
    variance = run.test_variance(steps, other @ x.T, other.square().sum(1))[0]
    assert ((values.mean(0) - mean) / (values.std(0) / math.sqrt(runs))).abs().max() < 3.5
    kurtosis = ((values - values.mean(0)) ** 4).mean(0) / values.var(0) ** 2
    assert ((values.var(0) - variance) / (values.var(0) * ((kurtosis - 1) / runs).sqrt())).abs().max() < 3.5
    training = run.test_variance(steps, x @ x.T, x.square().sum(1))[0]
    torch.testing.assert_close(training, run.variance(steps)[0])


def test_rank_deficient_kernel_keeps_its_floor():
    x, y, f0 = problem(8, 2)
    run = Evolution(f0, y, x @ x.T, 0.05, moments=process_moments("gaussian", 2, "zo_sgd"))
    assert run.rank == 2
    least_squares = (y - f0) - x @ torch.linalg.lstsq(x, (y - f0)[:, None]).solution[:, 0]
    assert run.floor == pytest.approx(float(least_squares.square().sum() / 16))
    assert float(run.expected_loss(10**7)[0]) == pytest.approx(run.floor)  # and no noise floor above it
    with pytest.raises(UsageError, match="rank 2 for 8"):
        steps_to_reach(run, 0.5 * run.floor)


def test_one_example():
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    moments = process_moments("gaussian", 2, "zo_sgd")
    run = Evolution(torch.zeros(1), torch.ones(1), x @ x.T, 0.05, moments=moments)
    # one eigenvalue 5: E c+ = (1 - 2 * .25 + 3 * .0625) c
    assert float(run.expected_loss(3)[0]) == pytest.approx(0.5 * (1 - 0.5 + 3 * 0.0625) ** 3)
    assert gradient_descent(torch.zeros(1), torch.ones(1), x @ x.T, 0.2, 1).item() == pytest.approx(1.0)


def test_zo_descent_returns_what_it_promises():
    x, y, f0 = problem()
    mean, second, loss = zo_descent(f0, y, x @ x.T, 0.05, 20, num_perturbations=2, distribution="gaussian")
    assert mean.shape == second.shape == (21, 7)
    torch.testing.assert_close(loss, second.sum(1) / 14)
    torch.testing.assert_close(mean, gradient_descent(f0, y, x @ x.T, 0.05, range(21)))
    at_steps = zo_descent(f0, y, x @ x.T, 0.05, [20], num_perturbations=2, distribution="gaussian")
    torch.testing.assert_close(at_steps.second_moment[0], second[20])


def test_zo_descent_without_features_bounds_rademacher_and_says_so(caplog):
    x, y, f0 = problem()
    args = (f0, y, x @ x.T, 0.05, [5, 50])
    with caplog.at_level("INFO", logger="zokernel"):
        bound = zo_descent(*args, distribution="rademacher")
    assert "upper bound" in caplog.text
    exact = zo_descent(*args, distribution="rademacher", features=x)
    gaussian = zo_descent(*args, distribution="gaussian")
    torch.testing.assert_close(bound.expected_loss, gaussian.expected_loss)
    assert (exact.expected_loss < bound.expected_loss).all()
    torch.testing.assert_close(exact.mean, bound.mean)


def test_divergence_is_infinite_not_nan():
    x, y, f0 = problem()
    run = Evolution(f0, y, x @ x.T, 50.0, moments=process_moments("gaussian", 5, "zo_sgd"))
    assert run.expected_loss(10**6).tolist() == [math.inf]
    assert steps_to_reach(run, 1.01 * run.floor, max_steps=10**4) is None


def test_steps_to_reach_is_the_first_step():
    x, y, f0 = problem()
    moments = process_moments("gaussian", 5, "zo_sgd")
    run = Evolution(f0, y, x @ x.T, 0.05, moments=moments)
    for target in (0.9 * float(run.expected_loss(0)[0]), run.floor + 0.01, run.floor + 1e-4):
        step = steps_to_reach(run, target)
        assert run.expected_loss(step)[0] <= target < run.expected_loss(step - 1)[0]
    assert steps_to_reach(run, 1e9) == 0
    assert steps_to_reach(run, run.floor + 1e-3, of_mean=True) < steps_to_reach(run, run.floor + 1e-3)


def test_query_optimal_number_of_perturbations():
    """Far below the limit one direction per step is best per query; P directions take 2 P t queries."""
    x, y, f0 = problem(7, 5)
    run = Evolution(f0, y, x @ x.T, 1.0)
    target = run.floor + 0.05 * float(run.expected_loss(0)[0] - run.floor)
    limit = stability_limit_of_features(x, 1, distribution="gaussian")
    slow = query_budget(f0, y, x @ x.T, target, lr=0.02 * limit, num_perturbations=[1, 2, 8])
    assert [row.queries for row in slow] == [2 * row.num_perturbations * row.steps for row in slow]
    assert min(slow, key=lambda row: row.queries).num_perturbations == 1
    best = query_budget(f0, y, x @ x.T, target, num_perturbations=[1, 4])
    assert best[0].queries < slow[0].queries
    assert best[1].limit > best[0].limit
    assert query_budget(f0, y, x @ x.T, target, lr=2 * limit, num_perturbations=[1])[0].queries is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -0.1}, "positive"),
        ({"lr": float("nan")}, "positive"),
        ({"y": torch.zeros(3)}, "targets"),
        ({"kernel": torch.eye(3)}, "does not fit"),
        ({"kernel": torch.full((7, 7), float("nan"))}, "finite"),
        ({"kernel": torch.arange(49.0).reshape(7, 7)}, "symmetric"),
        ({"kernel": -torch.eye(7)}, "negative eigenvalue"),
        ({"kernel": torch.zeros(7, 7)}, "zero"),
        ({"f0": torch.tensor([float("inf")] * 7)}, "finite"),
        ({"steps": -1}, "whole numbers"),
        ({"steps": [0.5]}, "whole numbers"),
        ({"num_perturbations": 0}, "positive whole number"),
        ({"distribution": "laplace"}, "pass features"),
        ({"coupling": "shared"}, "pass dim"),
        ({"distribution": "student_t(4)", "dim": 5}, "no moment of order 4"),
        ({"features": torch.ones(3, 2)}, "features of 3"),
    ],
)
def test_bad_input(change, message):
    x, y, f0 = problem()
    request = {"f0": f0, "y": y, "kernel": x @ x.T, "lr": 0.1, "steps": 3} | change
    with pytest.raises(UsageError, match=message):
        zo_descent(**request)


def test_bad_simulations():
    x, y, f0 = problem()
    for change, message in (
        ({"lr": 0.0}, "positive"),
        ({"runs": 1}, "2 runs"),
        ({"coupling": "both"}, "coupling"),
        ({"features": x * float("nan")}, "finite"),
        ({"features": x[:3]}, "shape"),
    ):
        request = {"features": x, "y": y, "f0": f0, "lr": 0.1, "steps": 2} | change
        with pytest.raises(UsageError, match=message):
            simulate(**request)


@pytest.mark.parametrize(
    ("shape", "perturbations", "fraction"), [((30, 60), 1, 0.1), ((30, 60), 8, 0.5), ((12, 3), 1, 0.1)]
)
def test_loss_band_holds_about_nine_runs_in_ten(shape, perturbations, fraction):
    """An approximation, so a wide tolerance: measured coverage up to half of the limit is 84% to 98%."""
    x, y, f0 = problem(*shape)
    moments = process_moments("gaussian", shape[1], "zo_sgd")
    lr = fraction * stability_limit_of_features(x, perturbations, distribution="gaussian")
    run = Evolution(f0, y, x @ x.T, lr, moments=moments, num_perturbations=perturbations)
    steps = [1, 10, 50, 200]
    low, high = run.loss_band(steps)
    losses = simulate(x, y, f0, lr, steps, num_perturbations=perturbations, runs=1000).losses
    inside = ((losses >= low[:, None]) & (losses <= high[:, None])).double().mean(1)
    assert inside.min() > 0.78
    assert inside.max() < 0.999


def test_above_the_limit_a_slow_unstable_mode_lets_the_loss_fall_first():
    """Eight fast modes are unstable by a thousandth; the residual lies along two slow ones."""
    kernel = torch.diag(torch.tensor([2.0] * 8 + [0.02] * 2, dtype=torch.float64)) * 10
    f0, y = torch.zeros(10, dtype=torch.float64), torch.tensor([1e-3] * 8 + [1.0] * 2, dtype=torch.float64)
    moments = process_moments("gaussian", 10)
    limit = Evolution(f0, y, kernel, 1.0, moments=moments).stability_limit
    run = Evolution(f0, y, kernel, 1.001 * limit, moments=moments)
    losses = run.expected_loss([82, 83, 400, 3000])
    assert losses[0] > 0.095 >= losses[1] > losses[2]
    assert losses[3] > 0.2
    assert steps_to_reach(run, 0.095) == 83
    assert query_budget(f0, y, kernel, 0.095, num_perturbations=[1], lr=run.lr)[0].queries == 166
    assert steps_to_reach(run, 0.09) is None


@pytest.mark.parametrize("of_mean", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.99, 1.0005, 1.3])
def test_steps_to_reach_are_the_first_of_all_steps(share, of_mean):
    """Against every step's loss, also where it falls and rises again, or touches the wanted loss for a single step."""
    scales = torch.logspace(0, -1.5, 6, dtype=torch.float64)[:, None]
    for seed in range(5):
        x, y, f0 = problem(6, 7, seed)
        x = x * scales
        moments = process_moments("gaussian", 7)
        limit = Evolution(f0, y, x @ x.T, 1.0, moments=moments).stability_limit
        run = Evolution(f0, y, x @ x.T, share * limit, moments=moments)
        losses = (run.mean_loss if of_mean else run.expected_loss)(range(2001))
        lowest, start = float(losses[losses.isfinite()].min()), float(losses[0])
        for part in (0.0, 1e-6, 0.01, 0.3, 0.9, 1.0):
            wanted = lowest + part * (start - lowest) + 1e-11
            first = int((losses <= wanted).nonzero()[0])
            assert steps_to_reach(run, wanted, max_steps=2000, of_mean=of_mean) == first
        if lowest - 1e-6 > run.floor:
            assert steps_to_reach(run, lowest - 1e-6, max_steps=2000, of_mean=of_mean) is None


def test_a_diverging_second_moment_is_followed_without_overflow(recwarn):
    x, y, f0 = problem()
    run = Evolution(f0, y, x @ x.T, 5.0, moments=process_moments("rademacher", 5), features=x)
    assert steps_to_reach(run, 0.5) is None
    assert not [warning for warning in recwarn if "overflow" in str(warning.message)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, "0.1"])
def test_a_loss_to_reach_is_a_finite_number(loss):
    kernel = torch.eye(2, dtype=torch.float64)
    with pytest.raises(UsageError, match="The loss to reach must be a finite number, not"):
        query_budget(torch.zeros(2), torch.ones(2), kernel, loss, num_perturbations=[1])


def test_no_perturbations_are_refused_where_numbers_of_them_are_compared():
    kernel = torch.eye(2, dtype=torch.float64)
    with pytest.raises(UsageError, match="number of perturbations must be a positive whole number, not 0"):
        query_budget(torch.zeros(2), torch.ones(2), kernel, 0.1, num_perturbations=[0, 1])
