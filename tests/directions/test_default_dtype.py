"""Directions do not depend on torch's default dtype."""

from __future__ import annotations

import pytest
import torch

from zokernel.directions import Blockwise, Dense, LowRank, Orthogonal, Sparse, Subspace, make_restore
from zokernel.directions.families.fixed import Fixed
from zokernel.directions.families.preconditioned import Preconditioned
from zokernel.directions.terms import Factors, Values

SHAPES = {"layers.0.w": (30, 20), "layers.1.b": (7,)}


def fixed_values():
    left, right = torch.full((30, 1), 0.5, dtype=torch.float32), torch.full((1, 20), 2.0, dtype=torch.float32)
    return {"layers.0.w": Factors(left, right), "layers.1.b": Values(torch.ones(7, dtype=torch.float32))}


FAMILIES = {
    "rademacher": lambda backend: Dense("rademacher", backend=backend),
    "gaussian": lambda backend: Dense("gaussian", backend=backend),
    "uniform": lambda backend: Dense("uniform", backend=backend),
    "sphere": lambda backend: Dense("sphere", backend=backend),
    "sparse": lambda backend: Sparse(0.3, distribution="gaussian", backend=backend),
    "subspace": lambda backend: Subspace(3, backend=backend),
    "low_rank": lambda backend: LowRank(3, backend=backend),
    "blockwise": lambda backend: Blockwise(LowRank(2, backend=backend)),
    "orthogonal": lambda backend: Orthogonal(4, backend=backend),
    "preconditioned": lambda backend: Preconditioned(Dense("gaussian", backend=backend)),
    "fixed": lambda backend: Fixed(fixed_values()),
}


def results(make, backend, dtype):
    """Return a direction, and weights after sweeps of every kind."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float32) for name, shape in SHAPES.items()}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    family = make(backend)
    family.prepare(weights)
    if isinstance(family, Preconditioned):
        family.learn([2.0, -0.5], 0.1, seed=3, step=0)
    tensors = [family(weights, seed=3, step=1, index=1)]
    for stochastic in (False, True):
        family.add_(weights, [0.5, -0.3], seed=3, step=2, index=[0, 5], decay=0.9, stochastic=stochastic)
        tensors.append({name: weight.clone() for name, weight in weights.items()})
    if dtype == torch.float32:
        state = make_restore("grid", family, weights, seed=3)
        state.move_to(4, {0: 1e-3})
        state.commit(4, {0: 1e-4})
        tensors.append(weights)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_directions_have_the_same_bits_under_any_default_dtype(name, backend, dtype):
    runs = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            runs.append(results(FAMILIES[name], backend, dtype))
        finally:
            torch.set_default_dtype(torch.float32)
    for single, double in zip(*runs, strict=True):
        for key in SHAPES:
            assert single[key].dtype == dtype
            assert single[key].isfinite().all()
            assert torch.equal(single[key], double[key]), key
