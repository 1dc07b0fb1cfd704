"""Perturbing with in_forward gives the losses of weights perturbed in place, and leaves the weights alone."""

from __future__ import annotations

import models
import pytest
import torch
import transformers
from torch import nn

from zokernel.directions import Blockwise, Dense, Orthogonal
from zokernel.directions.backends.numba import backend as numba_backend
from zokernel.errors import RunError, UsageError
from zokernel.optim import LOZO, ConMeZO, HiZOO, KerZOO, MeZO, SparseMeZO, SubZero, ZerothOrder
from zokernel.perturb import copy_schedule as module
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "roberta"])
@pytest.mark.parametrize("method", ["mezo", "lozo"])
def test_losses_of_every_architecture(name, method):
    expected, weights = run(name, OPTIMIZERS[method])
    losses, updated = run(name, OPTIMIZERS[method], InForward())
    assert losses == pytest.approx(expected, rel=2e-6)
    assert len(set(losses)) == len(losses)
    for left, right in zip(weights, updated, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_losses_of_every_family(method):
    expected, _ = run("llama", OPTIMIZERS[method], steps=1)
    losses, _ = run("llama", OPTIMIZERS[method], InForward(), steps=1)
    assert losses == pytest.approx(expected, rel=2e-6)


def test_bits_are_those_of_weights_moved_in_place(monkeypatch):
    """Without matrices in pieces the operations are the very same."""
    monkeypatch.setattr(module, "STRETCH", 10**6)
    for autocast in (False, True):
        expected = run("llama", OPTIMIZERS["mezo"], autocast=autocast)
        actual = run("llama", OPTIMIZERS["mezo"], InForward(), autocast=autocast)
        assert actual[0] == expected[0]
        assert all(torch.equal(left, right) for left, right in zip(actual[1], expected[1], strict=True))


def test_the_weights_stay_where_they_are_during_a_forward():
    model = build("llama")
    before = [p.detach().clone() for p in model.parameters()]
    closure, memory = make_closure(model), [p.data for p in model.parameters()]

    def watching():
        assert all(torch.equal(left, right) for left, right in zip(before, memory, strict=True))
        loss = closure()
        assert all(torch.equal(left, right) for left, right in zip(before, memory, strict=True))
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


READS = {
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "H": lambda w: w.H,
    "mH": lambda w: w.mH,
    "real": lambda w: w.real,
    "data": lambda w: w.data,
    "data of a view": lambda w: w.t().data,
    "type": lambda w: w.type(torch.float64),
    "float": lambda w: w.float(),
    "item": lambda w: torch.tensor([w[2, 3].item()]),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "chunk": lambda w: torch.stack(w.chunk(4, 1)),
    "split": lambda w: w.split(5)[2],
    "unbind": lambda w: w.unbind()[7],
    "iteration": lambda w: list(w)[7],
    "largest of each row": lambda w: w.max(1).values,
}


@pytest.mark.parametrize(("stretch", "small"), [(300, 100), (300, 1000)], ids=["one at a time", "small"])
@pytest.mark.parametrize("read", READS)
def test_a_weight_is_perturbed_however_it_is_read(read, stretch, small, monkeypatch):
    """What was read stays as it is, too, when the scratch buffer holds other weights."""
    monkeypatch.setattr(module, "STRETCH", stretch)
    monkeypatch.setattr(module, "SMALL", small)
    generator = torch.Generator().manual_seed(0)
    first, second = (nn.Parameter(torch.randn(20, 12, generator=generator)) for _ in range(2))

    def closure():
        values = READS[read](first)
        other = second.square().mean()
        return values.double().pow(3).mean() + other

    records = []
    for perturb in ("in_place:copy", "in_forward"):
        optimizer = MeZO([("first", first), ("second", second)], lr=0.0, eps=0.1, perturb=perturb)
        optimizer.step(closure)
        records.append(optimizer.record())
    alone = MeZO([("first", first)], lr=0.0, eps=0.1, perturb="in_forward")
    alone.step(closure)
    assert records[1] == pytest.approx(records[0], rel=1e-6)
    assert abs(alone.record()[0] - alone.record()[1]) > 1e-4


SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Models of transformers that read weights otherwise than by calling layers.
UNUSUAL = {
    "router's weights by type()": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **SIZES,
            num_key_value_heads=4,
            intermediate_size=48,
            moe_intermediate_size=24,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
    "chunks of a projection": lambda: transformers.DebertaForMaskedLM(
        transformers.DebertaConfig(
            **SIZES, intermediate_size=48, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0
        )
    ),
    "transposed and joined matrices": lambda: transformers.MobileBertForMaskedLM(
        transformers.MobileBertConfig(
            **SIZES, embedding_size=16, intermediate_size=48, intra_bottleneck_size=16, true_hidden_size=16
        )
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_losses_of_models_that_read_weights_in_unusual_ways(kind, dtype, monkeypatch):
    monkeypatch.setattr(module, "STRETCH", 10**6)  # no matrix in pieces
    torch.manual_seed(0)
    model = UNUSUAL[kind]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    records = []
    for perturb in ("in_place:copy", "in_forward"):
        optimizer = MeZO(model, lr=0.0, eps=2e-2, num_perturbations=2, perturb=perturb)
        optimizer.step(make_closure(model))
        records.append(optimizer.record())
    assert records[1] == records[0]


@pytest.mark.parametrize("bias", [True, False])
def test_matrices_in_pieces_give_the_losses_and_types_of_whole_ones_under_autocast(bias, monkeypatch):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(256, 128, bias=bias), torch.randn(4, 256)
    runs = []
    for stretch in (1 << 20, 1000):
        monkeypatch.setattr(module, "STRETCH", stretch)
        optimizer, outputs = MeZO(layer, lr=0.0, eps=1e-2, perturb="in_forward"), []

        def closure(outputs=outputs):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(layer(inputs))
            return outputs[-1].float().square().mean()

        optimizer.step(closure)
        runs.append((optimizer.record(), outputs))
    (whole, wholes), (pieces, parts) = runs
    assert pieces == whole
    assert all(part.dtype == output.dtype == torch.bfloat16 for part, output in zip(parts, wholes, strict=True))
    assert all(torch.equal(part, output) for part, output in zip(parts, wholes, strict=True))


def test_rows_of_an_embedding_are_shortened_to_their_largest_norm():
    torch.manual_seed(0)
    layer, ids = nn.Embedding(40, 8, max_norm=1.0), torch.arange(10)
    with torch.no_grad():
        layer.weight.div_(4 * layer.weight.norm(dim=1, keepdim=True))
        layer.weight[3] *= 8  # twice as long as allowed, perturbed or not
    records = []
    for perturb in ("in_place:copy", "in_forward"):
        start = layer.weight.detach().clone()
        optimizer = MeZO(layer, lr=0.0, eps=1e-2, perturb=perturb)
        optimizer.step(lambda: layer(ids).pow(4).sum())
        records.append(optimizer.record())
        with torch.no_grad():
            layer.weight.copy_(start)
    assert records[1] == pytest.approx(records[0], rel=1e-6)


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
    closure, within_forward, inside = make_closure(model, autocast), [], []

    class Watched(numba_backend.PreparedCopies):
        def __init__(self, jobs):
            super().__init__(jobs)
            within_forward.append(bool(inside))

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
    assert len(within_forward) > 10
    assert not any(within_forward)
