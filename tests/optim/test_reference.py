"""The optimizer trains as the textbook loop does, and updates are those of dense tensors for every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zokernel.directions import Blockwise, Dense, LowRank, Orthogonal
from zokernel.estimators import TwoPoint
from zokernel.optim import MeZO, ZerothOrder
from zokernel.optim.reference import textbook_step
from zokernel.optim.updates import SGD, Adam, Sign


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, labels = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    return net, lambda: nn.functional.cross_entropy(net(inputs), labels)


@pytest.mark.parametrize("perturb", ["in_place", "in_place:copy", "in_forward"])
@pytest.mark.parametrize("count", [1, 3])
def test_mezo_is_the_textbook_loop(count, perturb):
    settings = {"lr": 0.05, "eps": 1e-3, "num_perturbations": count, "seed": 4}
    net, loss = problem()
    optimizer = MeZO(net, perturb=perturb, **settings)
    reference, reference_loss = problem()
    weights = dict(reference.named_parameters())
    for step in range(20):
        step_loss = optimizer.step(loss)
        assert step_loss == pytest.approx(textbook_step(weights, reference_loss, step=step, **settings), rel=1e-10)
    for name, weight in optimizer.named_params.items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-10)


FAMILIES = {
    "sphere": lambda: Dense("sphere"),
    "orthogonal": lambda: Orthogonal(4),
    "blockwise": lambda: Blockwise(Dense("gaussian"), every=2),
    "blockwise_sphere": lambda: Blockwise(Dense("sphere"), every=1),
    "low_rank": lambda: LowRank(1, refresh=3),
    "dense": lambda: Dense("rademacher"),
}


def dense_run(family, rule, steps):
    """Every step from materialised directions over all tensors, and the rule written out."""
    net, loss = problem()
    weights, lr, eps = dict(net.named_parameters()), 0.02, 1e-3
    memory = {name: torch.zeros_like(w) for name, w in weights.items()}
    squares = {name: torch.zeros_like(w) for name, w in weights.items()}
    with torch.no_grad():
        for step in range(steps):
            estimate = {name: torch.zeros_like(w) for name, w in weights.items()}
            for index in range(2):
                z = family(weights, seed=0, step=step, index=index)
                theta = {name: w.clone() for name, w in weights.items()}
                ends = []
                for sign in (1, -1):
                    for name, w in weights.items():
                        w.copy_(theta[name] + sign * eps * z[name])
                    ends.append(float(loss()))
                for name, w in weights.items():
                    w.copy_(theta[name])
                    estimate[name] += (ends[0] - ends[1]) / (2 * eps) / 2 * z[name]
            for name, w in weights.items():
                if rule == "momentum":
                    memory[name] = 0.7 * memory[name] + estimate[name]
                    change = memory[name]
                elif rule == "adam":
                    memory[name] = 0.9 * memory[name] + 0.1 * estimate[name]
                    squares[name] = 0.999 * squares[name] + 0.001 * estimate[name] ** 2
                    root = (squares[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                    change = memory[name] / (1 - 0.9 ** (step + 1)) / root
                else:
                    change = estimate[name].sign()
                w -= lr * change
    return weights


RULES = {"momentum": lambda: SGD(0.7), "adam": Adam, "sign": Sign}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_that_need_tensors_follow_the_directions_that_were_perturbed(family, rule):
    """Families whose direction on a tensor depends on the other tensors are asked for all of them at once."""
    expected = dense_run(FAMILIES[family](), rule, 6)
    net, loss = problem()
    optimizer = ZerothOrder(
        net, lr=0.02, directions=FAMILIES[family](), estimator=TwoPoint(1e-3, 2), update=RULES[rule]()
    )
    for _ in range(6):
        optimizer.step(loss)
    for name, weight in optimizer.named_params.items():
        # Directions are fp32 numbers in float64 tensors; Adam divides estimates of 1e-3 by their own size.
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6 if rule == "adam" else 1e-8)


def test_momentum_of_one_group_follows_directions_over_both():
    """With coupled directions the group without momentum is not moved by the other's rule."""
    net, loss = problem()
    params = dict(net.named_parameters())
    groups = [
        {"params": [(n, params[n]) for n in ("0.weight", "0.bias")], "momentum": 0.0},
        {"params": [(n, params[n]) for n in ("2.weight", "2.bias")], "momentum": 0.7},
    ]
    optimizer = ZerothOrder(groups, lr=0.02, directions=Orthogonal(4), estimator=TwoPoint(1e-3, 2), update=SGD())
    plain, plain_loss = problem()
    other = ZerothOrder(plain, lr=0.02, directions=Orthogonal(4), estimator=TwoPoint(1e-3, 2))
    optimizer.step(loss)
    other.step(plain_loss)  # the first step of momentum is a plain one
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(params[name], weight, rtol=0, atol=1e-9)


METHODS = ["mezo", "hizoo", "lozo_m", "subzero", "zo_adam", "sparse_mezo", "kerzoo", "kerzoo_int8", "fzoo"]
METHODS += ["zo_muon", "subzero_plus"]


@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_of_torch_changes_nothing(method):
    """Buffers state their dtype: under float64 low-rank directions were infinite and HiZOO trained on wrong ones."""
    from zokernel.optim import get_method

    ends = []
    for default in (torch.float32, torch.float64):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        inputs = torch.randn(8, 4)
        average = {"averaging": "int8"} if method == "kerzoo_int8" else {}
        optimizer = get_method(method.split("_int8")[0])(net, lr=1e-3, eps=1e-2, **average)
        torch.set_default_dtype(default)
        try:
            for _ in range(4):
                optimizer.step(lambda net=net, inputs=inputs: net(inputs).square().mean())
        finally:
            torch.set_default_dtype(torch.float32)
        weights = optimizer.averaged_weights() if average else dict(net.named_parameters())
        ends.append([p.detach().clone() for p in weights.values()])
    assert all(torch.equal(left, right) for left, right in zip(*ends, strict=True))
