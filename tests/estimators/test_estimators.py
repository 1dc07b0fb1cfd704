"""Estimators: bias by exact integration, second moments, schedules, counts of forward passes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from zokernel.errors import UsageError
from zokernel.estimators import smoothed
from zokernel.estimators.curvature import TwoPointCurvature
from zokernel.estimators.forward_derivative import ForwardDerivative
from zokernel.estimators.leave_one_out import LeaveOneOut
from zokernel.estimators.one_sided import OneSided
from zokernel.estimators.per_example import PerExample
from zokernel.estimators.population import Population
from zokernel.estimators.richardson import Richardson
from zokernel.estimators.smoothed import Smoothed, signed_uniform
from zokernel.estimators.two_point import TwoPoint

V = np.array([0.9, -0.5, 0.4])
THETA = np.array([0.3, 0.1, -0.2])


def loss(theta):
    return math.exp(V @ theta) + math.sin(theta.sum())


def gradient(theta):
    return math.exp(V @ theta) * V + math.cos(theta.sum())


def exponential(theta):
    return math.exp(V @ theta)


def signs():
    """Every Rademacher direction in three dimensions, equally likely."""
    return [(np.array(u), 1 / 8) for u in itertools.product((-1.0, 1.0), repeat=3)]


def gaussians(points=12):
    """Gauss-Hermite quadrature of three independent normals."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    weights = weights / weights.sum()
    grid = itertools.product(zip(nodes, weights, strict=True), repeat=3)
    return [(np.array([n for n, _ in point]), math.prod(w for _, w in point)) for point in grid]


RADII = [(float(r), float(w) / 2) for r, w in zip(*np.polynomial.legendre.leggauss(14), strict=True)]


def mean_and_second_moment(estimator, monkeypatch, function=loss, directions=None, step=0):
    """Integrate one direction's estimate exactly over directions and, for smoothed ones, over radii."""
    mean, second = np.zeros(3), 0.0
    radii = RADII if isinstance(estimator, Smoothed) else [(0.0, 1.0)]
    for r, radius_weight in radii:
        monkeypatch.setattr(smoothed, "signed_uniform", lambda *_, r=r: r)
        for u, weight in directions or signs():
            estimate = estimator(lambda offsets, u=u: function(THETA + offsets.get(0, 0.0) * u), seed=0, step=step)
            g = estimate.coefficients[0] * u
            mean += radius_weight * weight * g
            second += radius_weight * weight * float(g @ g)
    return mean, second


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda eps: TwoPoint(eps), 2),
        (lambda eps: TwoPointCurvature(eps), 2),
        (lambda eps: Richardson(eps), 4),
        (lambda eps: Smoothed(eps, 1, order=1, constant=1.0), 2),
        (lambda eps: Smoothed(eps, 1, order=3, constant=1.0), 4),
        (lambda eps: Smoothed(eps, 1, order=5, constant=1.0), 6),
        (lambda eps: Smoothed(eps, 1, order=3, constant=1.0, radius=0.5, schedule="lr_compensated", total_steps=9), 2),
        (lambda eps: Smoothed(eps, 1, order=3, constant=1.0, schedule="rescaled", shrink_to=0.5, total_steps=9), 4),
    ],
    ids=["mezo", "curvature", "richardson", "K1", "K3", "K5", "K3_half_range", "K3_rescaled"],
)
def test_bias_falls_as_the_stated_power_of_eps(make, order, monkeypatch):
    """Halving eps twice divides the bias by 2^order each time, up to the next order's share at eps = 0.2 (4%)."""
    radii = [0.4, 0.2, 0.1]
    errors = []
    for eps in radii:
        mean, _ = mean_and_second_moment(make(eps), monkeypatch, step=8)
        errors.append(np.linalg.norm(mean - gradient(THETA)))
    slopes = np.diff(np.log(errors)) / np.diff(np.log(radii))
    assert slopes == pytest.approx([order, order], abs=0.15)


@pytest.mark.parametrize(
    ("estimator", "leading"),
    [
        (TwoPoint(0.1), lambda eps, n: eps**2 / 2 * n),
        (Smoothed(0.1, 1, order=1, constant=1.0), lambda eps, n: 3 / 5 * eps**2 / 2 * n),
        (Smoothed(0.1, 1, order=3, constant=1.0), lambda eps, n: -5 / 21 * eps**4 / 8 * n**2),
        (Smoothed(0.2, 1, order=5, constant=1.0), lambda eps, n: 35 / 429 * eps**6 / 48 * n**3),
    ],
    ids=["mezo", "K1", "K3", "K5"],
)
def test_leading_bias_with_gaussian_directions(estimator, leading, monkeypatch):
    """Theory C.2.9: for L = exp(v.theta), E g - grad L = C(eps, |v|^2) grad L; the next order adds |v|^2 eps^2 (5%)."""
    mean, _ = mean_and_second_moment(estimator, monkeypatch, function=exponential, directions=gaussians())
    gradient_of = exponential(THETA) * V
    relative_bias = (mean - gradient_of) @ gradient_of / (gradient_of @ gradient_of)
    assert relative_bias == pytest.approx(leading(estimator.eps, float(V @ V)), rel=0.05)


@pytest.mark.parametrize("order", [3, 5])
def test_kernels_of_order_three_and_up_are_exact_on_cubics(order, monkeypatch):
    def cubic(theta):
        return 0.7 * theta[0] ** 3 - theta[0] * theta[1] * theta[2] + theta[1] ** 2

    x, y, z = THETA
    exact = np.array([2.1 * x**2 - y * z, -x * z + 2 * y, -x * y])
    mean, _ = mean_and_second_moment(Smoothed(0.5, 1, order=order, constant=1.0), monkeypatch, function=cubic)
    assert mean == pytest.approx(exact, abs=1e-12)
    plain, _ = mean_and_second_moment(TwoPoint(0.5), monkeypatch, function=cubic)
    assert np.linalg.norm(plain - exact) > 0.05


@pytest.mark.parametrize(("order", "ratio"), [(1, 1.8), (3, 6.25), (5, 11025 / 832)])
def test_second_moments_are_the_stated_multiples_of_mezos(order, ratio, monkeypatch):
    def linear(theta):
        return float(V @ theta)

    _, mezo = mean_and_second_moment(TwoPoint(0.1), monkeypatch, function=linear)
    _, kernel = mean_and_second_moment(Smoothed(0.1, 1, order=order, constant=1.0), monkeypatch, function=linear)
    _, richardson = mean_and_second_moment(Richardson(0.1), monkeypatch, function=linear)
    assert kernel / mezo == pytest.approx(ratio, rel=1e-9)
    assert richardson / mezo == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("schedule", ["none", "literal", "rescaled", "lr_compensated"])
@pytest.mark.parametrize("radius", [1.0, 0.5])
@pytest.mark.parametrize("step", [0, 5, 9, 50])
def test_gain_and_second_moment_are_what_the_estimator_reports(schedule, radius, step, monkeypatch):
    def linear(theta):
        return float(V @ theta)

    estimator = Smoothed(0.1, 1, radius=radius, schedule=schedule, total_steps=10)
    mean, second = mean_and_second_moment(estimator, monkeypatch, function=linear, step=step)
    facts = estimator.facts_at(step)
    assert mean == pytest.approx(facts.gain * V, rel=1e-9)
    assert second == pytest.approx(facts.second_moment_ratio * facts.gain**2 * 3 * float(V @ V), rel=1e-9)
    if schedule in ("rescaled", "lr_compensated"):
        assert facts.gain == pytest.approx(4.0 if schedule == "lr_compensated" else estimator.facts_at(0).gain)


def test_a_rescaled_range_is_a_smaller_eps():
    def cubic(offsets):
        x = 0.3 + offsets.get(0, 0.0)
        return x**3

    shrunk = Smoothed(0.2, 1, schedule="rescaled", shrink_to=0.25, total_steps=5)
    small = Smoothed(0.05, 1)
    first = shrunk(cubic, seed=3, step=4).coefficients[0]
    assert first == pytest.approx(small(cubic, seed=3, step=4).coefficients[0], rel=1e-9)


def test_ranges_shrink_linearly_to_the_stated_share():
    estimator = Smoothed(radius=0.8, schedule="literal", shrink_to=0.25, total_steps=101)
    assert [estimator.range_at(t) for t in (0, 50, 100, 1000)] == pytest.approx([0.8, 0.5, 0.2, 0.2])


def test_radii_are_uniform_and_independent():
    """Mean 0, variance 1/3, lag correlations 0: each |z| < 4 with n = 20000 (variances 1/3, 4/45 and 1/9 over n)."""
    draws = np.array([[signed_uniform(1, step, index) for index in range(4)] for step in range(5000)])
    n = draws.size
    assert abs(draws.mean()) < 4 * math.sqrt(1 / 3 / n)
    assert abs((draws**2).mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / n)
    for product in (draws[:, :-1] * draws[:, 1:], draws[:-1] * draws[1:]):
        assert abs(product.mean()) < 4 * math.sqrt(1 / 9 / product.size)
    assert len(np.unique(draws)) == n


def test_radii_do_not_touch_the_global_generator():
    before = np.random.get_state()[1].copy()
    signed_uniform(0, 0, 0)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize(
    "estimator",
    [
        TwoPoint(num_perturbations=3),
        TwoPoint(num_perturbations=6, schedule="linear", total_steps=7),
        Smoothed(num_perturbations=2),
        Richardson(num_perturbations=2),
        OneSided(num_perturbations=5),
        OneSided(num_perturbations=5, normalize=True),
        TwoPointCurvature(num_perturbations=2),
    ],
    ids=lambda e: type(e).__name__,
)
def test_forward_passes_are_as_declared(estimator):
    for step in range(8):
        calls = []
        estimate = estimator(lambda offsets: calls.append(offsets) or float(len(calls)), seed=0, step=step)  # noqa: B023
        assert len(calls) == estimator.forwards_at(step) == len(estimate.losses)
        assert estimate.loss == pytest.approx(sum(range(1, len(calls) + 1)) / len(calls))


def test_one_sided_differences_are_off_by_half_eps_times_the_curvature():
    estimate = OneSided(0.3)(lambda offsets: 2.0 * offsets.get(0, 0.0) + 5.0 * offsets.get(0, 0.0) ** 2, seed=0, step=0)
    assert estimate.coefficients[0] == pytest.approx(2.0 + 0.3 / 2 * 10.0)


def test_curvature_is_exact_on_a_quadratic():
    def quadratic(offsets):
        x, y = 1.0 + offsets.get(0, 0.0), -2.0 + offsets.get(1, 0.0)
        return 1.5 * x**2 + 0.25 * y**2

    assert TwoPointCurvature(0.3, 2)(quadratic, seed=0, step=0).curvature == pytest.approx((3.0, 0.5))


def test_normalised_estimates_do_not_depend_on_the_scale_of_the_loss():
    def line(scale):
        return lambda offsets: scale * sum((i + 1) * o for i, o in offsets.items())

    small, large = (OneSided(0.1, 4, normalize=True)(line(s), seed=0, step=0).coefficients for s in (1.0, 1e6))
    assert small == pytest.approx(large)
    flat = OneSided(0.1, 4, normalize=True)(lambda offsets: 3.0, seed=0, step=0)
    assert set(flat.coefficients.values()) == {0.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TwoPoint(eps=0.0), r"eps must be positive, not 0\.0"),
        (lambda: TwoPoint(num_perturbations=0), "num_perturbations must be a whole number of at least 1, not 0"),
        (lambda: TwoPoint(schedule="linear"), "linear sample schedule needs total_steps"),
        (lambda: TwoPoint(schedule="cosine"), "no sample schedule 'cosine'"),
        (lambda: Smoothed(schedule="literal"), "radius schedule 'literal' needs total_steps"),
        (lambda: Smoothed(schedule="shrink"), "no radius schedule 'shrink'"),
        (lambda: Smoothed(radius=0.0), r"radius must be positive, not 0\.0"),
        (lambda: Smoothed(shrink_to=0.0), r"shrink_to must be in \(0, 1\], not 0\.0"),
        (lambda: Smoothed(constant=0.0), "constant must not be zero"),
        (lambda: Smoothed(order=0), "whole order of 1 or higher, not 0"),
        (lambda: Smoothed(paper_k5=True), "kernel of order 5 only, not of order 3"),
        (lambda: OneSided(num_perturbations=1, normalize=True), "spread of the losses needs num_perturbations"),
        (lambda: LeaveOneOut(num_perturbations=1), "Leaving one loss out needs the loss of another"),
        (lambda: LeaveOneOut(eps=0.0), r"eps must be positive, not 0\.0"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize(("distribution", "kurtosis"), [("rademacher", 1.0), ("gaussian", 3.0)])
def test_bias_of_the_two_point_estimator_depends_on_the_kurtosis(distribution, kurtosis):
    """On a cubic the leading term is all of the bias; the mean over directions is exact, by enumeration."""
    from itertools import product

    import numpy as np

    eps, theta = 0.3, np.array([0.4, -0.7, 1.1])
    cubic = np.zeros((3, 3, 3))
    for (i, j, k), value in {(0, 0, 0): 0.7, (0, 0, 1): 0.2, (0, 1, 2): -0.5, (1, 2, 2): 0.9, (2, 2, 2): -0.3}.items():
        for a, b, c in {(i, j, k), (i, k, j), (j, i, k), (j, k, i), (k, i, j), (k, j, i)}:
            cubic[a, b, c] = value

    def loss(w):
        return np.einsum("ijk,i,j,k->", cubic, w, w, w) / 6

    if distribution == "rademacher":
        nodes, weights = np.array([-1.0, 1.0]), np.array([0.5, 0.5])
    else:
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)
        weights = weights / weights.sum()
    mean = np.zeros(3)
    for indices in product(range(len(nodes)), repeat=3):
        z, weight = nodes[list(indices)], weights[list(indices)].prod()
        estimate = TwoPoint(eps)(lambda o, z=z: float(loss(theta + o[0] * z)), seed=0, step=0)
        mean += weight * estimate.coefficients[0] * z
    gradient = np.einsum("ijk,j,k->i", cubic, theta, theta) / 2
    trace, diagonal = np.einsum("iik->k", cubic), np.einsum("kkk->k", cubic)
    bias = eps**2 / 2 * trace + eps**2 / 6 * (kurtosis - 3) * diagonal
    assert np.abs(mean - gradient - bias).max() < 1e-12
    assert np.abs(bias).max() > 1e-3


def quadratic_problem(dim=12):
    generator = np.random.default_rng(3)
    square = generator.normal(size=(dim, dim))
    return square @ square.T / dim + 2 * np.eye(dim), generator.normal(size=dim)


def estimates(estimator, gradient, hessian, draws, law):
    """Return (n, d) estimates at the origin of a quadratic, with directions of the given law."""
    generator = np.random.default_rng(7)
    samples = np.empty((draws, len(gradient)))
    for k in range(draws):
        shape = (estimator.num_perturbations, len(gradient))
        z = generator.normal(size=shape) if law == "gaussian" else generator.choice([-1.0, 1.0], size=shape)

        def evaluate(offsets, z=z):
            w = sum((o * z[i] for i, o in offsets.items()), np.zeros(len(gradient)))
            return float(5.0 + gradient @ w + w @ hessian @ w / 2)

        samples[k] = sum(c * z[i] for i, c in estimator(evaluate, seed=0, step=k).coefficients.items())
    return samples


def second_moment(make, eps, count, gradient, hessian):
    """The exact E|g^|^2 of Rademacher directions on a quadratic."""
    dim, squared = len(gradient), float(gradient @ gradient)
    variance = 2 * ((hessian**2).sum() - (np.diag(hessian) ** 2).sum())
    s2 = squared + eps**2 * variance / 4
    if make is LeaveOneOut:
        return dim * s2 / (count - 1) + ((count - 1) ** 2 + 1) / (count * (count - 1)) * squared
    if make is OneSided:
        return dim / count * (s2 + eps**2 * np.trace(hessian) ** 2 / 4) + (count - 1) / count * squared
    return (dim + count - 1) / count * squared


@pytest.mark.parametrize("make", [LeaveOneOut, OneSided, TwoPoint])
@pytest.mark.parametrize("count", [2, 5])
def test_mean_and_second_moment_on_a_quadratic_are_exact(make, count):
    """Over 6,000 draws with a curvature that matters (eps tr H / 2 = 1.6 |g|): |z| < 4.5, 13 scores."""
    hessian, gradient = quadratic_problem()
    eps = 0.3
    samples = estimates(make(eps, count), gradient, hessian, 6000, "rademacher")
    scores = (samples.mean(0) - gradient) / (samples.std(0) / math.sqrt(len(samples)))
    assert np.abs(scores).max() < 4.5
    squares = (samples**2).sum(1)
    exact = second_moment(make, eps, count, gradient, hessian)
    assert abs(squares.mean() - exact) < 4.5 * squares.std() / math.sqrt(len(squares))


@pytest.mark.parametrize(("law", "kurtosis"), [("rademacher", 1), ("gaussian", 3)])
def test_leave_one_out_on_a_linear_loss(law, kurtosis):
    _, gradient = quadratic_problem()
    dim, count, flat = len(gradient), 3, np.zeros((12, 12))
    samples = estimates(LeaveOneOut(0.1, count), gradient, flat, 6000, law)
    exact = ((dim + kurtosis + count - 2) / count + (dim + 1) / (count * (count - 1))) * (gradient @ gradient)
    squares = (samples**2).sum(1)
    assert abs(squares.mean() - exact) < 4.5 * squares.std() / math.sqrt(len(squares))


def test_at_equal_forwards_leaving_one_out_costs_a_direction_and_ignores_the_trace():
    hessian, gradient = quadratic_problem()
    flat = np.zeros_like(hessian)
    for forwards in (2, 4, 16):
        left = second_moment(LeaveOneOut, 0.3, forwards, gradient, flat)
        base = second_moment(OneSided, 0.3, forwards - 1, gradient, flat)
        assert left - base == pytest.approx(2 / (forwards * (forwards - 1)) * (gradient @ gradient), rel=1e-9)
    # One-sided differences pay d eps^2 (tr H)^2 / 4 besides, which all losses of leave one out share.
    curved = second_moment(LeaveOneOut, 0.3, 16, gradient, hessian)
    assert curved < 0.5 * second_moment(OneSided, 0.3, 15, gradient, hessian)
    same = LeaveOneOut(0.1, 4).combine([1.0, 2.0, 4.0, 1.0], seed=0, step=0).coefficients
    shifted = LeaveOneOut(0.1, 4).combine([101.0, 102.0, 104.0, 101.0], seed=0, step=0).coefficients
    assert shifted == pytest.approx(same)
    assert same == pytest.approx({0: -1 / 0.3, 1: 0.0, 2: 2 / 0.3, 3: -1 / 0.3})
    assert LeaveOneOut(0.1, 4).forwards_at(0) == 4


def test_an_estimator_reports_how_far_it_moves_the_weights():
    assert [(kind(eps=0.5).eps, kind(eps=0.5).reach) for kind in (TwoPoint, OneSided, Smoothed)] == [(0.5, 0.5)] * 3
    assert (PerExample(OneSided(0.5)).eps, PerExample(OneSided(0.5)).reach) == (0.5, 0.5)
    assert (ForwardDerivative().eps, ForwardDerivative().reach) == (None, 0.01)


def test_a_growing_number_of_directions_ends_one_below_the_largest():
    """As published, step t of T has max(1, floor(P t / T)) directions, and t stays below T."""
    estimator = TwoPoint(num_perturbations=4, schedule="linear", total_steps=8)
    assert [estimator.directions_at(step) for step in range(8)] == [1, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "kind", [TwoPoint, OneSided, LeaveOneOut, Population, Smoothed, Richardson, TwoPointCurvature, ForwardDerivative]
)
def test_no_estimator_takes_a_fraction_of_a_direction_or_a_text(kind):
    for value in (2.0, 2.5, "2", math.nan, math.inf, True, None, 0, -1):
        with pytest.raises(UsageError, match=f"num_perturbations must be a whole number of at least 1, not {value!r}"):
            kind(num_perturbations=value)
    for value in ("1e-3", math.nan, math.inf, True, None, 0.0, -1e-3) if kind is not ForwardDerivative else ():
        with pytest.raises(UsageError, match=f"eps must be positive, not {value!r}"):
            kind(eps=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TwoPoint(schedule="linear", total_steps="x"),
            "total_steps must be a whole number of at least 1, not 'x'",
        ),
        (lambda: TwoPoint(schedule="linear"), "The linear sample schedule needs total_steps"),
        (
            lambda: Smoothed(schedule="rescaled", total_steps=0),
            "total_steps must be a whole number of at least 1, not 0",
        ),
        (lambda: Smoothed(schedule="literal"), "The radius schedule 'literal' needs total_steps"),
        (lambda: Smoothed(order=2.5), "a whole order of 1 or higher, not 2.5"),
        (lambda: Smoothed(order=[3]), "a whole order of 1 or higher"),
        (lambda: Smoothed(constant=math.inf), "finite and not zero, not inf"),
        (lambda: Smoothed(constant="4"), "finite and not zero, not '4'"),
        (lambda: Smoothed(radius=math.inf), "radius must be positive, not inf"),
        (lambda: Smoothed(shrink_to="half"), r"shrink_to must be in \(0, 1\], not 'half'"),
        (lambda: OneSided(num_perturbations=2, normalize="no"), "normalize must be True or False, not 'no'"),
        (lambda: Population(antithetic=1), "antithetic must be True or False, not 1"),
        (lambda: PerExample(TwoPoint), "cannot be applied to the loss of one example"),
        (lambda: PerExample(TwoPoint(), whiten="yes"), "whiten must be True or False, not 'yes'"),
    ],
)
def test_wrong_values_are_refused_when_an_estimator_is_made(make, message):
    with pytest.raises(UsageError, match=message):
        make()
