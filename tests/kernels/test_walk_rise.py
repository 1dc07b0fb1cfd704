"""What a random walk costs and what it brings: both against simulations whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from zokernel.kernels.walk_rise import Rise, rise_of, walk_worth


def test_rise_and_slope_are_those_of_a_quadratic():
    """E is R^2 / 2 tr H, O is R times the norm of the gradient, each within four of its errors."""
    generator = torch.Generator().manual_seed(0)
    dim, distance, count = 40, 0.1, 2000
    half = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    hessian, gradient = half @ half.T / dim, torch.randn(dim, generator=generator, dtype=torch.float64)

    def loss(offset):
        return 3.0 + float(offset @ gradient + offset @ hessian @ offset / 2)

    signs = (2.0 * torch.randint(0, 2, (count, dim), generator=generator) - 1).double()
    walks = [(loss(torch.zeros_like(gradient)), loss(distance * z), loss(-distance * z)) for z in signs]
    measured = rise_of(distance, walks)
    assert (measured.loss, measured.distance, measured.forwards) == (3.0, distance, 3 * count)
    assert measured.rise == pytest.approx(distance**2 / 2 * float(hessian.trace()), abs=4 * measured.error)
    off_diagonal = hessian - hessian.diag().diag()  # Rademacher: Var z^T H z = 2 |off-diagonal part|^2
    expected = distance**2 / 2 * math.sqrt(2 * float(off_diagonal.square().sum()) / count)
    assert measured.error == pytest.approx(expected, rel=0.1)
    # A square of a slope has about twice the square of its mean for a variance: 4 sqrt(2 / 2000) / 2 = 6 %.
    assert measured.slope == pytest.approx(float(gradient.norm()), rel=0.07)


@pytest.mark.parametrize("per_example", [False, True])
def test_the_walk_is_the_best_of_all_on_a_loss_with_known_noise(per_example):
    """Normalised steps along a constant gradient g with noise nu, and a rise of rho R^2.

    The simulated run lowers the loss by as much as the formula says, and the walk of ``walk_worth`` is where that less
    the rise is greatest.
    """
    generator = torch.Generator().manual_seed(1)
    dim, noise_scale, batch, count, steps, runs = 100, 10.0, 4, 2, 100, 200
    gradient = torch.ones(dim, dtype=torch.float64) / math.sqrt(dim)
    directions = (batch if per_example else count) * steps
    # Slopes of single examples, or of the batch, with the variance of their own noise.
    examples = 1 if per_example else batch
    rms = math.sqrt(1 + noise_scale / examples)
    decreases = torch.zeros(runs, dtype=torch.float64)
    per_step = batch if per_example else count
    rate = math.sqrt(per_step / steps)  # of a walk of one
    for _ in range(steps):
        shape = (runs, per_step if per_example else 1, dim)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) * math.sqrt(noise_scale / examples / dim)
        z = torch.randn(runs, per_step, dim, generator=generator, dtype=torch.float64)
        slopes = (z * (gradient + noise)).sum(-1) / rms
        decreases += rate / per_step * (slopes[..., None] * z).sum(1) @ gradient
    batch_noise = 1 + noise_scale / batch
    rms_noise = math.sqrt(batch_noise * (1 + noise_scale)) if per_example else batch_noise
    slope = math.sqrt(batch_noise)  # of the mean loss of a batch, as it is measured
    gain = math.sqrt(directions) * slope / rms_noise
    assert float(decreases.mean()) == pytest.approx(gain, abs=4 * float(decreases.std()) / math.sqrt(runs))

    curvature, distance = 50.0, 10.0
    rise = Rise(distance, 1.0, curvature * distance**2, 0.0, slope, 24)
    best = walk_worth(rise, directions=directions, noise=rms_noise)
    candidates = torch.linspace(0.01, 1, 1000, dtype=torch.float64)
    least = candidates[(curvature * candidates**2 - gain * candidates).argmin()]
    assert best == pytest.approx(float(least), abs=0.001)


def test_a_walk_is_shortened_only_if_that_is_certain():
    # kappa = sqrt(100) / 5 = 2, O = 0.1, so a rise of 0.2 is borne.
    run = {"directions": 100, "noise": 2.5}
    assert walk_worth(Rise(0.1, 1.0, 0.19, 0.0, 1.0, 24), **run) == 0.1
    assert walk_worth(Rise(0.1, 1.0, 0.4, 0.11, 1.0, 24), **run) == 0.1
    assert walk_worth(Rise(0.1, 1.0, 0.4, 0.09, 1.0, 24), **run) == pytest.approx(0.05)
    assert walk_worth(Rise(0.1, 1.0, -0.3, 0.09, 1.0, 24), **run) == 0.1
    assert walk_worth(rise_of(0.1, [(1.0, math.inf, 1.2), (1.0, 1.1, 1.2)]), **run) == 0.0
    assert walk_worth(rise_of(0.1, [(1.0, math.nan, 1.2), (1.0, 1.1, 1.2)]), **run) == 0.0
