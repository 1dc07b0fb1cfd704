"""Perturbed copies are the weights after the same perturbation in place, bit for bit."""

from __future__ import annotations

import pytest
import torch

from zokernel.directions import Dense, LowRank, Sparse, Subspace
from zokernel.directions.placement import place_all
from zokernel.directions.weights.copy_perturbed import Copier, copy_perturbed, copy_perturbed_rows

FAMILIES = {
    "rademacher": Dense("rademacher"),
    "rademacher_torch": Dense("rademacher", backend="torch"),
    "gaussian": Dense("gaussian"),
    "sparse": Sparse(0.3),
    "low_rank": LowRank(rank=2),
    "subspace": Subspace(rank=2),
}
OFFSETS = [{0: 1e-3}, {2: -0.5}, {}, {0: 0.1, 3: -0.2}]


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    # 1000 x 300 crosses the boundary of a segment, 37 of them end within a word of signs.
    shapes = {"a": (1000, 300), "b": (37,), "c": (5, 7), "d": (3, 2, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def in_place(family, tensors, offsets):
    perturbed = {name: tensor.clone() for name, tensor in tensors.items()}
    if offsets:
        family.add_(perturbed, list(offsets.values()), seed=3, step=5, index=list(offsets))
    return perturbed


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("half", [False, True])
def test_copies_are_the_moved_weights(name, offsets, half):
    family, tensors = FAMILIES[name], weights()
    before = {k: v.clone() for k, v in tensors.items()}
    targets = [torch.empty_like(t, dtype=torch.bfloat16 if half else None) for t in tensors.values()]
    copy_perturbed(family, place_all(tensors), targets, offsets, seed=3, step=5)
    for key, target, expected in zip(tensors, targets, in_place(family, tensors, offsets).values(), strict=True):
        assert torch.equal(target, expected.to(target.dtype))
        assert torch.equal(tensors[key], before[key])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("half", [False, True])
def test_copies_made_again_see_new_steps_points_seeds_families_and_weights(name, half):
    tensors, dtype = weights(), torch.bfloat16 if half else torch.float32
    places = place_all(tensors)
    copier = Copier(places)
    draws = [(seed, step, offsets) for seed in (3, 4) for step in (5, 6) for offsets in (*OFFSETS, {1: 0.0})]
    for family in (FAMILIES[name], Dense("rademacher")):
        for seed, step, offsets in draws:
            # Buffers come and go, and the weights move between steps.
            expected, actual = ([torch.empty_like(t, dtype=dtype) for t in tensors.values()] for _ in range(2))
            copy_perturbed(family, places, expected, offsets, seed=seed, step=step)
            copier(family, actual, offsets, seed=seed, step=step)
            assert all(map(torch.equal, actual, expected))
            tensors["a"].mul_(0.5)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_copies(name, offsets):
    family, tensors = FAMILIES[name], weights()
    rows = torch.tensor([0, 999, 5, 6, 5])
    target = torch.empty(5, 300)
    place = place_all({"a": tensors["a"]})[0]
    copy_perturbed_rows(family, place, rows, target, offsets, seed=3, step=5)
    assert torch.equal(target, in_place(family, {"a": tensors["a"]}, offsets)["a"][rows])


def test_double_weights():
    tensors = weights(torch.float64)
    targets = [torch.empty_like(t) for t in tensors.values()]
    copy_perturbed(FAMILIES["rademacher"], place_all(tensors), targets, {1: 0.25}, seed=3, step=5)
    for target, expected in zip(targets, in_place(FAMILIES["rademacher"], tensors, {1: 0.25}).values(), strict=True):
        assert torch.equal(target, expected)
