"""Training with mini-batches: the recursion of the second moment against simulated runs, and its stability limit."""

import math

import pytest
import torch

from zokernel.dynamics import batch_descent, zo_descent
from zokernel.errors import RunError, UsageError
from zokernel.theory import batch_stability_limit, residual_noise, stability_limit, stability_limit_of_features

SIZE, DIM = 5, 7
SCHEMES = ("first_order", "shared", "per_example", "flipout")


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZE, DIM, generator=generator, dtype=torch.float64) + 0.5
    y = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return x, y, torch.zeros(SIZE, dtype=torch.float64)


def simulated(x, residual, lr, batch, steps, count, scheme, *, replacement, runs=40_000, seed=1):
    """Residuals of many runs after ``steps`` steps with Gaussian directions, (runs, N); flipout on a 1 x d matrix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = residual.expand(runs, -1).clone()
    for _ in range(steps):
        if replacement:
            rows = torch.randint(0, len(x), (runs, batch), generator=generator)
        else:
            rows = torch.rand(runs, len(x), generator=generator).argsort(1)[:, :batch]
        gradients = x[rows] * state.gather(1, rows)[:, :, None]
        if scheme == "first_order":
            step = gradients.mean(1)
        else:
            z = normal(runs, 1 if scheme != "per_example" else batch, count, x.shape[1])
            if scheme == "flipout":
                z = z * (torch.rand(runs, batch, count, x.shape[1], generator=generator).round() * 2 - 1)
            step = ((z * gradients[:, :, None]).sum(-1, keepdim=True) * z).mean((1, 2))
        state = state - lr * step @ x.T
    return state


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_simulated_runs_follow_the_recursion(scheme, replacement):
    x, y, f0 = problem()
    kernel = x @ x.T
    lr = 0.3 * batch_stability_limit(kernel, 3, 2, scheme, replacement=replacement, features=x)
    run = batch_descent(f0, y, kernel, lr, 3, 4, 2, scheme, replacement=replacement, features=x)
    for steps in (1, 4):
        residuals = simulated(x, f0 - y, lr, 3, steps, 2, scheme, replacement=replacement)
        for samples, expected in ((residuals, run.mean[steps] - y), (residuals.square(), run.second_moment[steps])):
            z = (samples.mean(0) - expected) / (samples.std(0) / math.sqrt(len(samples)))
            assert float(z.abs().max()) < 4.2, (steps, z)
    other = batch_descent(f0, y, kernel, lr, 3, 4, 2, "shared" if scheme != "shared" else "per_example")
    loss = residuals.square().sum(1) / (2 * SIZE)
    error = float(loss.std()) / math.sqrt(len(loss))
    assert abs(float(loss.mean() - run.expected_loss[4])) < 4 * error
    assert abs(float(loss.mean() - other.expected_loss[4])) > 6 * error


def test_the_full_batch_with_shared_directions_is_zo_descent():
    x, y, f0 = problem(1)
    kernel = x @ x.T
    for distribution in ("gaussian", "rademacher"):
        features = None if distribution == "gaussian" else x
        old = zo_descent(f0, y, kernel, 0.02, 6, 3, distribution, features=features)
        new = batch_descent(f0, y, kernel, 0.02, SIZE, 6, 3, "shared", distribution, features=features)
        for actual, expected in zip(new, old, strict=True):
            torch.testing.assert_close(actual, expected)
        limit = batch_stability_limit(kernel, SIZE, 3, "shared", distribution, features=features)
        assert limit == pytest.approx(stability_limit_of_features(x, 3, distribution=distribution), rel=1e-6)
    assert batch_stability_limit(kernel, SIZE, scheme="first_order") == pytest.approx(
        stability_limit(torch.linalg.eigvalsh(kernel) / SIZE, coupling="first_order"), rel=1e-6
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("batch", [SIZE, 2])
def test_the_limit_is_where_the_second_moment_turns(scheme, batch):
    x, y, f0 = problem(2)
    kernel = x @ x.T
    limit = batch_stability_limit(kernel, batch, 2, scheme, features=x)

    def growth(lr):
        losses = batch_descent(f0, y, kernel, lr, batch, 800, 2, scheme, features=x).expected_loss
        return float(losses[-1] / losses[-101])

    assert growth(0.99 * limit) < 1 < growth(1.01 * limit)


def test_examples_that_pull_the_same_way_gain_and_independent_ones_do_not():
    """Equal features: all gradients are parallel. Orthogonal features: the loss can sit in any single example."""
    orthogonal = torch.eye(6, dtype=torch.float64)
    same = 0.01 * orthogonal + torch.ones(6, 6, dtype=torch.float64)
    for kernel, low, high in ((orthogonal, 0.999, 1.001), (same, 1.5, 6.0)):
        shared = batch_stability_limit(kernel, 6, scheme="shared")
        assert low < batch_stability_limit(kernel, 6) / shared < high


def test_residuals_outside_the_range_of_the_kernel_leave_a_floor():
    x = torch.ones(4, 1, dtype=torch.float64)
    y = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    kernel, f0 = x @ x.T, torch.zeros(4, dtype=torch.float64)
    assert float(kernel @ y @ y) == 0  # the whole gradient is zero at the start, those of the examples are not
    for batch, scheme, floor in (
        (2, "shared", True),
        (2, "per_example", True),
        (4, "per_example", True),
        (4, "shared", False),
    ):
        lr = 0.5 * batch_stability_limit(kernel, batch, scheme=scheme)
        losses = batch_descent(f0, y, kernel, lr, batch, 200, scheme=scheme).expected_loss
        assert float(losses[-1]) == pytest.approx(float(losses[-2]), rel=1e-9)
        assert (float(losses[-1]) > 1.05 * float(losses[0])) == floor, (batch, scheme)


def test_several_outputs_share_the_directions_of_their_example():
    x, _, _ = problem(3)
    rows = torch.cat([x, x[:3]])  # 4 examples of 2 outputs
    kernel = rows @ rows.T
    f0, y = torch.zeros(4, 2), torch.arange(8.0).reshape(4, 2)
    run = batch_descent(f0, y, kernel.reshape(4, 2, 4, 2), 0.01, 2, 3)
    assert run.mean.shape == run.second_moment.shape == (4, 4, 2)
    residual = (f0 - y).flatten().double()
    noise = residual_noise(kernel, torch.outer(residual, residual), 2, outputs=2)
    drift = kernel @ residual / 4
    expected = (residual - 0.01 * drift).square() + 0.01**2 * (noise.diagonal() - drift.square())
    torch.testing.assert_close(run.second_moment[1].flatten(), expected)
    single = residual_noise(kernel, torch.outer(residual, residual), 4, outputs=1)
    assert not torch.allclose(single, noise)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_stability_limit(torch.ones(2, 3), 1), "square matrix"),
        (lambda: batch_stability_limit(-torch.eye(2), 1), "negative eigenvalue"),
        (lambda: batch_stability_limit(torch.tensor([[2.0, 1.0], [0.0, 2.0]]), 1), "must be symmetric"),
        (lambda: batch_stability_limit(torch.tensor([[float("nan")]]), 1), "must be finite"),
        (lambda: batch_stability_limit(torch.eye(2), 3), "without replacement"),
        (lambda: batch_stability_limit(torch.eye(2), 1, 0), "positive whole number"),
        (lambda: batch_stability_limit(torch.eye(2), 1, distribution="rademacher"), "features="),
        (lambda: batch_descent(torch.zeros(2), torch.ones(2), torch.eye(2), 0.0, 1, 1), "learning rate"),
        (lambda: batch_descent(torch.zeros(2), torch.ones(2), torch.eye(3), 0.1, 1, 1), "does not fit"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_a_limit_that_does_not_settle_is_an_error():
    with pytest.raises(RunError, match="not settled"):
        batch_stability_limit(torch.diag(torch.tensor([1.0, 0.9])), 2, max_iterations=2)
