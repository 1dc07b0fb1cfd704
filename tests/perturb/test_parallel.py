"""Losses taken by two gloo processes: the same steps as one process takes, and only the losses travel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch import nn

from zokernel.errors import RunError, UsageError
from zokernel.optim import FZOO, HiZOO, KerZOO, MeZO, Richardson, SubZeroPlus, ZOAdam, ZOMuon
from zokernel.perturb import InForward, InPlace, Parallel

METHODS = {
    "mezo": lambda p: MeZO(p, lr=1e-2, num_perturbations=4),
    "mezo_odd": lambda p: MeZO(p, lr=1e-2, num_perturbations=1, momentum=0.5),
    "mezo_grid": lambda p: MeZO(p, lr=1e-2, num_perturbations=3, perturb="in_place:grid"),
    "kerzoo": lambda p: KerZOO(p, lr=1e-3, num_perturbations=3, averaging="fp32"),
    "fzoo": lambda p: FZOO(p, lr=1e-3, num_perturbations=4),
    "hizoo": lambda p: HiZOO(p, lr=1e-3),
    "zo_adam": lambda p: ZOAdam(p, lr=1e-3),
    "richardson": lambda p: Richardson(p, lr=1e-3),
    "zo_muon": lambda p: ZOMuon(p, lr=1e-2, rank=4, refresh=4),
    "subzero_plus": lambda p: SubZeroPlus(p, lr=1e-3, rank=2, refresh=4, num_perturbations=5),
}
IN_SUBSPACES = ["zo_muon", "subzero_plus"]
STEPS = 6


def sharded_hizoo(p):
    return HiZOO(p, lr=1e-3, num_perturbations=2, hessian_smooth=1e-2)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator, dtype=dtype), torch.randint(3, (8,), generator=generator)


def train(make, dtype, perturb=None, rows=slice(None)):
    model, (inputs, labels) = network(dtype), batch(dtype)
    optimizer = make(model)
    if perturb is not None:
        optimizer.perturb = perturb
    losses = [
        optimizer.step(lambda: nn.functional.cross_entropy(model(inputs[rows]), labels[rows])) for _ in range(STEPS)
    ]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, losses


def dtype_of(name):
    return torch.float32 if name == "mezo_grid" else torch.float64


def inner_of(name):
    return InPlace("grid") if name == "mezo_grid" else InPlace()


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, make in METHODS.items():
        perturb = Parallel("perturbation", inner_of(name))
        results[name] = (*train(make, dtype_of(name), perturb), perturb.bytes_sent)
    results["in forward"] = train(METHODS["mezo"], torch.float64, Parallel("perturbation", InForward()))
    half = slice(4 * rank, 4 * rank + 4)
    results["data"] = train(METHODS["mezo"], torch.float64, Parallel("data"), rows=half)
    uneven = slice(0, 5) if rank == 0 else slice(5, 8)
    weighted = Parallel("data", weight=lambda: float(uneven.stop - uneven.start))
    results["uneven data"] = train(METHODS["mezo"], torch.float64, weighted, rows=uneven)
    results["hybrid of one"] = train(METHODS["mezo"], torch.float64, Parallel("hybrid", point_ranks=2))
    results["sharded"] = train_sharded(METHODS["mezo"])
    results["sharded hizoo"] = train_sharded(sharded_hizoo)
    for name in IN_SUBSPACES:
        results[f"sharded {name}"] = train_sharded(METHODS[name])
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] += rank
    optimizer = MeZO(model, lr=0.1)
    optimizer.perturb = Parallel("perturbation")
    try:
        optimizer.step(lambda: 0.0)
    except RunError as error:
        results["different"] = str(error)
    optimizer = MeZO(network(), lr=0.1)
    optimizer.perturb = Parallel("perturbation")
    try:
        optimizer.step(lambda: float("nan") if rank else 1.0)
    except RunError as error:
        results["nan"] = str(error)
    try:
        MeZO(network(torch.float32), momentum=0.5, perturb=Parallel("perturbation", InPlace("grid")))
    except UsageError as error:
        results["off the grid"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")


def train_sharded(make):
    """Each rank holds half of every parameter (FSDP2) and sees half of the batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, (inputs, labels) = network(), batch()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    optimizer = make(model)
    optimizer.perturb = Parallel("data")
    losses = [
        optimizer.step(lambda: nn.functional.cross_entropy(model(inputs[half]), labels[half])) for _ in range(STEPS)
    ]
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}, losses


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    spawn(run_rank, str(folder), size=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_close(actual, expected):
    """Check that weights by name agree up to the rounding of sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_make_the_steps_of_one(ranks, name):
    expected, expected_losses = train(METHODS[name], dtype_of(name))
    for weights, losses, _ in (ranks[0][name], ranks[1][name]):
        assert same_bits(weights, expected)
        assert losses == expected_losses


def test_bytes_sent_are_eight_a_direction_for_two_ends_on_two_processes(ranks):
    """P directions have 2P ends; each of two processes sends its P losses as float64."""
    assert [rank["mezo"][2] for rank in ranks] == [STEPS * 8 * 4] * 2
    assert [rank["mezo_odd"][2] for rank in ranks] == [STEPS * 8] * 2


def test_in_forward_losses_are_shared_too(ranks):
    expected = train(METHODS["mezo"], torch.float64, InForward())
    for rank in ranks:
        assert same_bits(rank["in forward"][0], expected[0])
        assert rank["in forward"][1] == expected[1]


def test_data_parallel_is_one_process_with_the_whole_batch(ranks):
    expected, expected_losses = train(METHODS["mezo"], torch.float64)
    for rank in ranks:
        weights, losses = rank["data"]
        assert losses == pytest.approx(expected_losses, rel=1e-12)
        assert_close(weights, expected)
    assert same_bits(ranks[0]["data"][0], ranks[1]["data"][0])


def test_batches_of_other_sizes_count_by_their_weight(ranks):
    """Means over 5 and 3 examples make the mean over 8 with the weights 5 and 3, not as a mean of means."""
    expected, expected_losses = train(METHODS["mezo"], torch.float64)
    for rank in ranks:
        weights, losses = rank["uneven data"]
        assert losses == pytest.approx(expected_losses, rel=1e-12)
        assert_close(weights, expected)


def test_hybrid_with_all_ranks_on_the_points_is_perturbation_parallel(ranks):
    assert same_bits(ranks[0]["hybrid of one"][0], ranks[0]["mezo"][0])


def test_sharded_weights_train_like_whole_ones(ranks):
    expected, expected_losses = train(METHODS["mezo"], torch.float64)
    for rank in ranks:
        weights, losses = rank["sharded"]
        assert losses == pytest.approx(expected_losses, rel=1e-12)
        assert_close(weights, expected)


def test_hizoo_learns_the_hessian_of_sharded_weights(ranks):
    """H is sharded as the weights are: the steps, which depend on it from the second on, are those of whole weights."""
    expected, expected_losses = train(sharded_hizoo, torch.float64)
    for rank in ranks:
        weights, losses = rank["sharded hizoo"]
        assert losses == pytest.approx(expected_losses, rel=1e-6)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", IN_SUBSPACES)
def test_steps_in_subspaces_reach_sharded_weights(ranks, name):
    """The last digits of a loss, divided by eps, change the slopes in the tenth digit, and the steps with them."""
    expected, expected_losses = train(METHODS[name], torch.float64)
    for rank in ranks:
        weights, losses = rank[f"sharded {name}"]
        assert losses == pytest.approx(expected_losses, rel=1e-8)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-8)


def test_processes_with_different_weights_are_refused(ranks):
    assert all("different weights" in rank["different"] for rank in ranks)


def test_a_loss_that_is_not_finite_stops_every_process(ranks):
    assert all("The loss is nan" in rank["nan"] for rank in ranks)


def test_momentum_would_leave_the_grid_of_every_process(ranks):
    assert all("keeps the weights on a grid" in rank["off the grid"] for rank in ranks)


def test_needs_torch_distributed():
    with pytest.raises(UsageError, match="torchrun"):
        Parallel("data")
    with pytest.raises(UsageError, match="perturbations"):
        Parallel("perturbations")


def run_grid(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    grid = Parallel("hybrid", point_ranks=2)
    half = slice(4 * grid.data_rank, 4 * grid.data_rank + 4)
    torch.save(train(METHODS["mezo"], torch.float64, grid, rows=half), f"{folder}/{rank}.pt")


def test_a_grid_of_two_batches_and_two_shares(tmp_path):
    spawn(run_grid, str(tmp_path), size=4)
    per_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    expected, losses = train(METHODS["mezo"], torch.float64)
    for weights, rank_losses in per_rank:
        assert same_bits(weights, per_rank[0][0])
        assert rank_losses == pytest.approx(losses, rel=1e-12)
        assert_close(weights, expected)
