"""Weights plus directions are rounded once: to nearest, or stochastically without bias."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zokernel.directions import Dense

DRAW = {"seed": 11, "step": 5, "index": 2}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_rounding_is_to_nearest_once():
    weights = {"w": torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16()}
    z = Dense("rademacher")({"w": torch.zeros(5000)}, **DRAW)["w"]
    expected = (weights["w"].float() + (weights["w"].float() * np.float32(-0.1) + np.float32(0.01) * z)).bfloat16()
    Dense("rademacher").add_(weights, 0.01, **DRAW, decay=0.9)
    assert torch.equal(weights["w"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(dtype):
    # 1 + u / 4 with u the distance to the next number: rounds up with probability one quarter.
    unit = torch.finfo(dtype).eps
    start = {"w": torch.full((200_000,), 1.0, dtype=dtype)}
    z = Dense("rademacher")({"w": torch.zeros(200_000)}, **DRAW)["w"]
    Dense("rademacher").add_(start, unit / 4, **DRAW, stochastic=True)
    up = start["w"].double()[z > 0]
    assert set(up.unique().tolist()) == {1.0, 1.0 + unit}
    rate = float((up > 1).double().mean())
    assert rate == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / up.numel()))


def test_stochastic_rounding_of_float16_subnormals_is_unbiased():
    weights = {"w": torch.full((200_000,), 2.0**-20, dtype=torch.float16)}
    Dense("rademacher").add_(weights, 2.0**-26, **DRAW, stochastic=True)
    mean = float((weights["w"].double() * 2**24).mean())
    # Values are 15, 16 or 17 units; each sign moves by one unit with probability one quarter.
    assert mean == pytest.approx(16, abs=5 * 0.5 / math.sqrt(200_000))


def test_stochastic_rounding_repeats():
    start = {"w": torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16()}
    first, second = ({"w": start["w"].clone()} for _ in range(2))
    for weights in (first, second):
        Dense("gaussian").add_(weights, 1e-3, **DRAW, stochastic=True)
    assert torch.equal(first["w"], second["w"])
    assert not torch.equal(first["w"], start["w"])


def test_infinity_and_nan_stay():
    for dtype in DTYPES:
        weights = {"w": torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=dtype)}
        for stochastic in (False, True):
            Dense("gaussian").add_(weights, 1e-3, **DRAW, stochastic=stochastic)
            assert weights["w"].isinf().tolist() == [True, True, False, False]
            assert weights["w"].isnan().tolist() == [False, False, True, False]


def test_float16_conversion_is_that_of_torch():
    # Every float16, with an addition of zero, comes back; and sums round as torch rounds.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = bits[bits.isfinite()]
    weights = {"w": finite.clone()}
    Dense("rademacher").add_(weights, 1e-7, **DRAW)
    z = Dense("rademacher")({"w": torch.zeros(finite.numel())}, **DRAW)["w"]
    assert torch.equal(weights["w"], (finite.float() + np.float32(1e-7) * z).half())
