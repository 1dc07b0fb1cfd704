"""The check before a run uses in_forward: it rejects unsuitable models, and restores the weights bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zokernel.directions import Dense, LowRank, Orthogonal
from zokernel.perturb import copy_schedule, matches_in_place
from zokernel.perturb.agreement import moved_in_place, one_of_each_kind


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 3)).to(dtype)


@pytest.mark.parametrize("directions", [Dense("rademacher"), Dense("gaussian"), LowRank(2)], ids=repr)
def test_weights_are_restored_to_the_same_bits(directions):
    net = network()
    with torch.no_grad():
        net[0].weight.view(-1)[:8] = torch.tensor([0.0, -0.0, 1e-30, 3e38, 1e-4, -7e-5, 0.5, 1.0])
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad(), moved_in_place(dict(net.named_parameters()), directions, {0: 1e-3}, seed=3):
        assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    for name, p in net.named_parameters():
        assert torch.equal(p.detach().view(torch.int32), before[name].view(torch.int32)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_compared_and_restored(dtype):
    net, inputs = network(dtype), torch.randn(16, 6).to(dtype)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    parameters, hidden = dict(net.named_parameters()), net[3].weight.detach()

    def closure():
        return net(inputs).float().square().mean()

    def closure_on_another_name():
        return (net[:3](inputs) @ hidden.T).float().square().mean()

    assert matches_in_place(parameters, Dense(), closure, {0: 1e-2})[0]
    assert not matches_in_place(parameters, Dense(), closure_on_another_name, {0: 1e-2})[0]
    for name, p in net.named_parameters():
        assert torch.equal(p.detach().view(torch.int16), before[name].view(torch.int16)), name


def test_matrices_larger_than_a_stretch_are_multiplied_by_as_in_place(monkeypatch):
    """In pieces, products in bf16 may be rounded otherwise, by more than a small perturbation changes the loss."""
    monkeypatch.setattr(copy_schedule, "STRETCH", 64)
    monkeypatch.setattr(copy_schedule.CopySchedule, "pieces", lambda *_: pytest.fail("a matrix was copied in pieces"))
    net, inputs = nn.Linear(64, 300).bfloat16(), torch.randn(16, 64).bfloat16()
    parameters = dict(net.named_parameters())
    assert matches_in_place(parameters, Dense(), lambda: net(inputs).float().square().mean(), {0: 1e-2})[0]


def test_an_interrupted_check_restores_the_weights():
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return net(torch.ones(2, 6)).square().mean()

    with pytest.raises(KeyboardInterrupt):
        matches_in_place(dict(net.named_parameters()), Dense(), closure, {0: 1e-3})
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_ordinary_models_match(autocast):
    net, inputs = network(), torch.randn(16, 6, generator=torch.Generator().manual_seed(1))

    def closure():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            return net(inputs).float().square().mean()

    matches, reason = matches_in_place(dict(net.named_parameters()), Dense(), closure, {0: 1e-2})
    assert matches, reason


def test_a_weight_read_under_another_name_is_noticed():
    net, inputs = network(), torch.ones(4, 6)
    hidden = net[3].weight.detach()
    matches, reason = matches_in_place(
        dict(net.named_parameters()), Dense(), lambda: (net[:3](inputs) @ hidden.T).square().mean(), {0: 1e-2}
    )
    assert not matches
    assert "in place and" in reason


def test_directions_that_do_not_suit_are_the_reason():
    net = network()
    matches, reason = matches_in_place(
        dict(net.named_parameters()), Orthogonal(2), lambda: net(torch.ones(2, 6)).mean(), {0: 1e-3}
    )
    assert not matches
    assert "depend on the others" in reason


def test_layers_of_a_sequence_are_kinds_of_their_own_and_repeated_blocks_are_not():
    """The second linear layer of a sequence may be read in another way than the first."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    assert list(one_of_each_kind(dict(net.named_parameters()))) == [name for name, _ in net.named_parameters()]
    assert list(one_of_each_kind({"0": torch.ones(2), "1": torch.ones(2)})) == ["0", "1"]
    blocks = {f"h.{n}.mlp.up.weight": torch.ones(2, 2 + (n == 2)) for n in range(4)}
    assert list(one_of_each_kind(blocks)) == ["h.0.mlp.up.weight", "h.2.mlp.up.weight"]
