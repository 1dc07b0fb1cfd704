"""ZO-Muon and SubZero+ against textbook loops in float64, Newton-Schulz against singular values."""

from __future__ import annotations

import math

import models
import pytest
import torch
from torch import nn

from zokernel.directions import Subspace
from zokernel.errors import UsageError
from zokernel.optim import SubZeroPlus, ZOMuon
from zokernel.optim.published.zo_muon import newton_schulz
from zokernel.perturb import InForward, Stacked

SHAPES = {"w": (6, 5), "b": (4,)}
EPS, LR, REFRESH, STEPS = 1e-3, 2e-4, 3, 8


def start():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def loss_at(weights):
    flat = torch.cat([weights[name].flatten() for name in SHAPES])
    target = torch.sin(torch.arange(len(flat), dtype=torch.float64))
    return float(torch.cosh(flat - target).sum() + 0.1 * flat.sum() ** 2)


def train(method, **options):
    params = {name: nn.Parameter(value) for name, value in start().items()}
    optimizer = method(params.items(), lr=LR, eps=EPS, refresh=REFRESH, **options)
    for _ in range(STEPS):
        optimizer.step(lambda: loss_at({name: p.detach() for name, p in params.items()}))
    return optimizer, {name: p.detach() for name, p in params.items()}


def slopes_along(weights, directions):
    centre = loss_at(weights)
    ends = [loss_at({name: w + EPS * z[name] for name, w in weights.items()}) for z in directions]
    return [(end - centre) / EPS for end in ends]


def draw(law, weights, step, count):
    """Return the directions of a step, and their small matrices."""
    z = [law(weights, seed=0, step=step, index=i) for i in range(count)]
    return z, [law.combine("w", SHAPES["w"], {i: 1.0}, seed=0, step=step) for i in range(count)]


def basis(law, side, size, rank, step):
    return law.basis("w", side, size, rank, 0, step // REFRESH, torch.device("cpu")).double()


def orthogonalized(matrix):
    """Five Newton-Schulz steps by the singular values."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("rank", [2, 64], ids=["thin", "all rows"])
def test_zo_muon_is_its_definition(rank):
    count, scale, r = 3, 0.05, min(rank, 6)
    law, weights = Subspace(rank, refresh=REFRESH, sides="left"), start()
    mu = EPS * math.sqrt(6 / r)
    for step in range(STEPS):
        z, cores = draw(law, weights, step, count)
        p = basis(law, "left", 6, r, step)
        slopes = slopes_along(weights, z)
        estimate = sum(slope * EPS / mu * psi for slope, psi in zip(slopes, cores, strict=True)) / count
        weights["w"] = weights["w"] - LR * p @ orthogonalized(estimate)
        weights["b"] = weights["b"] - LR * scale * sum(c * d["b"] for c, d in zip(slopes, z, strict=True)) / count
    optimizer, actual = train(ZOMuon, rank=rank, num_perturbations=count, vector_scale=scale)
    for name, weight in weights.items():
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=1e-10)
        assert (weight - start()[name]).abs().max() > LR
    assert optimizer.effective_lr() == LR


def test_subzero_plus_is_torchs_adam_on_the_small_matrix():
    count, rank = 4, 2
    law, weights = Subspace(rank, refresh=REFRESH), start()
    vector = nn.Parameter(weights["b"].clone())
    vector_adam = torch.optim.Adam([vector], lr=LR, betas=(0.9, 0.95))
    scale = math.sqrt(6 * 5) / rank
    for step in range(STEPS):
        if step % REFRESH == 0:  # new coordinates, new moments
            core = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float64))
            adam = torch.optim.Adam([core], lr=LR, betas=(0.9, 0.95))
        z, cores = draw(law, weights, step, count)
        slopes = slopes_along(weights, z)
        core.grad = sum(slope * c for slope, c in zip(slopes, cores, strict=True)) / count
        vector.grad = sum(slope * d["b"] for slope, d in zip(slopes, z, strict=True)) / count
        before = core.detach().clone()
        adam.step()
        vector_adam.step()
        u, v = basis(law, "left", 6, rank, step), basis(law, "right", 5, rank, step)
        weights = {"w": weights["w"] + scale * u @ (core.detach() - before) @ v.T, "b": vector.detach().clone()}
    optimizer, actual = train(SubZeroPlus, rank=rank, num_perturbations=count)
    for name, weight in weights.items():
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=1e-10)
        assert (weight - start()[name]).abs().max() > LR
    assert optimizer.effective_lr() == LR
    state = optimizer.state[optimizer.named_params["w"]]
    assert {name: tuple(state[name].shape) for name in ("exp_avg", "exp_avg_sq")} == {
        "exp_avg": (rank, rank),
        "exp_avg_sq": (rank, rank),
    }


def test_subzero_plus_restarts_after_a_rest_over_a_refresh():
    """The first step in new coordinates is the sign of the estimate, whatever the old moments were."""
    w = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    other = nn.Parameter(torch.zeros(2))
    optimizer = SubZeroPlus([("w", w), ("o", other)], lr=0.5, rank=2, refresh=4, num_perturbations=3)
    loss = lambda: float((w.detach() * torch.arange(30).view(6, 5)).sum() + other.detach().sum())  # noqa: E731
    for _ in range(3):
        optimizer.step(loss)
    w.requires_grad_(False)
    for _ in range(2):
        optimizer.step(loss)
    w.requires_grad_(True)
    before = w.detach().clone()
    optimizer.step(loss)
    u, v = (
        optimizer.directions.basis("w", side, size, 2, 0, 1, torch.device("cpu")).double()
        for side, size in (("left", 6), ("right", 5))
    )
    core = u.T @ (w.detach() - before) @ v / (math.sqrt(30) / 2)
    torch.testing.assert_close(core.abs(), torch.full((2, 2), 0.5, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7), (1, 4)], ids=str)
def test_newton_schulz_moves_the_singular_values_alone(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(matrix), orthogonalized(matrix), rtol=0, atol=1e-11)
    torch.testing.assert_close(newton_schulz(1e-9 * matrix), newton_schulz(matrix), rtol=0, atol=1e-11)


def test_newton_schulz_brings_singular_values_near_one():
    """From 0.002 of the norm on they end between 0.68 and 1.21; zeros stay zero."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    s = torch.cat([torch.logspace(0, -2.3, 39, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    assert s[38] / s.square().sum().sqrt() > 0.002
    singular_values = torch.linalg.svdvals(newton_schulz(u @ torch.diag(s) @ v))
    assert singular_values[:39].min() > 0.68
    assert singular_values.max() < 1.21
    assert singular_values[39] < 1e-10
    assert not newton_schulz(torch.zeros(3, 4)).any()


def test_a_step_of_zo_muon_has_the_learning_rate_for_its_largest_singular_value():
    """Whatever the scale of the loss; and equal losses leave the weights alone."""
    updates = []
    for scale in (1e-4, 1.0, 1e4):
        w = nn.Parameter(torch.zeros(30, 40))
        optimizer = ZOMuon([("w", w)], lr=0.1, rank=8, perturb="in_place:copy")
        optimizer.step(lambda w=w, scale=scale: scale * torch.linspace(-1, 1, 1200).view(30, 40).mul(w).sum())
        updates.append(w.detach())
        values = torch.linalg.svdvals(updates[-1])
        assert 0.068 < values[7] <= values[0] < 0.121
        assert values[8] < 1e-6
    torch.testing.assert_close(updates[0], updates[2], rtol=0, atol=1e-3)
    optimizer.step(lambda: 0.0 * w.sum())
    assert torch.equal(w, updates[2])


def test_a_column_space_stays_for_an_epoch():
    law, params = Subspace(2, refresh=10, sides="left"), {"w": torch.zeros(20, 15)}
    z = torch.cat([law(params, seed=1, step=step, index=0)["w"] for step in range(10)], dim=1)
    assert int(torch.linalg.matrix_rank(z)) == 2
    assert int(torch.linalg.matrix_rank(torch.cat([z, law(params, seed=1, step=10, index=0)["w"]], dim=1))) == 4
    core = law.combine("w", (20, 15), {0: 2.0, 3: -1.0}, seed=1, step=7)
    u = law.basis("w", "left", 20, 2, 1, 0, torch.device("cpu")).double()
    z = 2 * law(params, seed=1, step=7, index=0)["w"] - law(params, seed=1, step=7, index=3)["w"]
    torch.testing.assert_close(z.double(), math.sqrt(20 / 2) * u @ core, rtol=0, atol=1e-5)
    assert len(law._bases._results) == 1, "bases of past epochs are let go"


def test_the_rank_of_a_column_space_is_bounded_by_the_rows_alone():
    z = Subspace(50, sides="left")({"w": torch.zeros(4, 30)}, seed=0, step=0, index=0)["w"]
    assert int(torch.linalg.matrix_rank(z)) == 4
    assert Subspace(50, sides="left").shape((30, 4)) == (30, 4, 30)


def test_impossible_settings_are_refused():
    with pytest.raises(UsageError, match="'both' or 'left'"):
        Subspace(2, sides="right")
    with pytest.raises(UsageError, match="vector_scale"):
        ZOMuon([nn.Parameter(torch.ones(3))], vector_scale=-1.0)
    with pytest.raises(UsageError, match=r"beta2 must be in \[0, 1\), not 1.0"):
        SubZeroPlus([nn.Parameter(torch.ones(3))], beta2=1.0)


METHODS = {
    "zo_muon": lambda p: ZOMuon(p, lr=1e-2, rank=4, num_perturbations=3, perturb="in_place:copy"),
    "subzero_plus": lambda p: SubZeroPlus(p, lr=1e-3, rank=4, num_perturbations=3, perturb="in_place:copy"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", ["in_forward", "stacked"])
def test_losses_are_the_same_in_forward_and_stacked(method, way):
    ids = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(1))

    def run(way):
        torch.manual_seed(0)
        # Large enough that factors are kept as factors.
        model = models.build("llama", vocab_size=300, hidden_size=288, intermediate_size=300).double().eval()

        def rows_losses(count):
            logits = model(input_ids=ids.repeat(count, 1), use_cache=False).logits[:, -1]
            losses = nn.functional.cross_entropy(logits, ids[:, 0].repeat(count), reduction="none")
            return losses.view(count, -1).mean(1)

        optimizer = METHODS[method](model)
        if way:
            optimizer.perturb = InForward() if way == "in_forward" else Stacked(rows_losses)
        optimizer.step(lambda: rows_losses(1)[0])
        first_losses = optimizer.last_estimate.losses
        optimizer.step(lambda: rows_losses(1)[0])
        return first_losses, [p.detach().clone() for p in model.parameters()]

    (expected, weights), (actual, updated) = run(None), run(way)
    assert len(set(expected)) == 4
    assert actual == pytest.approx(expected, rel=1e-7)
    for left, right in zip(weights, updated, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
