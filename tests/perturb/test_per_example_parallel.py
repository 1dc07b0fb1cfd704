"""Processes that share the examples of a step, or its points, make the step of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch import nn

from zokernel.errors import UsageError
from zokernel.optim import GRZO
from zokernel.perturb import PerExampleRows
from zokernel.perturb.parallel import Parallel
from zokernel.perturb.per_example import Examples

STEPS = 3
INPUTS = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OWN = {0: slice(0, 3), 1: slice(3, 5)}  # of unequal size


def train(rows=slice(None), mode=None):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    x = INPUTS[rows]

    def losses():
        return layer(x).square().mean(1)

    perturb = PerExampleRows(lambda: [Examples(len(x), losses)])
    parallel = perturb if mode is None else Parallel(mode, perturb, weight=lambda: float(len(x)))
    optimizer = GRZO(layer, lr=0.05, seed=4, whiten=False, perturb=parallel)
    records = []
    for _ in range(STEPS):
        optimizer.step(lambda: 0.0)
        records.append(optimizer.record())
    return records, layer.weight.detach().clone()


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/here", rank=rank, world_size=2)
    results = {"data": train(OWN[rank], "data"), "perturbation": train(mode="perturbation")}
    with pytest.raises(UsageError, match="give PerExampleRows the micro-batches"):
        GRZO(nn.Linear(2, 1), perturb=Parallel("data", PerExampleRows())).step(lambda: torch.zeros(2))
    torch.save(results, f"{folder}/{rank}.pt")


def test_the_step_is_that_of_one_process(tmp_path):
    expected, weight = train()
    spawn(run_rank, str(tmp_path), size=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for mode in ("data", "perturbation"):
        for rank in ranks:
            records, weights = rank[mode]
            for one, other in zip(records, expected, strict=True):
                assert one == pytest.approx(other, rel=1e-12)
            torch.testing.assert_close(weights, weight, rtol=0, atol=1e-12)
        assert torch.equal(ranks[0][mode][1], ranks[1][mode][1])
