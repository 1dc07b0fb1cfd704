"""Smoothing kernels in exact arithmetic: the formula, its moments, what shrinking the range does to them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zokernel.errors import UsageError
from zokernel.theory.smoothing import convergence_bounds, smoothing_kernel

F = Fraction
RANGES = st.fractions(min_value=F(1, 50), max_value=1, max_denominator=997)


@pytest.mark.parametrize("order", range(1, 8))
def test_moments_up_to_the_order_are_those_of_the_definition(order):
    kernel = smoothing_kernel(order)
    for s in range(order + 1):
        assert kernel.moment(s) == (1 if s == 1 else 0)


@pytest.mark.parametrize(("order", "leftover"), [(1, F(3, 5)), (3, F(-5, 21)), (5, F(35, 429))])
def test_the_first_moment_that_does_not_vanish(order, leftover):
    assert smoothing_kernel(order).moment(order + 2) == leftover


@pytest.mark.parametrize(
    ("order", "coefficients"),
    [
        (1, [0, 3]),
        (3, [0, F(75, 4), 0, F(-105, 4)]),
        (5, [0, 35 * F(105, 64), 0, -126 * F(105, 64), 0, 99 * F(105, 64)]),
        (7, [0, 105 * F(315, 256), 0, -693 * F(315, 256), 0, 1287 * F(315, 256), 0, -715 * F(315, 256)]),
    ],
)
def test_coefficients(order, coefficients):
    assert list(smoothing_kernel(order).coefficients) == coefficients
    assert smoothing_kernel(order + 1).coefficients == smoothing_kernel(order).coefficients


def test_the_printed_constant_of_order_five_is_a_misprint():
    printed = smoothing_kernel(5, paper_k5=True)
    assert printed.coefficients[1] == 35 * F(195, 64)
    assert printed.moment(1) == F(13, 7)
    assert printed.moment(3) == printed.moment(5) == 0


@pytest.mark.parametrize(("order", "ratio"), [(1, F(9, 5)), (3, F(25, 4)), (5, F(11025, 832))])
def test_second_moment_ratios(order, ratio):
    kernel = smoothing_kernel(order)
    assert kernel.squared_moment(2) == ratio
    assert kernel.facts().second_moment_ratio == float(ratio)


def test_noise_ratio_of_order_three():
    assert smoothing_kernel(3).squared_moment(0) == F(75, 4)


@given(a=RANGES)
def test_shrinking_the_range_breaks_the_moments_as_computed_by_hand(a):
    k1, k3, k5 = (smoothing_kernel(order) for order in (1, 3, 5))
    assert k3.moment(1, a) == F(25, 4) * a**2 - F(21, 4) * a**4
    assert k3.moment(3, a) == F(15, 4) * a**4 * (1 - a**2)
    assert k3.squared_moment(2, a) == F(1125, 16) * a**4 - F(1125, 8) * a**6 + F(1225, 16) * a**8
    assert (k1.moment(1, a), k1.moment(3, a)) == (a**2, 3 * a**4 / 5)
    assert k5.moment(1, a) == F(1225, 64) * a**2 - F(1323, 32) * a**4 + F(1485, 64) * a**6


@given(a=RANGES, order=st.sampled_from([1, 3, 5, 7]))
def test_rescaling_the_kernel_with_the_range_keeps_the_moments(a, order):
    """K(r/a)/a on [-a, a] has the moments a^(s-1) E[r^s K] of the full range: the first is kept, zeros stay zeros."""
    kernel = smoothing_kernel(order)
    stretched = tuple(c / a ** (k + 1) for k, c in enumerate(kernel.coefficients))
    rescaled = type(kernel)(stretched, order)
    for s in range(order + 1):
        assert rescaled.moment(s, a) == kernel.moment(s)
    assert rescaled.squared_moment(0, a) == kernel.squared_moment(0) / a**2


@pytest.mark.parametrize(
    ("a", "gain", "bias", "second", "noise"),
    [
        (1.0, 4.00, 0.0, 6.25, 18.75),
        (0.9, 6.47, 0.289, 1.66, 6.90),
        (0.75, 7.42, 0.280, 1.42, 6.15),
        (0.5, 4.94, 0.142, 1.64, 12.16),
        (0.25, 1.48, 0.037, 1.76, 48.0),
        (0.1, 0.248, 0.006, 1.79, 300.0),
    ],
)
def test_table_of_shrunk_ranges(a, gain, bias, second, noise):
    facts = smoothing_kernel(3, constant=4).facts(a)
    actual = (facts.gain, facts.bias_ratio, facts.second_moment_ratio, facts.noise_ratio)
    assert actual == pytest.approx((gain, bias, second, noise), rel=4e-3, abs=6e-4)


def test_moments_agree_with_quadrature():
    nodes, weights = np.polynomial.legendre.leggauss(20)
    kernel = smoothing_kernel(7)
    for s in range(12):
        quadrature = float((weights / 2 * nodes**s * kernel(nodes)).sum())
        assert quadrature == pytest.approx(float(kernel.moment(s)), abs=1e-12)


@pytest.mark.parametrize("order", [1, 3, 5, 7])
def test_absolute_moment_agrees_with_a_fine_sum(order):
    kernel = smoothing_kernel(order)
    r = (np.arange(400_000) + 0.5) / 200_000 - 1
    assert kernel.absolute_moment(order) == pytest.approx(2 * np.mean(np.abs(r**order * kernel(r))), rel=1e-7)


def test_evaluates_numbers_arrays_tensors_and_fractions():
    kernel = smoothing_kernel(3)
    assert kernel(F(1, 2)) == F(195, 32)
    assert kernel(0.5) == kernel(np.array([0.5]))[0] == kernel(torch.tensor(0.5, dtype=torch.float64)).item() == 6.09375


def test_negative_weights_are_as_rare_and_as_large_as_stated():
    """r K3(r) < 0 for |r| > sqrt(5/7), the most negative being -7.5 at the ends: those draws step uphill."""
    assert pytest.approx(0.155, abs=5e-4) == 1 - (5 / 7) ** 0.5
    kernel = smoothing_kernel(3)
    assert kernel(1.0) == -7.5
    assert kernel(0.845) > 0 > kernel(0.846)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smoothing_kernel(0), "whole order of 1 or higher, not 0"),
        (lambda: smoothing_kernel(3, paper_k5=True), "kernel of order 5 only, not of order 3"),
        (lambda: smoothing_kernel(3).moment(1, 0), "range of r must be positive and finite, not 0"),
        (lambda: smoothing_kernel(3).moment(-1), "power 0 or higher are known, not -1"),
        (
            lambda: convergence_bounds(smoothness=1, dim=9, noise=0, distance=1, accuracy=0),
            "accuracy must be positive and finite, not 0",
        ),
        (
            lambda: convergence_bounds(smoothness=1, dim=9, noise=0, distance=1, accuracy=0.1, order=1),
            "from order 3 on, not for order 1",
        ),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_convergence_bounds_by_hand():
    bounds = convergence_bounds(smoothness=2.0, dim=50, noise=0.2, distance=3.0, accuracy=0.5)
    kappa = 2 * 18.75
    assert bounds.kappa == kappa
    assert bounds.iterations == round(max(2 * 9 / 0.5, kappa * 50 * 0.04 * 9 / 0.25))
    k3 = smoothing_kernel(3).absolute_moment(3)
    assert bounds.eps_paper == pytest.approx((0.5 / (k3 * 2 * 3)) ** 0.5)
    assert bounds.eps == min(bounds.eps_terms) <= bounds.eps_paper == bounds.eps_terms[2]
    # Every term of eq. 35 is then at most psi, which is what eq. 36 asks for.
    n, eps, psi = bounds.iterations, bounds.eps, 0.5
    assert kappa**0.5 * 50 * 2 * eps * 3 / n**0.5 <= psi * (1 + 1e-9)
    assert k3 * 2 * eps**2 * 3 <= psi * (1 + 1e-9)
    assert k3**2 * 2 * eps**4 * n <= psi * (1 + 1e-9)
    noiseless = convergence_bounds(smoothness=2.0, dim=50, noise=0.0, distance=3.0, accuracy=0.5)
    assert noiseless.iterations == 36
    assert noiseless.step == pytest.approx(1 / (24 * 2 * 37))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smoothing_kernel(2.5), "a whole order of 1 or higher, not 2.5"),
        (lambda: smoothing_kernel([3]), "a whole order of 1 or higher"),
        (lambda: smoothing_kernel(3, constant=float("nan")), "finite and not zero, not nan"),
        (lambda: smoothing_kernel(3, constant=0), "finite and not zero, not 0"),
        (lambda: smoothing_kernel(3).facts(float("inf")), "range of r must be positive and finite, not inf"),
        (
            lambda: convergence_bounds(smoothness=1.0, dim=50, noise=float("nan"), distance=1.0, accuracy=0.5),
            "noise must be at least 0 and finite, not nan",
        ),
        (
            lambda: convergence_bounds(smoothness=0.0, dim=50, noise=0.1, distance=1.0, accuracy=0.5),
            "smoothness must be positive and finite, not 0.0",
        ),
    ],
)
def test_numbers_that_are_none_are_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
