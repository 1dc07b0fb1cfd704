"""Distributed tensors: each rank generates exactly its slice of the whole direction (two gloo ranks)."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import spawn

from zokernel.directions import Dense, LowRank, Sparse
from zokernel.directions.backends import dispatch
from zokernel.directions.families import preconditioned
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement, find_runs
from zokernel.directions.terms import Job, Noise

WINDOW = 16  # several per tensor, some of which begin in the middle of a shard
SHAPES = {"even": (8, 6), "odd": (7, 5), "vector": (9,), "cube": (3, 4, 5)}


def families():
    return {
        "rademacher": Dense("rademacher"),
        "gaussian": Dense("gaussian"),
        "sphere": Dense("sphere"),
        "sparse": Sparse(0.4, distribution="gaussian"),
        "low_rank": LowRank(2),
        "preconditioned": preconditioned.Preconditioned(Dense("gaussian")),
    }


def whole():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def update(family, tensors):
    family.prepare(tensors)
    if isinstance(family, preconditioned.Preconditioned):
        family.learn([3.0, -0.5], 0.2, seed=3, step=0)
    family.add_(tensors, [0.5, -1.0], seed=3, step=1, index=[0, 2], decay=0.9, stochastic=True)


def run_rank(rank, rendezvous, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    preconditioned.WINDOW = WINDOW
    tensors = {}
    for label, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("replicate", Replicate())):
        for name, family in families().items():
            full = {k: v for k, v in whole().items() if v.dim() > 1 or label != "columns"}
            shards = {k: distribute_tensor(v, mesh, [placement]) for k, v in full.items()}
            update(family, shards)
            tensors[label, name] = {k: v.full_tensor() for k, v in shards.items()}
            z = family(shards, seed=3, step=1, index=0)
            tensors[label, name + " z"] = {k: v.full_tensor() for k, v in z.items()}
            tensors[label, name + " gain"] = family.gain()
            if name == "preconditioned":
                assert all(h.placements == (placement,) for h in family.curvature.values())

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    Dense("gaussian").add_(dict(model.named_parameters()), 1.0, seed=3, step=1, index=0)
    tensors["fsdp"] = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(tensors, results)


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, str(folder / "rendezvous"), str(folder / "results.pt"), size=2)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("label", ["rows", "columns", "replicate"])
@pytest.mark.parametrize("name", families())
def test_shards_make_up_the_whole(gathered, label, name, monkeypatch):
    monkeypatch.setattr(preconditioned, "WINDOW", WINDOW)
    tensors = {k: v for k, v in whole().items() if v.dim() > 1 or label != "columns"}
    family = families()[name]
    expected = {k: v.clone() for k, v in tensors.items()}
    update(family, expected)
    z = family(tensors, seed=3, step=1, index=0)
    for k in tensors:
        assert torch.equal(gathered[label, name][k], expected[k])
        assert torch.equal(gathered[label, name + " z"][k], z[k])
    assert gathered[label, name + " gain"] == pytest.approx(family.gain(), rel=1e-12)


def test_fsdp_parameters_get_the_directions_of_the_unsharded_model(gathered):
    params = {name: torch.zeros_like(value) for name, value in gathered["fsdp"].items()}
    z = Dense("gaussian")(params, seed=3, step=1, index=0)
    assert all(torch.equal(gathered["fsdp"][name], z[name]) for name in params)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    backend=st.sampled_from(["numba", "torch"]),
    distribution=st.sampled_from(["rademacher", "gaussian"]),
)
def test_any_box_of_a_tensor_is_its_slice(data, backend, distribution):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4), label="shape"))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    noise = Noise(distribution, stream_key(0, "w"), 0, 0)

    def generate(size, offset):
        values = torch.zeros(size)
        dispatch.sweep([Job(Placement("w", values, values, shape, offset), (noise,), (1.0,))], backend)
        return values

    full = generate(shape, (0,) * len(shape))
    box = generate(tuple(b - a for a, b in bounds), tuple(a for a, _ in bounds))
    assert torch.equal(box, full[tuple(slice(a, b) for a, b in bounds)])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_runs_cover_every_element_once(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    order = data.draw(st.permutations(range(len(shape))))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).permute(*order)
    runs = find_runs(tuple(tensor.shape), tensor.stride(), tuple(tensor.shape), (0,) * tensor.dim())
    steps = torch.arange(runs.length)
    memory = (torch.from_numpy(runs.memory)[:, None] + steps * runs.stride).flatten()
    position = (torch.from_numpy(runs.position)[:, None] + steps).flatten()
    assert torch.equal(position, torch.arange(tensor.numel()))
    assert torch.equal(memory, tensor.flatten())
