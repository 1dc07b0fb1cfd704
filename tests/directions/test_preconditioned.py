"""Directions scaled by a diagonal curvature: the formula, window by window, in every restore mode."""

from __future__ import annotations

import pytest
import torch

from zokernel.directions import Dense, make_restore
from zokernel.directions.families import preconditioned
from zokernel.directions.families.preconditioned import Preconditioned
from zokernel.errors import UsageError

SHAPES = {"w": (70, 40), "b": (33,), "scalar": (), "none": (0, 2)}
DRAW = {"seed": 3, "step": 2}


@pytest.fixture(autouse=True)
def narrow_windows(monkeypatch):
    monkeypatch.setattr(preconditioned, "WINDOW", 1000)


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return tensors | {"strided": torch.randn(50, 60, generator=generator).to(dtype).t()}


def make_family(tensors, distribution="gaussian"):
    family, generator = Preconditioned(Dense(distribution)), torch.Generator().manual_seed(1)
    family.prepare(tensors)
    for curvature in family.curvature.values():
        curvature.copy_(torch.rand(curvature.shape, generator=generator) + 0.2)
    return family


def test_directions_are_the_base_over_the_root_of_the_curvature():
    tensors = weights()
    family = make_family(tensors)
    z, base = family(tensors, **DRAW, index=1), Dense("gaussian")(tensors, **DRAW, index=1)
    for name in tensors:
        torch.testing.assert_close(z[name], base[name] / family.curvature[name].sqrt(), rtol=1e-6, atol=0)
        assert family.curvature[name].dtype == torch.float32
        assert family.curvature[name].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sweep_adds_the_directions(dtype):
    tensors = weights(dtype)
    family, before = make_family(tensors), {name: tensor.clone() for name, tensor in tensors.items()}
    z = [family({k: v.double() for k, v in tensors.items()}, **DRAW, index=index) for index in (1, 4)]
    family.add_(tensors, [0.5, -0.25], **DRAW, index=[1, 4], decay=0.9)
    unit = torch.finfo(dtype).eps
    for name, old in before.items():
        expected = 0.9 * old.double() + 0.5 * z[0][name] - 0.25 * z[1][name]
        torch.testing.assert_close(tensors[name].double(), expected, rtol=2 * unit, atol=4 * min(unit, 2.0**-23))


def test_memory_layout_does_not_matter():
    for stochastic in (False, True):
        strided = {"w": weights()["strided"].bfloat16()}
        plain = {"w": strided["w"].contiguous()}
        family = make_family(plain)
        for tensors in (strided, plain):
            family.add_(tensors, 0.5, **DRAW, index=0, stochastic=stochastic)
        assert not strided["w"].is_contiguous()
        assert torch.equal(strided["w"], plain["w"])


@pytest.mark.parametrize("mode", ["grid", "copy"])
def test_weights_are_restored_to_the_bit(mode):
    tensors = weights()
    family = make_family(tensors)
    state = make_restore(mode, family, tensors, seed=1, reach=1e-2)
    theta = {name: tensor.clone() for name, tensor in tensors.items()}
    for step in range(3):
        state.move_to(step, {0: 1e-3, 1: 1e-3})
        assert not torch.equal(tensors["w"], theta["w"])
        state.move_to(step, {0: -1e-3})
        state.restore()
        assert all(torch.equal(tensors[name], theta[name]) for name in tensors)


def test_weights_stay_on_their_grid_and_follow_the_updates():
    tensors = weights()
    family = make_family(tensors)
    state = make_restore("grid", family, tensors, seed=1, reach=1e-2)
    theta = {name: tensor.double().clone() for name, tensor in tensors.items()}
    z = family(tensors, seed=1, step=0, index=0)
    state.move_to(0, {0: 1e-3})
    state.commit(0, {0: -1e-2}, decay=0.99)
    for name, old in theta.items():
        grid = state.grid[name]
        assert torch.equal(tensors[name], (tensors[name] / grid).round() * grid)
        torch.testing.assert_close(tensors[name].double(), 0.99 * old - 1e-2 * z[name], rtol=0, atol=1.1 * grid)


def test_the_curvature_is_learned_from_the_squares_of_the_directions():
    tensors = weights()
    family = make_family(tensors)
    before = {name: curvature.clone() for name, curvature in family.curvature.items()}
    z = [Dense("gaussian")(tensors, **DRAW, index=index) for index in range(2)]
    family.learn([3.0, -1.0], 0.1, **DRAW)
    for name, old in before.items():
        expected = old * (0.9 + 0.1 / 4 * (3.0 * z[0][name].square() + 1.0 * z[1][name].square()))
        torch.testing.assert_close(family.curvature[name], expected, rtol=1e-6, atol=1e-7)


def test_the_gain_is_the_mean_of_the_inverse_curvature():
    tensors = {"a": torch.zeros(3), "b": torch.zeros(1)}
    family = Preconditioned(Dense("gaussian"))
    family.prepare(tensors)
    assert family.gain() == 1.0
    family.curvature["a"].fill_(4.0)
    assert family.gain() == (3 * 0.25 + 1) / 4
    assert not family.seeded
    assert not family.couples_tensors
    family.prepare(tensors)  # keeps what has been learned
    assert family.gain() == (3 * 0.25 + 1) / 4


def test_coordinates_must_be_independent():
    with pytest.raises(UsageError, match="independent"):
        Preconditioned(Dense("sphere"))
