"""Mean-square stability limits: closed form, published equations, spectral radius, and simulated runs on both sides."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from zokernel.dynamics import Evolution, dense_path, simulate
from zokernel.errors import UsageError
from zokernel.theory import process_moments, stability_limit, stability_limit_of_features
from zokernel.theory.stability import reduced_features

EIGENVALUES = np.array([1.0, 0.7, 0.5, 0.3, 0.2, 0.1])


def published_equation(coupling, perturbations, dim, values):
    """The three sums of docs/theory.md, "Stability", solved for the learning rate."""
    k = (dim + 4) * (dim + 6) / (dim + 2) ** 2
    scale, weight, extra = {
        "zo_sgd": (1, 1, 1 + 1 / perturbations),
        "shared": (dim + 2, k, 1 + (2 * k - 1) / perturbations),
        "independent": (1, dim + 4, 1 + 3 / perturbations),
    }[coupling]

    def excess(rate):
        return weight / perturbations * (rate * values / (2 - rate * values * extra)).sum() - 1

    return brentq(excess, 1e-9, (2 - 1e-9) / (extra * values.max())) / scale


@pytest.mark.parametrize("coupling", ["zo_sgd", "shared", "independent"])
@pytest.mark.parametrize("perturbations", [1, 3, 50])
def test_limits_solve_the_published_equations(coupling, perturbations):
    limit = stability_limit(EIGENVALUES, perturbations, coupling)
    assert limit == pytest.approx(published_equation(coupling, perturbations, 6, EIGENVALUES), rel=1e-9)


def test_first_order_and_many_perturbations():
    assert stability_limit(EIGENVALUES, 1, "first_order") == 2.0
    assert stability_limit(EIGENVALUES, 10**9) == pytest.approx(2.0, rel=1e-6)
    assert stability_limit(EIGENVALUES, 1) < stability_limit(EIGENVALUES, 2) < stability_limit(EIGENVALUES, 4)


def growth(x, lr, perturbations, coupling, distribution):
    """Dominant growth factor of the exact second moment, by iterating the dense recursion on a random start."""
    left, values = reduced_features(x)
    state = np.eye(len(values))
    moments = process_moments(distribution, x.shape[1], coupling)
    states = list(dense_path(state, values, left, lr, moments, perturbations, steps=3000))
    return (np.trace(states[-1]) / np.trace(states[-101])) ** 0.01


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "laplace", "sphere", "uniform", "student_t(12)"])
@pytest.mark.parametrize("coupling", ["zo_sgd", "shared", "independent"])
def test_limit_of_features_is_where_the_exact_second_moment_turns(distribution, coupling):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0] *= 2  # coordinates matter for distributions with a diagonal term
    limit = stability_limit_of_features(x, 2, coupling, distribution=distribution)
    assert growth(x, 0.995 * limit, 2, coupling, distribution) < 1 < growth(x, 1.005 * limit, 2, coupling, distribution)


def test_rademacher_is_at_least_as_stable_as_gaussian():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / 8)
    safe = stability_limit(eigenvalues, 2, distribution="rademacher")
    assert safe == pytest.approx(stability_limit(eigenvalues, 2, distribution="gaussian"))
    assert stability_limit_of_features(x, 2, distribution="rademacher") > safe
    assert stability_limit_of_features(x, 2, distribution="gaussian") == pytest.approx(safe)


@pytest.mark.parametrize("coupling", ["zo_sgd", "shared", "independent"])
@pytest.mark.parametrize("distribution", ["gaussian", "sphere"])
def test_the_limit_separates_simulated_runs_within_5_percent(coupling, distribution):
    """Mean simulated loss falls at 0.95 of the limit and grows at 1.05, each by more than 4 standard errors."""
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, f0 = x.sum(1), torch.zeros(20, dtype=torch.float64)
    perturbations = 16 if coupling == "independent" else 2  # two independent vectors have the heaviest tails
    limit = stability_limit_of_features(x, perturbations, coupling, distribution=distribution)
    for fraction, sign in ((0.95, -1), (1.05, 1)):
        run = simulate(
            x,
            y,
            f0,
            fraction * limit,
            [8, 24],
            num_perturbations=perturbations,
            distribution=distribution,
            coupling=coupling,
            runs=12_000 if coupling != "independent" else 4_000,
            seed=5,
        )
        change = run.losses[1] - run.losses[0]
        z = float(change.mean() / (change.std() / math.sqrt(len(change))))
        assert sign * z > 4, (coupling, distribution, fraction, z)


def test_above_the_limit_the_mean_path_still_converges():
    """What the paper plots converges where the expected loss of the algorithm diverges."""
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, f0 = x.sum(1), torch.zeros(12, dtype=torch.float64)
    limit = stability_limit_of_features(x, 1, distribution="gaussian")
    moments = process_moments("gaussian", 30, "zo_sgd")
    run = Evolution(f0, y, x @ x.T, 1.2 * limit, moments=moments)
    start, mean, expected = run.expected_loss(0)[0], run.mean_loss(200)[0], run.expected_loss(200)[0]
    assert mean < 0.2 * start
    assert expected > 10 * start


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8), st.integers(1, 20), st.floats(0.1, 10.0))
def test_limits_scale_inversely_with_the_kernel(values, perturbations, factor):
    for coupling in ("zo_sgd", "shared", "independent", "first_order"):
        base = stability_limit(values, perturbations, coupling)
        scaled = stability_limit([factor * value for value in values], perturbations, coupling)
        assert scaled * factor == pytest.approx(base, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stability_limit([]), "list of numbers"),
        (lambda: stability_limit([1.0, float("nan")]), "finite"),
        (lambda: stability_limit([1.0, -0.5]), "negative eigenvalue"),
        (lambda: stability_limit([0.0, 0.0]), "zero"),
        (lambda: stability_limit([1.0], 0), "positive whole number"),
        (lambda: stability_limit([1.0], 1, "both"), "coupling"),
        (lambda: stability_limit([1.0, 1.0], 1, "shared", dim=1), "only 1 parameters"),
        (lambda: stability_limit([1.0], 1, distribution="laplace"), "kurtosis above 3"),
        (lambda: stability_limit([1.0], 1, distribution="student_t(4)"), "no moment of order 4"),
        (lambda: stability_limit_of_features(torch.tensor([[float("inf")]])), "finite"),
        (lambda: stability_limit_of_features(torch.ones(3)), "shape"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(UsageError, match=message):
        call()
