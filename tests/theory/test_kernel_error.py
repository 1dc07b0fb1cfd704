"""The exact errors against Monte Carlo on dense matrices, with bounds from the measured spread (z-scores)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zokernel import theory
from zokernel.errors import UsageError

REPLICATES = 4000


def heavy_tailed(rows, dim, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, dim)) * np.exp(rng.standard_normal(dim))


def sample(distribution, shape, rng):
    if distribution == "gaussian":
        return rng.standard_normal(shape)
    if distribution == "rademacher":
        return rng.choice([-1.0, 1.0], shape)
    if distribution == "uniform":
        return rng.uniform(-math.sqrt(3), math.sqrt(3), shape)
    gauss = rng.standard_normal(shape)
    dim = shape[-1]
    if distribution == "sphere":
        return gauss * math.sqrt(dim) / np.linalg.norm(gauss, axis=-1, keepdims=True)
    frame, upper = np.linalg.qr(np.swapaxes(gauss, -1, -2))
    frame = frame * np.sign(np.diagonal(upper, axis1=-2, axis2=-1))[..., None, :]
    return math.sqrt(dim) * np.swapaxes(frame, -1, -2)


def moments_of(jac_o, jac_u):
    kernel = jac_o @ jac_u.T
    overlap = (jac_o**2).sum(0) @ (jac_u**2).sum(0)
    return theory.KernelMoments((jac_o**2).sum(), (jac_u**2).sum(), (kernel**2).sum(), overlap, jac_o.shape[1])


def squared_errors(jac_o, jac_u, directions_RPD, weights=None):
    a, b = directions_RPD @ jac_o.T, directions_RPD @ jac_u.T
    if weights is not None:
        a = a * weights[..., None]
    kernels = np.einsum("rpv,rpw->rvw", a, b) / directions_RPD.shape[1]
    return ((kernels - jac_o @ jac_u.T) ** 2).sum((1, 2))


def z_score(samples, expected):
    return (samples.mean() - expected) / (samples.std() / math.sqrt(len(samples)))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "uniform", "sphere", "orthogonal"])
@pytest.mark.parametrize(("outputs", "dim"), [(4, 12), (6, 40), (1, 5)])
@pytest.mark.parametrize("count", [1, 5])
def test_expected_squared_error(distribution, outputs, dim, count):
    jac_o, jac_u = heavy_tailed(outputs, dim, 1), heavy_tailed(outputs, dim, 2)
    rng = np.random.default_rng(3)
    errors = squared_errors(jac_o, jac_u, sample(distribution, (REPLICATES, count, dim), rng))
    expected = theory.expected_squared_error(moments_of(jac_o, jac_u), count, distribution)
    if expected < 1e-9:  # a complete orthogonal frame reproduces the kernel
        assert errors.max() < 1e-9
    else:
        assert abs(z_score(errors, expected)) < 4.5  # 30 comparisons: P(any beyond 4.5) < 3e-4 for normal means


def test_the_law_tells_distributions_apart():
    """Using the Gaussian formula for Rademacher directions would fail here: the check above can fail."""
    jac = heavy_tailed(2, 6, 1)
    errors = squared_errors(jac, jac, sample("rademacher", (REPLICATES, 5, 6), np.random.default_rng(0)))
    assert abs(z_score(errors, theory.expected_squared_error(moments_of(jac, jac), 5, "gaussian"))) > 10


def test_kernel_smoothed_weights():
    """KerZOO of order 3: weights r K(r) with r uniform, E[rK] = 1 and E[(rK)^2] = 6.25."""
    jac_o, jac_u = heavy_tailed(3, 10, 1), heavy_tailed(3, 10, 2)
    rng = np.random.default_rng(0)
    r = rng.uniform(-1, 1, (20_000, 4))
    weights = 15 / 4 * r**2 * (5 - 7 * r**2)
    errors = squared_errors(jac_o, jac_u, sample("gaussian", (20_000, 4, 10), rng), weights)
    expected = theory.expected_squared_error(moments_of(jac_o, jac_u), 4, weight_second_moment=6.25)
    assert abs(z_score(errors, expected)) < 4


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere"])
def test_expected_belief_error(distribution):
    rng = np.random.default_rng(5)
    rows, grad = heavy_tailed(4, 15, 5), heavy_tailed(1, 15, 6)[0]
    moments = theory.BeliefMoments(
        (rows**2).sum(), grad @ grad, ((rows @ grad) ** 2).sum(), ((rows**2).sum(0) * grad**2).sum(), 15
    )
    z = sample(distribution, (REPLICATES, 3, 15), rng)
    change = -0.1 * np.einsum("rp,rpv->rv", z @ grad, z @ rows.T) / 3
    errors = ((change + 0.1 * rows @ grad) ** 2).sum(1)
    expected = theory.expected_belief_error(moments, 3, distribution, lr=0.1) ** 2
    assert abs(z_score(errors, expected)) < 4
    relative = theory.expected_belief_error(moments, 3, distribution)
    assert relative == pytest.approx(math.sqrt(expected / (0.01 * moments.product_sq)))


@given(rho=st.floats(0.01, 1.0), count=st.integers(1, 1000), tolerance=st.floats(0.01, 3.0))
def test_budget_is_the_inverse_of_the_error(rho, count, tolerance):
    num_perturbations = theory.required_perturbations(rho, tolerance)
    assert theory.expected_relative_error(rho, num_perturbations) <= tolerance * (1 + 1e-6)
    if num_perturbations > 1:
        assert theory.expected_relative_error(rho, num_perturbations - 1) > tolerance * (1 - 1e-6)
    assert theory.shrunken_relative_error(rho, count) < 1
    assert theory.required_perturbations(rho, tolerance, confidence=0.9) >= num_perturbations
    shrink = theory.optimal_shrinkage(rho, count)
    v = theory.single_draw_variance(rho) / count
    assert shrink**2 * v + (1 - shrink) ** 2 == pytest.approx(theory.shrunken_relative_error(rho, count) ** 2)


def test_shrinkage_is_optimal_for_real_draws():
    jac = heavy_tailed(3, 12, 1)
    rng = np.random.default_rng(0)
    z = sample("gaussian", (REPLICATES, 4, 12), rng) @ jac.T
    kernels, exact = np.einsum("rpv,rpw->rvw", z, z) / 4, jac @ jac.T
    best = (kernels * exact).sum() / (kernels**2).sum()
    assert theory.optimal_shrinkage(moments_of(jac, jac).rho, 4) == pytest.approx(best, rel=0.05)


def test_learning_rate_ratio_is_that_of_the_best_quadratic_steps():
    rng = np.random.default_rng(0)
    dim, count = 8, 3
    hessian = np.diag(np.arange(1.0, dim + 1))
    grad = rng.standard_normal(dim)
    z = rng.standard_normal((200_000, count, dim))
    steps = np.einsum("rp,rpd->rd", z @ grad, z) / count
    curvature = ((steps @ hessian) * steps).sum(1).mean()
    along = grad @ hessian @ grad
    ratio = theory.curvature_ratio(np.trace(hessian), grad @ grad, along)
    assert theory.learning_rate_ratio(count, ratio) == pytest.approx(along / curvature, rel=0.01)
    best = theory.optimal_learning_rate(
        count, gradient_sq=grad @ grad, trace_hessian=np.trace(hessian), gradient_curvature=along
    )
    assert best == pytest.approx(grad @ grad / curvature, rel=0.01)


def test_block_allocation_minimises_the_variance():
    products, kernels = [9.0, 4.0, 1.0], [1.0, 0.5, 0.2]
    plan = theory.allocate_blocks(products, kernels, joint_variance=100.0)
    variances = np.array(products) + np.array(kernels)
    assert (variances / np.array(plan.shares)).sum() == pytest.approx(plan.variance)
    for shares in np.random.default_rng(0).dirichlet([5, 5, 5], 50):
        assert (variances / shares).sum() >= plan.variance - 1e-9


class TestFiniteDifference:
    @given(noise=st.floats(1e-9, 1e-3), third=st.floats(1e-2, 1e5))
    def test_optimum(self, noise, third):
        best = theory.optimal_eps(noise, third)
        smallest = theory.finite_difference_error(best, noise, third)
        assert smallest == pytest.approx(theory.error_at_optimum(noise, third))
        for factor in (0.5, 0.9, 1.1, 2.0):
            assert theory.finite_difference_error(best * factor, noise, third) > smallest

    def test_error_of_real_noisy_differences(self):
        rng = np.random.default_rng(0)
        for eps in (0.02, 0.2, 0.6):
            noise = 1e-3 * rng.standard_normal((2, 100_000))
            ends = np.exp(2 * eps) + noise[0], np.exp(-2 * eps) + noise[1]
            rms = np.sqrt(np.mean(((ends[0] - ends[1]) / (2 * eps) - 2) ** 2))
            third = 8.0 * (1 + (2 * eps) ** 2 / 20)  # the next term of the series, at mu = 0.6: 7%
            assert rms == pytest.approx(theory.finite_difference_error(eps, 1e-3, third), rel=0.03)

    def test_noise_estimate(self):
        rng = np.random.default_rng(0)
        line = np.linspace(0, 0.01, 12)
        estimates = [
            theory.noise_from_differences(np.sin(line) + 1e-6 * rng.standard_normal(12), order=3) for _ in range(400)
        ]
        # Third differences of independent noise are correlated by 1, -3/4, 3/10, -1/20, so the mean of the squares of
        # nine has the relative variance 2/81 * (9 * 1 + 16 * 9/16 + 14 * 9/100 + 12 * 1/400) = 0.48; that of its root
        # is a quarter.
        bound = 5 * math.sqrt(0.48 / 4 / len(estimates))  # 0.09
        assert np.sqrt(np.mean(np.square(estimates))) == pytest.approx(1e-6, rel=bound)

    def test_refusals(self):
        with pytest.raises(UsageError, match="no eps is best"):
            theory.optimal_eps(1e-7, 0.0)
        with pytest.raises(UsageError, match="at least four values"):
            theory.noise_from_differences([1.0, 2.0])


class TestBounds:
    def test_printed_bound_has_the_wrong_scale(self):
        """Logits scaled by c scale the error by c^2 but the printed bound by c: it fails for large c (erratum 1)."""
        jac = heavy_tailed(4, 30, 1) * 100
        moments = moments_of(jac, jac)
        norm = math.sqrt(moments.norm_o_sq)
        error = math.sqrt(theory.expected_squared_error(moments, 10))
        assert error > theory.kernel_bound(norm, norm, 4, 10, form="printed")
        assert error < theory.kernel_bound(norm, norm, 4, 10, form="corrected")

    def test_normalising_first_removes_the_root_of_v(self):
        ratio = theory.kernel_bound(2, 2, 100, 10) / theory.kernel_bound(2, 2, 100, 10, form="normalised")
        assert ratio == pytest.approx(10)

    @given(st.integers(2, 50))
    def test_projector_norm(self, outputs):
        pi = np.random.default_rng(outputs).dirichlet(np.ones(outputs))
        dense = np.eye(outputs) - np.ones((outputs, 1)) @ pi[None]
        expected = np.linalg.norm(dense, 2)
        assert theory.projector_norm(np.linalg.norm(pi), outputs) == pytest.approx(expected)
        assert 1 - 1e-9 <= expected <= math.sqrt(outputs) + 1e-9

    def test_explicit_distortion_solves_its_equation(self):
        eps = theory.jl_distortion_explicit(10, 2000)
        assert 2000 * (eps**2 / 4 - eps**3 / 6) == pytest.approx(math.log(4 * 100 / 0.05), rel=1e-6)
        assert theory.jl_distortion_explicit(50_272, 300) == math.inf

    def test_the_paper_bound_is_vacuous_where_it_is_used(self):
        assert theory.belief_bound(1, 1, 1, 1, 50_272, 50) == pytest.approx(104, abs=1)

    def test_classical(self):
        assert theory.classical_rate(400, 1, 4, 1) == pytest.approx(10)
        assert theory.classical_learning_rate(100, 2, 4) == pytest.approx(0.02)


def test_missing_moments_are_asked_for():
    with pytest.raises(UsageError, match="needs diagonal="):
        theory.expected_squared_error(theory.KernelMoments(1, 1, 0.5), 3, "rademacher")
    with pytest.raises(UsageError, match="needs dim="):
        theory.expected_relative_error(0.5, 3, "sphere")
    with pytest.raises(UsageError, match="at most 5 directions"):
        theory.expected_squared_error(theory.KernelMoments(1, 1, 0.5, dim=5), 6, "orthogonal")
    with pytest.raises(UsageError, match=r"lies in \(0, 1\]"):
        theory.expected_relative_error(1.5, 3)


NOTHING = theory.KernelMoments(norm_o_sq=1.0, norm_u_sq=1.0, kernel_sq=0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.relative_error(NOTHING, 5), "The exact kernel is zero, so no error is relative to it"),
        (lambda: NOTHING.single_draw_variance, "The exact kernel is zero"),
        (lambda: theory.expected_belief_error(theory.BeliefMoments(4.0, 1.0, 0.0), 5), "The exact kernel is zero"),
        (lambda: theory.KernelMoments(0.0, 1.0, 0.0).rho, "A Jacobian is zero"),
        (lambda: theory.single_draw_variance(0.0), r"the similarity of two Jacobians lies in \(0, 1\]"),
        (lambda: theory.required_perturbations(0.5, math.nan), "tolerance is nan"),
        (lambda: theory.required_perturbations(math.nan, 0.1), "rho is nan"),
        (lambda: theory.required_perturbations(0.5, 0.1, confidence=math.nan), "confidence is nan"),
        (lambda: theory.optimal_shrinkage(0.5, 0), "number of perturbations must be a positive whole number, not 0"),
        (lambda: theory.shrunken_relative_error(0.5, 0), "positive whole number, not 0"),
        (lambda: theory.trajectory_relative_error(0.5, 0, 5), "positive whole number, not 0"),
        (lambda: theory.trajectory_relative_error(0.5, 1, 0), "num_steps must be positive and finite, not 0"),
        (lambda: theory.expected_relative_error(0.5, math.nan), "positive whole number, not nan"),
        (lambda: theory.expected_relative_error(0.5, 2.5), "positive whole number, not 2.5"),
        (lambda: theory.curvature_ratio(1.0, 1.0, 0.0), "no curvature along the gradient"),
        (lambda: theory.learning_rate_ratio(0, 5.0), "positive whole number, not 0"),
        (
            lambda: theory.optimal_learning_rate(0, gradient_sq=1.0, trace_hessian=1.0, gradient_curvature=1.0),
            "positive whole number, not 0",
        ),
        (
            lambda: theory.random_walk_rate(0.1, gradient_norm=0.0, num_perturbations=1, num_steps=5),
            "gradient_norm must be positive and finite, not 0.0",
        ),
        (lambda: theory.allocate_blocks([0.0, 0.0], [0.0, 0.0], 0.0), "All blocks have zero Jacobians"),
        (lambda: theory.allocate_blocks([-1.0], [0.0], 0.0), "at least 0 and finite"),
        (lambda: theory.finite_difference_error(0.0, 1e-7, 1.0), "eps must be positive and finite, not 0.0"),
        (lambda: theory.third_derivative_from_differences(1.0, 2.0, 0.0), "eps must be positive and finite, not 0.0"),
        (lambda: theory.optimal_eps(math.nan, 1.0), "loss_noise is nan"),
        (lambda: theory.error_at_optimum(0.0, 0.0), "third derivative is zero"),
        (lambda: theory.noise_from_differences([1.0, 2.0, 1.0, 2.0], order=2.5), "differences of order 2.5"),
        (lambda: theory.jl_distortion(10, 0), "positive whole number, not 0"),
        (lambda: theory.jl_distortion(0, 10), "number of outputs must be a positive whole number, not 0"),
        (lambda: theory.jl_distortion_explicit(10, 10, failure=0.0), "failure must be positive and finite, not 0.0"),
        (lambda: theory.classical_rate(10, 1.0, 1, 0), "num_steps must be positive and finite, not 0"),
        (lambda: theory.classical_learning_rate(10, 0.0, 1), "smoothness must be positive and finite, not 0.0"),
        (lambda: theory.sampling_share(math.nan), "batch size must be a positive whole number, not nan"),
        (lambda: theory.sampling_share(4, math.inf), "population must be a positive whole number, not inf"),
        (lambda: theory.low_rank_excess([(4, 4)], rank=0), "rank must be a positive whole number, not 0"),
        (lambda: theory.expected_nzk_factor("gaussian", 2.5), "whole number of at least 1, not 2.5"),
    ],
)
def test_zeros_and_numbers_that_are_none_are_refused_in_one_sentence(call, message):
    """They ended with Python's errors of division, or of numbers that are not one."""
    with pytest.raises(UsageError, match=message):
        call()


def test_limits_without_a_kernel_and_without_noise():
    assert NOTHING.rho == 0.0
    assert theory.expected_squared_error(NOTHING, 4) == 0.25
    assert theory.expected_belief_error(theory.BeliefMoments(4.0, 1.0, 0.0), 4, lr=0.1) == pytest.approx(0.1)
    assert theory.optimal_eps(0.0, 100.0) == 0.0
    assert theory.error_at_optimum(0.0, 100.0) == 0.0
    assert theory.error_at_optimum(1e-12, 100.0) == pytest.approx(
        math.sqrt(3) / 2 * 1e-12 ** (2 / 3) * (100 / 3) ** (1 / 3)
    )
