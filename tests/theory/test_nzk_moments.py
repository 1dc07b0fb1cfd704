"""Closed forms of the NZK's moments against published factors, Monte Carlo (z-scores) and each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zokernel.distributions import Distribution
from zokernel.errors import UsageError
from zokernel.kernels import sample_nzk
from zokernel.theory import (
    expected_direction_matrix,
    expected_nzk,
    expected_nzk_factor,
    matching_scale,
    process_moments,
)

DISTRIBUTIONS = (
    "gaussian",
    "rademacher",
    "laplace",
    "student_t(20)",
    "uniform",
    "sphere",
    "gaussian(0.5)",
    "laplace(0.605)",
)
COUPLINGS = ("shared", "independent", "zo_sgd")


def features(n=6, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_factors_of_the_published_figures():
    shared = {
        "gaussian": 4.0,
        "rademacher": 2.0,
        "sphere": 2.0,
        "uniform": 2.8,
        "student_t(10)": 7.8125,
        "student_t(1000)": 4.022,
        "laplace(0.5)": 1.75,
        "laplace(0.605)": 3.751,
        "gaussian(0.5)": 0.25,
        "gaussian(1.5)": 20.25,
    }
    for distribution, factor in shared.items():
        assert expected_nzk_factor(distribution, 2, "shared") == pytest.approx(factor, rel=3e-4), distribution
    assert expected_nzk_factor("gaussian", 711) == 713
    for sigma, factor in ((0.5, 0.25), (1.0, 1.0), (1.5, 2.25)):
        actual = expected_nzk_factor(f"gaussian({sigma})", 2, "independent", zeta_distribution="gaussian")
        assert actual == pytest.approx(factor)
    assert matching_scale("laplace(1)", 2, 4.0) == pytest.approx((4 / 28) ** 0.25)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_expected_kernel_matches_monte_carlo(distribution, coupling):
    x = features()
    estimate = sample_nzk(x, distribution=distribution, coupling=coupling, num_samples=200_000, seed=3)
    z = (estimate.mean - expected_nzk(x, distribution=distribution, coupling=coupling)) / estimate.standard_error
    # 36 entries x 24 cases: |z| < 4.5 fails by chance once in 170 seeds; the seed is fixed.
    assert z.abs().max() < 4.5
    assert 0.1 < z.square().mean().sqrt() < 2.5  # and the standard errors are not inflated either


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "laplace", "uniform", "sphere"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_expected_kernel_with_mean_and_covariance(distribution, coupling):
    x = features(5, 3)
    root = features(3, 3, seed=5)
    cov = root @ root.T + 0.5 * torch.eye(3, dtype=torch.float64)
    z = Distribution(distribution, mean=(0.5, -1.0, 0.25), covariance=tuple(map(tuple, cov.tolist())))
    zeta = Distribution("gaussian", mean=(1.0, 0.0, 0.5)) if coupling == "independent" else None
    kwargs = {"distribution": z, "coupling": coupling, "zeta_distribution": zeta}
    estimate = sample_nzk(x, num_samples=200_000, seed=1, **kwargs)
    exact = expected_nzk(x, **kwargs)
    assert ((estimate.mean - exact) / estimate.standard_error).abs().max() < 4.5
    if coupling == "independent":  # anisotropic distributions: the kernel is not symmetric, and orientation matters
        assert (exact - exact.T).abs().max() > 0.1
        assert ((estimate.mean.T - exact) / estimate.standard_error).abs().max() > 10


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "laplace", "student_t(40)", "uniform", "sphere"])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_process_moments_match_monte_carlo(distribution, coupling, dim):
    """E[M Q M^T] = outer Q + trace tr(Q) I + diagonal diag(Q), entry by entry."""
    q = features(dim + 1, dim, seed=9)
    q = q.T @ q
    generator = torch.Generator().manual_seed(11)
    count = 400_000
    perturbation = Distribution.parse(distribution)
    z = perturbation.sample(count, dim, generator)
    quadratic = torch.einsum("si,ij,sj->s", z, q, z)
    vector = z
    if coupling == "shared":
        quadratic = quadratic * z.square().sum(1) ** 2
    elif coupling == "independent":
        vector = perturbation.sample(count, dim, generator)
        quadratic = quadratic * (vector * z).sum(1) ** 2
    samples = quadratic[:, None, None] * vector[:, :, None] * vector[:, None, :]
    mean, error = samples.mean(0), samples.std(0) / math.sqrt(count)
    m = process_moments(distribution, dim, coupling)
    exact = m.outer * q + m.trace * q.trace() * torch.eye(dim).double() + m.diagonal * torch.diag(q.diagonal())
    assert ((mean - exact).abs() <= 4.5 * error + 1e-9).all()


def test_gaussian_process_moments_are_the_published_ones():
    for d in (2, 6, 50):
        shared, independent = process_moments("gaussian", d, "shared"), process_moments("gaussian", d, "independent")
        beta = (d + 4) * (d + 6)
        assert (shared.mean, shared.outer, shared.trace, shared.diagonal) == (d + 2, 2 * beta, beta, 0)
        assert (independent.mean, independent.outer, independent.trace) == (1, 4, d + 4)
        rademacher = process_moments("rademacher", d, "shared")
        assert (rademacher.outer, rademacher.trace, rademacher.diagonal) == (2 * d * d, d * d, -2 * d * d)


def test_the_shared_factor_depends_on_the_fourth_moment():
    """The abstract says first and second moments; two distributions with the same two moments differ."""
    assert expected_nzk_factor("gaussian", 2) == 4
    assert expected_nzk_factor("laplace", 2) == pytest.approx(7)
    assert expected_nzk_factor("laplace", 2, "zo_sgd") == expected_nzk_factor("gaussian", 2, "zo_sgd") == 1


@settings(deadline=None)
@given(st.floats(0.1, 5.0), st.integers(1, 300), st.sampled_from(["gaussian", "rademacher", "uniform", "laplace"]))
def test_scaling_laws(scale, dim, name):
    unit, scaled = Distribution(name), Distribution(name, scale=scale)
    for coupling, power in (("shared", 4), ("independent", 4), ("zo_sgd", 2)):
        ratio = expected_nzk_factor(scaled, dim, coupling) / expected_nzk_factor(unit, dim, coupling)
        assert ratio == pytest.approx(scale**power, rel=1e-9)
    ratio = process_moments(scaled, dim, "shared").trace / process_moments(unit, dim, "shared").trace
    assert ratio == pytest.approx(scale**8, rel=1e-9)


@settings(deadline=None)
@given(st.integers(2, 40), st.sampled_from(["gaussian", "rademacher", "uniform", "laplace", "sphere", "student_t(9)"]))
def test_factor_is_the_trace_of_the_direction_matrix(dim, distribution):
    for coupling in COUPLINGS:
        matrix = expected_direction_matrix(distribution, dim, coupling)
        expected = expected_nzk_factor(distribution, dim, coupling) * torch.eye(dim, dtype=torch.float64)
        torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-12)


def test_moments_that_do_not_exist_are_refused_with_the_reason():
    assert expected_nzk_factor("student_t(3)", 5, "zo_sgd") == pytest.approx(3.0)  # the mean needs the variance only
    with pytest.raises(UsageError, match="no moment of order 4"):
        expected_nzk_factor("student_t(4)", 5, "shared")
    with pytest.raises(UsageError, match="no moment of order 4"):
        process_moments("student_t(3.5)", 5, "zo_sgd")
    with pytest.raises(UsageError, match="no moment of order 8"):
        process_moments("student_t(8)", 5, "shared")
    with pytest.raises(UsageError, match="no variance"):
        Distribution.parse("student_t(2)")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Distribution.parse("cauchy"), "choose one of"),
        (lambda: Distribution.parse("student_t"), "degrees of freedom"),
        (lambda: Distribution.parse("gaussian(x)"), "not a number"),
        (lambda: Distribution("gaussian", scale=-1.0), "positive"),
        (lambda: Distribution("gaussian", mean=(float("nan"),)), "finite"),
        (lambda: expected_nzk_factor("gaussian", 2, "both"), "coupling"),
        (lambda: expected_nzk_factor("gaussian", 0), "at least 1"),
        (lambda: expected_nzk_factor("gaussian", 2, "shared", zeta_distribution="gaussian"), "second distribution"),
        (lambda: expected_nzk_factor(Distribution("gaussian", mean=(1.0, 0.0)), 2), "single factor"),
        (lambda: expected_nzk(torch.eye(2), distribution=Distribution("gaussian", mean=(1.0,))), "mean has shape"),
        (
            lambda: expected_nzk(
                torch.eye(2), distribution=Distribution("gaussian", covariance=((1.0, 2.0), (2.0, 1.0)))
            ),
            "positive definite",
        ),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_samples_follow_their_law(distribution):
    perturbation, dim, count = Distribution.parse(distribution), 3, 300_000
    draws = perturbation.sample(count, dim, torch.Generator().manual_seed(0))
    for order in (2, 4):
        if perturbation.is_sphere and order == 4:
            exact = 3 * dim / (dim + 2)
        else:
            exact = perturbation.moment(order)
        powers = draws**order
        error = powers.std(0) / math.sqrt(count)
        assert ((powers.mean(0) - exact).abs() <= 4 * error + 1e-12).all()
    assert (draws.mean(0).abs() < 4 * draws.std(0) / math.sqrt(count)).all()
