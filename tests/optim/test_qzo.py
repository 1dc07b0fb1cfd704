"""QZO: slopes beyond C count as C, each by itself."""

from __future__ import annotations

import pytest
import torch

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.optim import QZO, MeZO, ZerothOrder
from zokernel.optim.updates import ClipSlopes


def steps(optimizer_of, slope):
    """Return how far a parameter moves in one step on a linear loss whose slope along signs is known."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optimizer_of([weight])
    optimizer.step(lambda: slope * weight.sum())
    return float(weight)


def test_slopes_are_clipped_one_by_one():
    gradient = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = QZO([("w", weight)], lr=0.1, num_perturbations=5, clip_slope=1.5, seed=3)
    optimizer.step(lambda: gradient @ weight)
    expected = torch.zeros_like(weight)
    for index in range(5):
        z = {"w": torch.zeros_like(weight)}
        Dense("gaussian").add_(z, 1.0, seed=3, step=0, index=index)
        slope = float(gradient @ z["w"])
        expected -= 0.1 / 5 * max(-1.5, min(1.5, slope)) * z["w"]
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("slope", "expected"), [(0.3, -0.3), (-0.3, 0.3), (7.0, -2.0), (-7.0, 2.0)])
def test_a_step_is_no_longer_than_the_bound(slope, expected):
    lengths = steps(lambda params: QZO(params, lr=1.0, clip_slope=2.0, distribution="rademacher"), slope)
    assert lengths == pytest.approx(expected, rel=1e-6)


def test_without_odd_slopes_it_is_mezo():
    paths = []
    for method, options in ((QZO, {"clip_slope": 1e9}), (MeZO, {}), (ZerothOrder, {"update": "clip_slopes(1e9)"})):
        weight = torch.nn.Parameter(torch.ones(4))
        if method is ZerothOrder:
            options |= {"directions": Dense("gaussian")}
        else:
            options |= {"distribution": "gaussian"}
        optimizer = method([("w", weight)], lr=0.05, **options)
        for _ in range(5):
            optimizer.step(lambda weight=weight: weight.square().sum())
        paths.append(weight.detach().clone())
    assert torch.equal(paths[0], paths[1])
    assert torch.equal(paths[0], paths[2])


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_an_invalid_bound_is_refused(bound):
    with pytest.raises(UsageError, match="largest slope must be positive"):
        ClipSlopes(bound)
