"""KerZOO: the averaged iterate in all its forms, projections, the repaired scheme, and what it reports."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zokernel.directions import Dense
from zokernel.errors import RunError, UsageError
from zokernel.estimators.smoothed import signed_uniform
from zokernel.experiments.kerzoo.printed import PrintedKerZOO
from zokernel.optim import KerZOO, MeZO
from zokernel.optim.affine_move import AffineMove
from zokernel.optim.updates.averaging.int8_blocks import dequantize, quantize_
from zokernel.optim.updates.averaging.iterate_weights import (
    average_weight,
    coefficients_from_first,
    coefficients_from_last,
    iterate_weights,
)


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    x, y = torch.randn(20, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    return net.to(dtype), lambda: nn.functional.cross_entropy(net(x.to(dtype)), y)


def two_groups(net):
    names = dict(net.named_parameters())
    return [
        {"params": [(n, names[n]) for n in ("0.weight", "0.bias")], "weight_decay": 0.3},
        {"params": [(n, names[n]) for n in ("2.weight", "2.bias")], "lr": 0.02},
    ]


def distance(left, right):
    return max((left[n].double() - right[n].double()).abs().max().item() for n in right)


def run(steps=40, **options):
    """Train and average every iterate by hand; return the optimizer, the average and how far it is from the iterate."""
    net, loss = problem()
    optimizer = PrintedKerZOO(two_groups(net), lr=0.01, weight_decay=0.1, **options)
    expected = {n: p.detach().double() for n, p in optimizer.named_params.items()}
    for step in range(steps):
        optimizer.step(loss)
        weight = 6 / (6 + step)
        expected = {
            n: (1 - weight) * v + weight * optimizer.named_params[n].detach().double() for n, v in expected.items()
        }
    lag = distance(optimizer.named_params, expected)
    return optimizer, expected, lag


SETTINGS = {
    "plain": {},
    "param_origin": {"clip": "param_origin", "clip_radius": 4.0},
    "param_init": {"clip": "param_init", "clip_radius": 0.3},
    "grad": {"clip": "grad", "clip_radius": 0.5},
    "md": {"grad_at": "md"},
    "md_copy": {"grad_at": "md", "perturb": "in_place:copy"},
    "grid": {"perturb": "in_place:grid"},
    "sphere": {"distribution": "sphere"},
    "literal": {"radius_schedule": "literal", "total_steps": 40},
}


AVERAGED = [
    (setting, averaging)
    for setting in SETTINGS
    for averaging in ("fp32", "int8", "journal")
    if not (averaging == "journal" and setting.startswith("md"))  # refused, see below
]


@pytest.mark.parametrize(("setting", "averaging"), AVERAGED)
def test_every_average_is_the_weighted_mean_of_the_iterates(setting, averaging):
    """fp32 and journal to fp32 round-off; int8 to a few steps of lag/127 (rounding errors of 7 steps add up)."""
    optimizer, expected, lag = run(averaging=averaging, **SETTINGS[setting])
    assert lag > 1e-3
    tolerance = 8 * lag / 127 if averaging == "int8" else 2e-6
    assert distance(optimizer.averaged_weights(), expected) < tolerance


def test_all_averages_agree_on_the_iterate_itself():
    runs = [run(steps=10, averaging=a)[0] for a in ("none", "fp32", "int8", "journal")]
    for other in runs[1:]:
        assert all(torch.equal(p, other.named_params[n]) for n, p in runs[0].named_params.items())


def test_weights_of_the_average():
    """They sum to one, grow as the fifth power of the step, and their mean position is 6/7 of the run."""
    weights = iterate_weights(range(4000))
    assert sum(weights) == pytest.approx(1.0)
    assert weights[3199] / weights[1599] == pytest.approx(2**5, rel=0.01)
    assert sum(w * (t + 1) for t, w in enumerate(weights)) / 4000 == pytest.approx(6 / 7, abs=2e-4)
    assert average_weight(0) == 1.0


def test_coefficients_rebuild_the_average_of_a_scalar_process():
    moves = [AffineMove(t, {0: 0.3 * (-1) ** t}, 1 - 0.01 * t, anchor=0.02 * (t % 3)) for t in range(12)]
    first = theta = average = 2.0
    for move in moves:
        theta = move.decay * theta + move.scales[0] + move.anchor * first
        average += average_weight(move.step) * (theta - average)
    end, updates = coefficients_from_first(moves)
    assert end * first + sum(f * m.scales[0] for f, m in zip(updates, moves, strict=True)) == pytest.approx(average)
    free = [AffineMove(m.step, m.scales, m.decay) for m in moves]
    theta = average = 2.0
    for move in free:
        theta = move.decay * theta + move.scales[0]
        average += average_weight(move.step) * (theta - average)
    end, updates = coefficients_from_last(free)
    assert end * theta + sum(f * m.scales[0] for f, m in zip(updates, free, strict=True)) == pytest.approx(average)


def test_a_journal_that_would_lose_digits_says_so():
    with pytest.raises(RunError, match="fp32"):
        coefficients_from_last([AffineMove(t, {}, 0.5) for t in range(60)])


def test_eight_bits_are_unbiased_and_within_one_step():
    """Mean of n stochastic roundings: |z| < 4.5 with a variance of at most step^2 / (4 n)."""
    values = torch.randn(700, generator=torch.Generator().manual_seed(1))
    codes, scales = torch.zeros(700, dtype=torch.int8), torch.zeros(3)
    generator, total, n = torch.Generator().manual_seed(2), torch.zeros(700), 400
    out = torch.empty(700)
    for _ in range(n):
        quantize_(codes, scales, values, generator)
        dequantize(codes, scales, out=out)
        step = scales.repeat_interleave(256)[:700]
        assert ((out - values).abs() <= step * (1 + 1e-5)).all()
        total += out
    assert ((total / n - values).abs() < 4.5 * step / (2 * math.sqrt(n)) + 1e-6).all()


def test_int8_state_is_a_quarter_of_an_fp32_copy():
    optimizer = KerZOO([nn.Parameter(torch.zeros(64, 256))], lr=0.1, averaging="int8")
    optimizer.step(lambda: optimizer.named_params["0"].square().sum())
    state = optimizer.state[optimizer.named_params["0"]]
    assert sum(t.numel() * t.element_size() for t in state.values()) == pytest.approx(64 * 256 * (1 + 4 / 256))


def test_swapping_the_average_in_and_out_changes_nothing():
    optimizer, expected, _ = run(steps=8, averaging="fp32")
    before = {n: p.detach().clone() for n, p in optimizer.named_params.items()}
    with optimizer.averaged():
        assert distance(optimizer.named_params, expected) < 2e-6
    assert all(torch.equal(p, before[n]) for n, p in optimizer.named_params.items())


def textbook(steps, *, lr, grad_at, accelerated, seed=0):
    """Algorithm 1, printed or repaired, written out in float64 with materialised directions."""
    net, loss = problem(torch.float64)
    params = dict(net.named_parameters())
    directions, eps = Dense("gaussian"), 1e-3
    theta = {n: p.detach().clone() for n, p in params.items()}
    average = {n: v.clone() for n, v in theta.items()}

    def at(values):
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(values[n])
            return float(loss())

    for t in range(steps):
        beta = 1 + t / 6
        md = {n: theta[n] / beta + (1 - 1 / beta) * average[n] for n in theta}
        point = md if grad_at == "md" else theta
        estimate = {n: torch.zeros_like(v) for n, v in theta.items()}
        for i in range(3):
            r = signed_uniform(seed, t, i)
            u = directions(params, seed=seed, step=t, index=i)
            ends = [at({n: point[n] + s * eps * r * u[n] for n in point}) for s in (1, -1)]
            weight = 4 * 15 / 4 * r * (5 - 7 * r**2)
            for n in estimate:
                estimate[n] += (ends[0] - ends[1]) / (2 * eps) * weight / 3 * u[n]
        step = lr * (t + 1) if accelerated else lr
        theta = {n: theta[n] - step * estimate[n] for n in theta}
        average = {n: theta[n] / beta + (1 - 1 / beta) * average[n] for n in theta}
    return theta, average


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("grad_at", ["theta", "md"])
def test_follows_algorithm_one_written_out(grad_at, accelerated):
    lr = 5e-4
    theta, average = textbook(12, lr=lr, grad_at=grad_at, accelerated=accelerated)
    net, loss = problem(torch.float64)
    optimizer = PrintedKerZOO(
        net,
        lr=lr,
        distribution="gaussian",
        grad_at=grad_at,
        step_schedule="accelerated" if accelerated else "constant",
        averaging="fp32",
    )
    for _ in range(12):
        optimizer.step(loss)
    assert distance(optimizer.named_params, theta) < 1e-8
    assert distance(optimizer.averaged_weights(), average) < 1e-8
    assert optimizer.effective_lr() == pytest.approx(4 * lr * (13 if accelerated else 1))


def test_projections_keep_their_promises():
    for clip, radius in (("param_origin", 2.0), ("param_init", 0.05)):
        net, loss = problem()
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        optimizer = PrintedKerZOO(net, lr=0.05, clip=clip, clip_radius=radius)
        for _ in range(5):
            optimizer.step(loss)
            centre = start if clip == "param_init" else {n: torch.zeros_like(p) for n, p in start.items()}
            squared = sum((p - centre[n]).square().sum() for n, p in optimizer.named_params.items())
            assert float(squared) ** 0.5 <= radius * (1 + 1e-5)


def test_gradient_clip_limits_the_step():
    net, loss = problem()
    optimizer = KerZOO(net, lr=0.1, clip="grad", clip_radius=0.01)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer.step(loss)
    squared = sum((p - before[n]).square().sum() for n, p in optimizer.named_params.items())
    assert float(squared) ** 0.5 == pytest.approx(0.1 * 0.01, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "gain"),
    [
        ({}, 4.0),
        ({"radius": 0.5}, 4.9375),
        ({"radius": 0.5, "radius_schedule": "lr_compensated", "total_steps": 5}, 4.0),
        ({"radius_schedule": "rescaled", "total_steps": 5}, 4.0),
        ({"kernel_order": 5, "paper_k5": True}, 4 * 13 / 7),
        ({"kernel_constant": 1.0, "kernel_order": 1}, 1.0),
    ],
)
def test_effective_learning_rate_and_facts(options, gain):
    optimizer = PrintedKerZOO([nn.Parameter(torch.ones(3))], lr=0.25, **options)
    assert optimizer.effective_lr() == pytest.approx(0.25 * gain)
    assert optimizer.facts().gain == pytest.approx(gain)


def test_one_step_moves_as_mezo_at_the_effective_lr_on_average():
    """On a linear loss the mean displacement is effective_lr times the gradient: |z| < 4.5 per coordinate."""
    slope = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for make in (lambda w: MeZO([w], lr=0.4), lambda w: KerZOO([w], lr=0.1, radius=1.0)):
        weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        optimizer, updates = make(weight), []
        for _ in range(600):
            before = weight.detach().clone()
            optimizer.step(lambda: (weight * slope).sum())  # noqa: B023
            updates.append(before - weight.detach())
        updates = torch.stack(updates)
        scores = (updates.mean(0) - 0.4 * slope) / (updates.std(0) / len(updates) ** 0.5)
        assert optimizer.effective_lr() == pytest.approx(0.4)
        assert scores.abs().max() < 4.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": "grad"}, "clip and a positive clip_radius go together"),
        ({"clip_radius": 1.0}, "clip and a positive clip_radius go together"),
        ({"clip": "weights", "clip_radius": 1.0}, "There is no clip 'weights'"),
        ({"clip": "grad", "clip_radius": -1.0}, r"clip_radius must be positive and finite, not -1\.0"),
        ({"grad_at": "md"}, "set averaging to 'fp32' or 'int8'"),
        ({"grad_at": "md", "averaging": "journal"}, "set averaging to 'fp32' or 'int8'"),
        ({"grad_at": "ag"}, "There is no grad_at 'ag'"),
        ({"averaging": "fp16"}, "There is no averaging 'fp16'"),
        ({"step_schedule": "linear"}, "There is no step_schedule 'linear'"),
        ({"radius_schedule": "literal"}, "The radius schedule 'literal' needs total_steps"),
        ({"clip": "param_origin", "clip_radius": 1.0, "perturb": "in_place:grid"}, "grid, .* would leave it"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        PrintedKerZOO([nn.Parameter(torch.ones(2))], lr=0.1, **options)


def test_there_is_no_average_without_averaging():
    with pytest.raises(UsageError, match="averaging"):
        KerZOO([nn.Parameter(torch.ones(2))], lr=0.1).averaged_weights()


def test_int8_pieces_do_not_change_the_average(monkeypatch):
    """Small pieces only change which random numbers round: both stay within a few steps of the exact average."""
    from zokernel.optim.updates.averaging import averages, int8_blocks

    for module in (averages, int8_blocks):
        monkeypatch.setattr(module, "CHUNK", 256)
    weight = nn.Parameter(torch.zeros(40, 24))
    target = torch.sin(torch.arange(960.0)).reshape(40, 24)
    optimizer = KerZOO([("w", weight)], lr=1e-3, weight_decay=0.2, averaging="int8")
    expected = torch.zeros(40, 24, dtype=torch.float64)
    for step in range(12):
        optimizer.step(lambda: (weight - target).square().sum())
        expected = torch.lerp(expected, weight.detach().double(), 6 / (6 + step))
    lag = (weight.detach() - expected).abs().max()
    assert (optimizer.averaged_weights()["w"] - expected).abs().max() < 8 * lag / 127


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"grad_at": "md", "averaging": "fp32"}, "grad_at"),
        ({"clip": "param_init", "clip_radius": 1.0}, "clip='param_init'"),
        ({"paper_k5": True, "kernel_order": 5}, "paper_k5"),
        ({"step_schedule": "accelerated"}, "step_schedule"),
    ],
)
def test_options_of_the_paper_alone_are_refused_with_the_class_that_has_them(options, named):
    with pytest.raises(UsageError, match=f"^{named} only reproduces .*PrintedKerZOO, or --method kerzoo_printed"):
        KerZOO([nn.Parameter(torch.ones(2))], lr=0.1, **options)
    PrintedKerZOO([nn.Parameter(torch.ones(2))], lr=0.1, **options)
