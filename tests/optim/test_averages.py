"""Averages of the iterates: of masked directions, of other runs' state, and where momentum would spoil them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zokernel.errors import UsageError
from zokernel.optim import MeZO, ZerothOrder


def averaged(storage, weight, directions, steps=12):
    optimizer = ZerothOrder([("w", weight)], lr=1e-3, directions=directions, update=f"average('{storage}')", seed=2)
    for _ in range(steps):
        optimizer.step(lambda: weight.square().mean())
    return optimizer


def test_eight_bits_follow_masked_directions_in_every_piece():
    """600 x 512 elements are advanced in pieces; a mask belongs to the whole tensor."""
    offsets = {}
    for storage in ("fp32", "int8"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(600, 512))
        optimizer = averaged(storage, weight, "sparse(0.25)")
        offsets[storage] = optimizer.averaged_weights()["w"] - weight.detach()
    for rows in (slice(0, 256), slice(256, 512), slice(512, 600)):
        exact = offsets["fp32"][rows]
        # Twelve roundings of at most 1/127 of a block's largest offset, which is about three times the usual one.
        assert (offsets["int8"][rows] - exact).norm() < 0.06 * exact.norm()


def test_the_average_of_a_loaded_run_is_that_runs():
    first, second = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    loaded, source = (
        ZerothOrder([("w", weight)], lr=lr, update="average('journal')", seed=4)
        for weight, lr in ((first, 0.01), (second, 0.05))
    )
    for optimizer, weight in ((loaded, first), (source, second)):
        for _ in range(10):
            optimizer.step(lambda weight=weight: weight.square().sum())
        optimizer.averaged_weights()
    with torch.no_grad():
        first.copy_(second)
    loaded.load_state_dict(source.state_dict())
    assert torch.equal(loaded.averaged_weights()["w"], source.averaged_weights()["w"])


@pytest.mark.parametrize("storage", ["fp32", "int8", "journal"])
def test_a_group_with_momentum_does_not_join_an_average(storage):
    weight, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizer = averaged(storage, weight, None, steps=3)
    before = optimizer.averaged_weights()["w"]
    with pytest.raises(UsageError, match="average no momentum"):
        optimizer.add_param_group({"params": [("v", other)], "momentum": 0.9})
    assert list(optimizer.named_params) == ["w"]
    assert torch.equal(optimizer.averaged_weights()["w"], before)
    optimizer.step(lambda: weight.square().mean())


def made_for_inference():
    with torch.inference_mode():
        return nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("storage", ["fp32", "int8", "journal"])
def test_tied_weights_have_one_average(storage):
    def averaged(names):
        weight = torch.linspace(-1, 1, 6)
        optimizer = ZerothOrder([(name, weight.view(6)) for name in names], lr=0.05, update=f"average({storage!r})")
        for _ in range(4):
            optimizer.step(lambda: weight.square().sum())
        end = weight.clone()
        with optimizer.averaged():
            within = weight.clone()
        assert torch.equal(weight, end)
        assert set(optimizer.averaged_weights()) == set(names)
        return within

    expected = averaged(["out"])
    assert torch.equal(averaged(["out", "in"]), expected)


@pytest.mark.parametrize("setting", ["average", "grid"])
def test_a_schedule_of_the_momentum_is_refused_where_it_has_no_effect(setting):
    """``OneCycleLR`` does so unless it is told not to."""

    def trained(**schedule):
        weight = nn.Parameter(torch.ones(5))
        options = {"update": "average('fp32')"} if setting == "average" else {"perturb": "in_place:grid"}
        optimizer = (ZerothOrder if setting == "average" else MeZO)([("w", weight)], lr=0.02, **options)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=10, **schedule)
        for _ in range(5):
            optimizer.step(lambda: weight.square().sum())
            scheduler.step()
        return weight

    with pytest.raises(UsageError, match="momentum"):
        trained()
    assert float(trained(cycle_momentum=False).square().sum()) < 5.0


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda base: nn.Parameter(base[2:]), "share some of their memory"),
        (lambda _: nn.Parameter(torch.ones(3, device="meta")), "has no memory"),
        (lambda _: made_for_inference(), r"'v' was made under torch\.inference_mode\(\).*outside of it"),
        (lambda _: nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False), "float8"),
    ],
    ids=["overlapping", "meta", "inference", "float8"],
)
def test_tensors_that_cannot_be_moved_are_refused_and_training_continues(tensor, message):
    base = torch.ones(8)
    weight, other = nn.Parameter(base[:4]), tensor(base)
    optimizer = MeZO([("w", weight)], lr=0.01)
    optimizer.step(lambda: weight.square().sum())
    with pytest.raises(UsageError, match=message):
        optimizer.add_param_group({"params": [("v", other)]})
    assert (list(optimizer.named_params), len(optimizer.param_groups)) == (["w"], 1)
    before = float(weight.detach().square().sum())
    for _ in range(60):
        optimizer.step(lambda: weight.square().sum())
    assert float(weight.detach().square().sum()) < before
    with pytest.raises(UsageError, match=message):
        MeZO([("w", weight), ("v", other)], lr=0.01)
