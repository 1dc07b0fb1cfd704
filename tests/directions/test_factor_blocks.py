"""Factors of several directions of a step are drawn once, whoever asks for them."""

from __future__ import annotations

import pytest
import torch

from zokernel.directions import LowRank
from zokernel.directions.families.factor_blocks import FactorBlocks
from zokernel.directions.placement import place_all

SHAPES = {"a": (5, 3), "b": (4, 6)}


@pytest.fixture
def places():
    return place_all({name: torch.zeros(shape) for name, shape in SHAPES.items()})


@pytest.fixture
def draws(monkeypatch):
    """The directions that were drawn, call by call."""
    calls, draw = [], FactorBlocks._draw_blocks

    def note(self, places, backend, seed, step, indices):
        calls.append(list(indices))
        return draw(self, places, backend, seed, step, indices)

    monkeypatch.setattr(FactorBlocks, "_draw_blocks", note)
    return calls


def test_pairs_and_the_update_after_them_draw_nothing_again(places, draws):
    directions = LowRank(rank=2, refresh=0)
    for indices in ((0, 0, 1, 1, 2, 2), [0, 1, 2], [2, 0], [1]):
        directions.blocks(places, seed=1, step=4, indices=indices)
    assert draws == [[0, 1, 2]]
    directions.blocks(places, seed=1, step=4, indices=[3])
    directions.blocks(places, seed=1, step=5, indices=[3])
    directions.blocks(places, seed=2, step=5, indices=[3])
    assert draws == [[0, 1, 2], [3], [3], [3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("indices", [(0, 0, 1, 1, 5, 5), (5, 0), (1,), (0, 1, 5)])
def test_each_place_holds_the_factors_of_its_direction(places, indices, dtype):
    directions = LowRank(rank=2, refresh=0)
    directions.blocks(places, seed=1, step=4, indices=(0, 0, 1, 1, 5, 5), dtype=dtype)
    blocks = directions.blocks(places, seed=1, step=4, indices=indices, dtype=dtype)
    for place in places:
        for number, index in enumerate(indices):
            factors = LowRank(rank=2, refresh=0).factors(place, seed=1, step=4, index=index)
            assert torch.equal(blocks[place.name].left[number], factors.left.to(dtype))
            assert torch.equal(blocks[place.name].right[number], factors.right.to(dtype))
