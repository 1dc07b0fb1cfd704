"""Perturbing in the forward gives the losses of weights perturbed in place, and leaves the weights alone."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

from zokernel.directions import Blockwise, Dense, Orthogonal
from zokernel.directions.backends.numba import backend as numba_backend
from zokernel.errors import RunError, UsageError
from zokernel.optim import LOZO, ConMeZO, HiZOO, KerZOO, MeZO, SparseMeZO, SubZero, ZerothOrder
from zokernel.perturb import in_forward as module
from zokernel.perturb.in_forward import InForward

OPTIMIZERS = {
    "mezo": lambda p: MeZO(p, lr=1e-3, num_perturbations=2, perturb="in_place:copy"),
    "gaussian": lambda p: MeZO(p, lr=1e-3, distribution="gaussian", perturb="in_place:copy"),
    "kerzoo": lambda p: KerZOO(p, lr=1e-3, perturb="in_place:copy"),
    "lozo": lambda p: LOZO(p, lr=1e-3, perturb="in_place:copy"),
    "subzero": lambda p: SubZero(p, lr=1e-3, perturb="in_place:copy"),
    "sparse": lambda p: SparseMeZO(p, lr=1e-3, perturb="in_place:copy"),
    "hizoo": lambda p: HiZOO(p, lr=1e-3, perturb="in_place:copy"),
    "conmezo": lambda p: ConMeZO(p, lr=1e-3, perturb="in_place:copy"),
}


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch):
    """Sizes at which a tiny model uses every path: several stretches, matrices in pieces, small tensors."""
    monkeypatch.setattr(module, "STRETCH", 3000)
    monkeypatch.setattr(module, "SMALL", 100)


def build(name):
    torch.manual_seed(0)
    return models.build(name).eval()


def make_closure(model, autocast=False):
    ids = torch.randint(2, 120, (3, 9), generator=torch.Generator().manual_seed(1))

    def closure():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            logits = model(input_ids=ids).logits[:, -1]
        return nn.functional.cross_entropy(logits.float(), ids[:, 0])

    return closure


def run(name, make, perturb=None, steps=3, autocast=False):
    model = build(name)
    closure, optimizer = make_closure(model, autocast), make(model)
    if perturb is not None:
        optimizer.perturb = perturb
    losses = []
    for _ in range(steps):
        optimizer.step(closure)
        losses += optimizer.last_estimate.losses
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "roberta"])
@pytest.mark.parametrize("method", ["mezo", "lozo"])
def test_losses_of_every_architecture(name, method):
    expected, weights = run(name, OPTIMIZERS[method])
    found, moved = run(name, OPTIMIZERS[method], InForward())
    assert found == pytest.approx(expected, rel=2e-6)
    assert len(set(found)) == len(found)
    for left, right in zip(weights, moved):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_losses_of_every_family(method):
    expected, _ = run("llama", OPTIMIZERS[method], steps=1)
    found, _ = run("llama", OPTIMIZERS[method], InForward(), steps=1)
    assert found == pytest.approx(expected, rel=2e-6)


def test_bits_are_those_of_weights_moved_in_place(monkeypatch):
    """Without matrices in pieces the operations are the very same."""
    monkeypatch.setattr(module, "STRETCH", 10**6)
    for autocast in (False, True):
        expected = run("llama", OPTIMIZERS["mezo"], autocast=autocast)
        found = run("llama", OPTIMIZERS["mezo"], InForward(), autocast=autocast)
        assert found[0] == expected[0]
        assert all(torch.equal(left, right) for left, right in zip(found[1], expected[1]))


def test_the_weights_stay_where_they_are_during_a_forward():
    model = build("llama")
    before = [p.detach().clone() for p in model.parameters()]
    closure, memory = make_closure(model), [p.data for p in model.parameters()]

    def watching():
        assert all(torch.equal(left, right) for left, right in zip(before, memory))
        loss = closure()
        assert all(torch.equal(left, right) for left, right in zip(before, memory))
        return loss

    optimizer = MeZO(model, lr=0.0)
    optimizer.perturb = InForward()
    optimizer.step(watching)
    assert optimizer.last_estimate.losses[0] != optimizer.last_estimate.losses[1]


def test_adapters():
    from peft import LoraConfig, get_peft_model

    def losses(perturb):
        model = get_peft_model(build("llama"), LoraConfig(r=4, init_lora_weights=False)).eval()
        optimizer = MeZO(model, lr=1e-3, num_perturbations=3, perturb="in_place:copy")
        if perturb:
            optimizer.perturb = perturb
        closure = make_closure(model)
        torch.manual_seed(0)
        for parameter in optimizer.named_params.values():
            nn.init.normal_(parameter, std=0.1)
        optimizer.step(closure)
        return optimizer.last_estimate.losses

    assert losses(InForward()) == losses(None)


def test_views_of_a_weight_survive_the_next_copy():
    first, second = nn.Parameter(torch.ones(20, 10)), nn.Parameter(torch.ones(20, 10))
    inputs = torch.linspace(-1, 1, 20)

    def closure():
        transposed = first.t()
        other = inputs @ second.square()
        return (transposed @ inputs - other).square().sum()

    results = []
    for perturb in (None, InForward()):
        optimizer = MeZO([first, second], lr=0.0, eps=0.1, perturb="in_place:copy")
        if perturb:
            optimizer.perturb = perturb
        optimizer.step(closure)
        results.append(optimizer.last_estimate.losses)
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_parameters_in_a_list_are_perturbed(layer):
    """Recurrent layers pass all their weights in one list."""
    torch.manual_seed(0)
    model, inputs = layer(12, 16, num_layers=2), torch.randn(5, 3, 12)
    losses = []
    for perturb in (None, InForward()):
        optimizer = MeZO(model, lr=0.0, eps=0.1, perturb="in_place:copy")
        if perturb:
            optimizer.perturb = perturb
        optimizer.step(lambda: model(inputs)[0].square().mean())
        losses.append(optimizer.last_estimate.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][0] != losses[0][1]


def test_a_closure_on_other_tensors_is_refused():
    weight, copy = nn.Parameter(torch.ones(3)), torch.ones(3)
    optimizer = MeZO([weight], lr=0.1)
    optimizer.perturb = InForward()
    with pytest.raises(RunError, match="without the trained parameters"):
        optimizer.step(lambda: copy.square().sum())


def test_strided_weights_are_refused():
    weight = nn.Parameter(torch.ones(3, 4).t())
    with pytest.raises(UsageError, match="not contiguous"):
        MeZO([weight], lr=0.1, perturb="in_forward")


@pytest.mark.parametrize("directions", [Dense("sphere"), Orthogonal(2), Blockwise(Dense(), every=1)], ids=repr)
def test_directions_that_couple_tensors_are_refused(directions):
    """A few tensors at a time would be perturbed along other directions than the update follows."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(UsageError, match="depend on the others"):
        ZerothOrder(model, directions=directions, perturb="in_forward")


@pytest.mark.parametrize("autocast", [False, True])
def test_tables_of_copies_are_made_between_forwards(monkeypatch, autocast):
    """Small memory taken between activations keeps theirs from being used again: 200 MiB for SmolLM2."""
    monkeypatch.setattr(module, "STRETCH", 6000)  # no matrix in pieces
    model = build("opt")
    closure, made, inside = make_closure(model, autocast), [], []

    class Watched(numba_backend.PreparedCopies):
        def __init__(self, jobs):
            super().__init__(jobs)
            made.append(bool(inside))

    def watched():
        inside.append(True)
        loss = closure()
        inside.clear()
        return loss

    monkeypatch.setattr(numba_backend, "PreparedCopies", Watched)
    optimizer = MeZO(model, lr=1e-3)
    optimizer.perturb = InForward()
    for _ in range(2):
        optimizer.step(watched)
    assert len(made) > 10
    assert not any(made)
