"""Dense directions have the distributions that they are named for."""

from __future__ import annotations

import math

import pytest
import torch

from zokernel.directions import Dense
from zokernel.directions.philox import stream_key
from zokernel.distributions import direction_distribution

DRAW = {"seed": 11, "step": 5, "index": 2}


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "uniform"])
def test_moments_at_1e8_draws(distribution):
    count, chunk = 100_000_000, 4_000_000
    totals = torch.zeros(3, dtype=torch.float64)
    buffer = {"w": torch.zeros(chunk)}
    for step in range(count // chunk):
        Dense(distribution).add_(buffer, 1.0, seed=0, step=step, index=0, decay=0.0)
        z = buffer["w"]
        square = z * z
        totals += torch.stack(
            [z.sum(dtype=torch.float64), square.sum(dtype=torch.float64), square.dot(square).double()]
        )
    mean, second, fourth = (totals / count).tolist()
    # Standard errors: 1e-4 for the mean, 1.4e-4 for the variance, 3.3e-4 relative for the fourth moment (Gaussian).
    assert abs(mean) < 1e-3
    assert abs(second - 1) < 1e-3
    assert abs(fourth / direction_distribution(distribution).kurtosis - 1) < 1e-3


def test_gaussian_passes_a_kolmogorov_smirnov_test():
    from scipy import stats

    z = Dense("gaussian")({"w": torch.zeros(1_000_000)}, **DRAW)["w"].double().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert stats.kstest(z[::4] * z[1::4], z[2::4] * z[3::4]).pvalue > 1e-3


def test_gaussian_is_box_muller_to_float32_accuracy():
    from zokernel.directions.backends import reference

    position = torch.arange(0, 100_000)
    key = stream_key(0, "w")
    plane = position // 64 % 2
    first = torch.where(plane == 1, position - 64, position)
    a, b = (reference.random_word(p, key, 1, 0).double() for p in (first, first + 64))
    radius = torch.sqrt(-2 * torch.log((torch.floor(a / 2) + 0.5) * 2.0**-31))
    angle = 2 * math.pi * b * 2.0**-32
    exact = radius * torch.where(plane == 1, torch.sin(angle), torch.cos(angle))
    z = Dense("gaussian")({"w": torch.zeros(100_000)}, seed=0, step=1, index=0)["w"].double()
    # Rounding u to 24 bits moves log u by 2^-24 at most, hence the absolute term near zero radius.
    assert ((z - exact).abs() <= 4e-7 * exact.abs() + 4e-7 / radius.clamp_min(1e-3)).all()


def test_sphere_kurtosis_in_small_dimension():
    params = {"w": torch.zeros(4)}
    z = torch.stack([Dense("sphere")(params, seed=0, step=step, index=0)["w"] for step in range(4000)]).double()
    # E z^4 = 3 d / (d + 2) = 2; 16000 coordinates with standard deviation about 2.6 of z^4.
    assert float((z**4).mean()) == pytest.approx(
        direction_distribution("sphere").fourth_moment(4), abs=5 * 2.6 / math.sqrt(16_000)
    )


def test_rademacher_takes_both_signs_only():
    z = Dense("rademacher")({"w": torch.zeros(100_000)}, **DRAW)["w"]
    assert set(z.unique().tolist()) == {-1.0, 1.0}
