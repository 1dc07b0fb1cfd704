"""All points of a step in one forward give the losses that one forward per point gives."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

from zokernel.directions import Dense, Flipout, LowRank
from zokernel.errors import UsageError
from zokernel.estimators import PerExample, TwoPoint
from zokernel.optim import FZOO, LOZO, KerZOO, MeZO, SubZero, ZerothOrder
from zokernel.optim.compose import make_estimator
from zokernel.perturb import PerExampleRows, Stacked, stackable

# Large enough that low-rank factors are kept as factors.
SIZES = {"vocab_size": 300, "hidden_size": 288}
WIDE = {**SIZES, "intermediate_size": 300}
MODELS = {"llama": WIDE, "qwen2": WIDE, "gpt2": SIZES, "opt": WIDE}
OPTIMIZERS = {
    "lozo": lambda p: LOZO(p, lr=1e-3, num_perturbations=3, eps=1e-2),
    "subzero": lambda p: SubZero(p, lr=1e-3, num_perturbations=2, eps=1e-2),
}


def build(name):
    torch.manual_seed(0)
    return models.build(name, **MODELS[name]).double().eval()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 300, (3, 7), generator=generator)


def losses_of(model, ids):
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids[:, -1]

    def closure():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -2]
        return nn.functional.cross_entropy(logits, labels)

    def copies(count):
        rows = {"input_ids": ids.repeat(count, 1), "attention_mask": mask.repeat(count, 1)}
        logits = model(**rows, use_cache=False).logits[:, -2]
        return nn.functional.cross_entropy(logits, labels.repeat(count), reduction="none").view(count, -1).mean(1)

    return closure, copies


def compare(make, model, *, max_copies=16, tolerance):
    closure, copies = losses_of(model, data())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    looped = make([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    looped.step(closure)
    expected = looped.last_estimate
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    stacked = make([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    stacked.perturb = Stacked(copies, max_copies=max_copies)
    points = stacked.estimator.points(seed=0, step=0)
    with torch.no_grad():
        losses = stacked.perturb.losses(closure, points, step=0)
    estimate = stacked.estimator.combine(losses, seed=0, step=0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert estimate.losses == pytest.approx(expected.losses, rel=tolerance)
    assert len(set(estimate.losses)) == len(estimate.losses)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_low_rank_directions_of_whole_models(name, method):
    """fp64 weights, but the factors are fp32: the changes, eps z of up to 0.1, agree to 2^-24 of themselves."""
    with torch.no_grad():
        compare(OPTIMIZERS[method], build(name), tolerance=1e-7)


@pytest.mark.parametrize("max_copies", [1, 4, 16])
@pytest.mark.parametrize("method", [MeZO, KerZOO, FZOO])
def test_adapters(method, max_copies):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)).double().eval()
    with torch.no_grad():
        compare(lambda p: method(p, lr=1e-3, num_perturbations=4), model, max_copies=max_copies, tolerance=1e-12)


def test_a_step_lands_on_the_weights_of_the_loop():
    ends = []
    for use in (False, True):
        model = build("llama")
        closure, copies = losses_of(model, data())
        optimizer = LOZO(model, lr=1e-3, num_perturbations=2, eps=1e-2)
        if use:
            optimizer.perturb = Stacked(copies)
        for _ in range(3):
            optimizer.step(closure)
        ends.append([p.detach().clone() for p in model.parameters()])
    for left, right in zip(*ends, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-7)


def test_dense_directions_of_large_matrices_do_not_fit():
    model = build("llama")
    closure, copies = losses_of(model, data())
    optimizer = MeZO(model, lr=1e-3)
    optimizer.perturb = Stacked(copies, max_bytes=1 << 20)
    assert not stackable(optimizer.named_params, optimizer.directions, 2, 1 << 20)
    with pytest.raises(UsageError, match="low-rank directions"):
        optimizer.step(closure)
    low_rank = LOZO(model, lr=1e-3)
    assert stackable(low_rank.named_params, low_rank.directions, 2, 1 << 25)


def test_an_unknown_use_of_a_parameter_is_refused():
    weight = nn.Parameter(torch.ones(3))
    optimizer = MeZO([weight], lr=0.1)
    optimizer.perturb = Stacked(lambda copies: weight.square().sum().expand(copies))
    with pytest.raises(UsageError, match="passes a trained parameter to square"):
        optimizer.step(lambda: weight.square().sum())


@pytest.mark.parametrize("name", ["T", "mT", "H", "real", "data"])
@pytest.mark.parametrize("per_example", [False, True], ids=["stacked", "per example"])
def test_a_matrix_that_is_read_without_a_layer_is_refused(name, per_example):
    """Falcon reads ``weight.T``."""
    layer, matrix, inputs = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3)), torch.randn(4, 3)

    def losses(copies=1):
        return (layer(inputs.repeat(copies, 1)) @ getattr(matrix, name)).square().mean(1).view(copies, -1).squeeze(0)

    parameters = [*layer.named_parameters(), ("matrix", matrix)]
    if per_example:
        optimizer = ZerothOrder(parameters, lr=0.1, estimator=PerExample(TwoPoint()), perturb=PerExampleRows())
    else:
        optimizer = MeZO(parameters, lr=0.1, perturb=Stacked(lambda copies: losses(copies).mean(1)))
    with pytest.raises(UsageError, match=rf"uses \.{name} of a trained parameter, which has no form for several"):
        optimizer.step(losses)


def test_falcon_is_stacked_with_an_adapter_alone():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = models.build("falcon", vocab_size=300).double().eval()
    closure, copies = losses_of(model, data())
    with pytest.raises(UsageError, match=r"uses \.T of a trained parameter"):
        LOZO(model, lr=1e-3, perturb=Stacked(copies)).step(closure)
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["query_key_value", "dense"])
    adapted = get_peft_model(model, lora).double().eval()
    with torch.no_grad():
        compare(lambda p: MeZO(p, lr=1e-3, num_perturbations=4), adapted, tolerance=1e-12)


def test_an_embedding_that_rewrites_its_rows_is_refused():
    layer, ids = nn.Embedding(5, 3, max_norm=1.0), torch.arange(5)
    optimizer = MeZO(
        layer, lr=0.1, perturb=Stacked(lambda copies: layer(ids.repeat(copies)).view(copies, -1).square().mean(1))
    )
    with pytest.raises(UsageError, match="max_norm"):
        optimizer.step(lambda: layer(ids).mean())


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("estimator", ["two_point(1e-3, 2)", "one_sided(1e-3, 5)"])
@pytest.mark.parametrize("directions", [Flipout(), LowRank(1, refresh=0), LowRank(1), Dense()], ids=repr)
def test_what_is_called_stackable_is_stacked(directions, estimator, copies):
    """Also around a centre, where nothing is perturbed; dense directions do not fit."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(300, 300, bias=False), torch.randn(2, 300)

    def run(perturb):
        optimizer = ZerothOrder(layer, lr=0.0, directions=directions, estimator=estimator, perturb=perturb)
        optimizer.step(lambda: layer(inputs).square().mean())
        return optimizer.record()

    def losses(count):
        return layer(inputs.repeat(count, 1)).square().view(count, -1).mean(1)

    points = make_estimator(estimator).points(seed=0, step=0)
    stacked = Stacked(losses, max_copies=copies, max_bytes=1 << 18)
    fits = stackable(dict(layer.named_parameters()), directions, copies, 1 << 18, points=points)
    assert fits == (not isinstance(directions, Dense))
    if not fits:
        with pytest.raises(UsageError, match="perturbed copies take"):
            run(stacked)
    else:
        assert run(stacked) == pytest.approx(run("in_place:copy"), rel=1e-5)


def test_one_loss_a_copy_is_asked_for():
    layer = nn.Linear(2, 1)
    optimizer = MeZO(layer, lr=0.1)
    optimizer.perturb = Stacked(lambda copies: layer(torch.ones(copies, 2)).mean())
    with pytest.raises(UsageError, match="one loss per copy"):
        optimizer.step(lambda: layer(torch.ones(1, 2)).mean())
