"""Optimizers in a loop of one's own: parameters frozen and added on the way, odd closures, copies."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from method_cases import CASES
from torch import nn

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.optim import AdamW, KerZOO, MeZO, ZerothOrder, ZOAdam, get_method
from zokernel.perturb import Stacked

ZEROTH_ORDER = [case for case, (name, _) in CASES.items() if name not in ("sgd", "adamw")]
every_case = pytest.mark.parametrize("case", list(CASES))
every_zeroth_order = pytest.mark.parametrize("case", ZEROTH_ORDER)


def problem(case, params=None, **overrides):
    """Return two tensors, their quadratic loss, and an optimizer of both (or of other parameters)."""
    weights = {"a": nn.Parameter(torch.ones(3, 2)), "b": nn.Parameter(torch.ones(4, 3))}
    name, (rate, _, options) = CASES[case]
    optimizer = get_method(name)(params(weights) if params else list(weights.items()), lr=rate, **(options | overrides))
    return weights, lambda: 0.5 * sum(w.square().sum() for w in weights.values()), optimizer


@every_case
def test_a_frozen_parameter_stays_and_trains_again(case):
    weights, loss, optimizer = problem(case)
    for _ in range(3):
        optimizer.step(loss)
    weights["b"].requires_grad_(False)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    before, start = {name: w.detach().clone() for name, w in weights.items()}, float(loss().detach())
    for _ in range(60):
        optimizer.step(loss)
    assert torch.equal(weights["b"], before["b"])
    assert weights["a"].detach().square().sum() < 0.5 * before["a"].square().sum()
    weights["b"].requires_grad_(True)
    for _ in range(100):
        optimizer.step(loss)
    assert float(loss().detach()) < 0.3 * start


@pytest.mark.parametrize("perturb", ["in_place", "in_place:copy", "in_place:grid", "in_forward"])
def test_other_parameters_step_as_if_there_were_no_frozen_one(perturb):
    """Directions are keyed by name, so freezing one parameter does not change those of the others."""

    def run(with_rested):
        weights = {"a": nn.Parameter(torch.ones(5)), "b": nn.Parameter(torch.ones(3))}
        params = [("a", weights["a"])] + ([("b", weights["b"])] if with_rested else [])
        optimizer = MeZO(params, lr=0.05, perturb=perturb)
        weights["b"].requires_grad_(False)
        for _ in range(5):
            optimizer.step(lambda: weights["a"].square().sum() * (1.0 * weights["b"]).sum())
        return weights["a"].detach()

    assert torch.equal(run(True), run(False))


def test_a_frozen_parameter_keeps_its_share_of_an_average():
    """The average of a parameter that rests is that of a constant: stored and rebuilt from the journal alike."""

    def run(averaging, distribution):
        weights = {"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(2))}
        optimizer = KerZOO(
            weights.items(), lr=0.01, averaging=averaging, distribution=distribution, perturb="in_place:copy"
        )
        for step in range(12):
            weights["b"].requires_grad_(not 4 <= step < 9)
            optimizer.step(lambda: sum(w.square().sum() for w in weights.values()))
            if step == 8:
                optimizer.add_param_group({"params": [("c", nn.Parameter(torch.ones(2)))]})
        return optimizer.averaged_weights()

    for distribution in ("rademacher", "sphere"):
        stored, rebuilt = run("fp32", distribution), run("journal", distribution)
        for name in "abc":
            assert torch.allclose(stored[name], rebuilt[name], rtol=0, atol=2e-6)
            assert not torch.equal(stored[name], torch.ones_like(stored[name])) or name == "c"


def halve(module):
    nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(module.parameters()).detach() * 0.5, module.parameters()
    )


def double(module):
    module.double()


@pytest.mark.parametrize("perturb", ["in_place", "in_place:copy", "in_forward"])
@pytest.mark.parametrize("replace", [halve, double])
def test_weights_that_were_replaced_are_those_of_the_next_step(replace, perturb):
    """torch counts no write when ``p.data`` is assigned: the new memory shows it."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(70, 300), nn.Tanh(), nn.Linear(300, 3))

    def loss(module):
        inputs = torch.linspace(-1, 1, 8 * 70).view(8, 70).to(module[0].weight.dtype)
        return module(inputs).square().mean()

    trained, fresh = model(), model()
    options = {"perturb": perturb, "directions": Dense("rademacher"), "seed": 3}
    optimizer = ZerothOrder(list(trained.named_parameters()), lr=0.0, **options)
    optimizer.step(lambda: loss(trained))
    replace(trained)
    assert optimizer.changed_by_others
    replace(fresh)
    expected = ZerothOrder(list(fresh.named_parameters()), lr=1e-3, **options)
    expected.step_count = 1
    optimizer.param_groups[0]["lr"] = 1e-3
    step_loss = optimizer.step(lambda: loss(trained))
    assert step_loss == pytest.approx(expected.step(lambda: loss(fresh)), rel=1e-5)  # the first step leaves roundings
    for weight, expected_weight in zip(trained.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(weight, expected_weight, rtol=1e-5, atol=1e-7)
    assert not optimizer.changed_by_others


def test_nothing_left_to_train_is_an_error():
    weight = nn.Parameter(torch.ones(3))
    optimizer = MeZO([weight], lr=0.1)
    weight.requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter has requires_grad=True any more"):
        optimizer.step(lambda: weight.sum())
    plain = torch.ones(3)  # never required gradients
    MeZO([plain], lr=0.1).step(lambda: plain.square().sum())
    assert not torch.equal(plain, torch.ones(3))


@every_case
def test_an_added_group_trains_with_every_method(case):
    weights, loss, optimizer = problem(case, lambda weights: [("a", weights["a"])])
    for _ in range(30):
        optimizer.step(loss)
    assert torch.equal(weights["b"], torch.ones(4, 3))
    optimizer.add_param_group({"params": [("b", weights["b"])]})
    start = float(loss().detach())
    for _ in range(150):
        optimizer.step(loss)
    assert float(loss().detach()) < 0.25 * start
    assert set(optimizer.named_params) == {"a", "b"}


def test_groups_may_be_modules():
    net = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.LayerNorm(2)})
    optimizer = MeZO([{"params": net["body"]}], lr=0.1)
    with pytest.raises(UsageError, match="Two parameters are named 'weight'"):
        optimizer.add_param_group({"params": net["head"]})
    unnamed = MeZO(net["body"].parameters(), lr=0.1)
    unnamed.add_param_group({"params": net["head"], "lr": 0.01})
    assert [len(group["params"]) for group in unnamed.param_groups] == [2, 2]
    for group, message in (
        ({"params": net["body"]}, "trained already, in another group"),
        ({"params": [("x", nn.Parameter(torch.ones(1)))]}, "for all or for none"),
        ({"params": []}, "nothing to train"),
        ({"params": [3.0]}, "one is a float"),
        ([1], "dictionary with 'params'"),
    ):
        with pytest.raises(UsageError, match=message):
            unnamed.add_param_group(group)
    assert len(unnamed.param_groups) == 2


@pytest.mark.parametrize(
    ("named", "settings", "message"),
    [
        (True, ({"lr": 0.1}, {"lr": 0.2}), "'out' and 'in' .* 0 and 1 have different lr (0.1 and 0.2)"),
        (False, ({"momentum": 0.5}, {}), "'0' and '1' .* 0 and 1 have different momentum (0.5 and 0.0)"),
        (True, ({}, {"weight_decay": 0.5}), "'out' and 'in' .* 0 and 1 have different weight_decay (0.0 and 0.5)"),
    ],
)
def test_tied_weights_in_two_groups_have_the_same_settings(named, settings, message):
    """Those of the second group were ignored."""
    weight = torch.ones(3, 3)
    names = ("out", "in") if named else (None, None)
    first, second = (
        {"params": [(name, weight.view(3, 3)) if name else weight.view(3, 3)], **own}
        for name, own in zip(names, settings, strict=True)
    )
    expected = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UsageError, match=f"^Parameters {expected}: put both into one group, or give the groups the"):
        MeZO([first, second])
    optimizer = MeZO([first])
    with pytest.raises(UsageError, match=expected):
        optimizer.add_param_group(second)
    assert len(optimizer.param_groups) == len(optimizer.named_params) == 1
    optimizer.step(lambda: weight.square().sum())


def test_tied_weights_in_two_groups_move_as_in_one():
    ends = []
    for split in (False, True):
        weight = torch.linspace(-1, 1, 9).view(3, 3)
        pairs = [("out", weight), ("in", weight.view(3, 3))]
        groups = [{"params": [pair], "lr": 0.1, "name": pair[0]} for pair in pairs]
        optimizer = MeZO(groups if split else pairs, lr=0.1)
        for _ in range(3):
            optimizer.step(lambda weight=weight: weight.square().sum())
        ends.append(weight)
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", [MeZO, AdamW])
def test_tensors_of_the_module_need_no_name_when_they_are_added(method):
    """A layer unfrozen later is named as in the module, so it moves as if it had been trained by that name."""

    def run(add):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        net[2].requires_grad_(False)
        optimizer = method(net, lr=0.01)
        if add == "in a copy":
            net, optimizer = copy.deepcopy((net, optimizer))
        net[2].requires_grad_(True)
        params_by_form = {"module": net[2], "pairs": [(f"2.{name}", p) for name, p in net[2].named_parameters()]}
        optimizer.add_param_group({"params": params_by_form.get(add, net[2].parameters())})
        optimizer.step(lambda: net(torch.ones(1, 2)).square().sum())
        assert list(optimizer.named_params) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        return net[2].weight.detach()

    expected = run("pairs")
    for add in ("tensors", "module", "in a copy"):
        assert torch.equal(run(add), expected)


@pytest.mark.parametrize("method", [MeZO, AdamW])
@pytest.mark.parametrize("form", ["pairs", "module", "unpickled"])
def test_a_tensor_without_a_name_is_refused_with_what_to_pass(method, form):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = method(net[0].named_parameters() if form == "pairs" else net[0], lr=0.01)
    optimizer = pickle.loads(pickle.dumps(optimizer)) if form == "unpickled" else optimizer
    with pytest.raises(UsageError, match=r"has none: pass \(name, tensor\) pairs, as in .*prefix='head'"):
        optimizer.add_param_group({"params": net[1].weight})
    optimizer.add_param_group({"params": net[1].named_parameters(prefix="head")})
    assert list(optimizer.named_params) == ["weight", "bias", "head.weight", "head.bias"]


def test_adam_corrects_the_bias_of_every_parameter_by_its_own_steps():
    """A parameter added after 50 steps moves as one in its first step: by the learning rate."""
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = ZOAdam([("a", first)], lr=0.01)
    loss = lambda: (first - 1).square().sum() + second.sum()  # noqa: E731
    for _ in range(50):
        optimizer.step(loss)
    optimizer.add_param_group({"params": [("b", second)]})
    optimizer.step(loss)
    assert torch.allclose(second.detach().abs(), torch.tensor(0.01), rtol=1e-4)


@pytest.mark.parametrize("method", [MeZO, AdamW])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "end it with 'return loss'"),
        ("0.5", "a str"),
        ({"loss": 0.5}, "a dict"),
        ([0.5], "a list"),
        (torch.ones(3), r"\(3,\) losses"),
        (np.ones(2), r"\(2,\) losses"),
        (torch.tensor(1j), "complex64"),
    ],
)
def test_a_value_that_is_no_loss_is_refused(method, value, message):
    weight = nn.Parameter(torch.ones(3))
    optimizer = method([weight], lr=0.1)
    with pytest.raises(UsageError, match=message):
        optimizer.step(lambda: value)
    assert torch.equal(weight, torch.ones(3))
    assert optimizer.step_count == 0


@pytest.mark.parametrize("case", ["mezo", "forward_gradient", "fzoo"])
def test_every_form_of_a_number_is_a_loss(case):
    for form in (lambda v: v, lambda v: v.reshape(1, 1), lambda v: v.double()):
        _, loss, optimizer = problem(case)
        assert optimizer.step(lambda: form(loss())) == pytest.approx(9.0, rel=1e-2)  # noqa: B023
    if case != "forward_gradient":
        for form in (float, lambda v: v.detach().numpy(), lambda v: np.float32(v.detach())):
            _, loss, optimizer = problem(case)
            assert optimizer.step(lambda: form(loss().detach())) == pytest.approx(9.0, rel=1e-2)  # noqa: B023


def warned(optimizer, closure, steps=3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step(closure)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8)])
@pytest.mark.parametrize("params", ["module", "parameters"])
def test_layers_in_train_mode_are_named_once(layer, params):
    net, x = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 1)), torch.randn(16, 4)
    net.train()
    optimizer = MeZO(net if params == "module" else net.parameters(), lr=1e-6)

    def loss():
        return net(x).square().mean()

    (message,) = warned(optimizer, lambda: loss())
    assert type(layer).__name__ in message
    assert "model.eval()" in message
    net.eval()
    assert not warned(MeZO(net.parameters(), lr=1e-6), lambda: loss())


def test_a_layer_that_begins_to_train_later_is_seen():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval(), torch.randn(16, 4)
    optimizer = MeZO(net, lr=1e-6)
    assert not warned(optimizer, lambda: net(x).square().mean())
    net.train()
    assert len(warned(optimizer, lambda: net(x).square().mean())) == 1


@pytest.mark.parametrize("perturb", ["in_place", "in_forward", "stacked"])
def test_a_loss_that_draws_random_numbers_is_noticed(perturb):
    weight, x = nn.Parameter(torch.ones(4, 1)), torch.randn(64, 4)
    loss = lambda: nn.functional.dropout(x @ weight, 0.5).square().mean()  # noqa: E731
    losses = lambda n: nn.functional.dropout(nn.functional.linear(x.repeat(n, 1), weight.T)).view(n, -1).mean(1)  # noqa: E731
    if perturb == "stacked":
        layer = nn.Linear(4, 1)
        losses = lambda n: nn.functional.dropout(layer(x.repeat(n, 1))).view(n, -1).mean(1)  # noqa: E731
        (message,) = warned(MeZO(layer, lr=1e-6, perturb=Stacked(losses)), loss)
    else:
        (message,) = warned(MeZO([weight], lr=1e-6, perturb=perturb), loss)
    assert "draws random numbers" in message

    def seeded():
        torch.manual_seed(0)
        return loss()

    assert not warned(MeZO([weight], lr=1e-6), seeded)
    # A single loss per step has nothing to be compared with.
    assert not warned(ZerothOrder([weight], lr=1e-6, estimator="one_sided(1e-3, 1)"), lambda: weight.square().sum())


def test_any_generator_of_numpy_may_be_the_global_one():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        weight = nn.Parameter(torch.ones(3))
        optimizer = MeZO([weight], lr=0.01)
        optimizer.step(lambda: weight.square().sum())
        with pytest.warns(UserWarning, match="random"):
            optimizer.step(lambda: weight.square().sum() + np.random.rand())
    finally:
        np.random.set_bit_generator(before)


def test_a_new_batch_in_every_call_is_noticed():
    weight, batches = nn.Parameter(torch.ones(4, 1)), iter(torch.randn(50, 16, 4))
    (message,) = warned(MeZO([weight], lr=1e-6), lambda: (next(batches) @ weight).square().mean())
    assert "one fixed batch" in message
    steep, calls = nn.Parameter(torch.ones(4)), []
    optimizer = MeZO([steep], lr=1e-6, eps=0.1)
    assert not warned(optimizer, lambda: calls.append(1) or steep.square().sum() * 10)
    assert len(calls) == 3 * 2 + 1  # one more, in the first step, because its losses differ by more than a percent
    assert optimizer.num_forwards == 6


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@every_case
def test_copies_continue_like_the_original(case, how):
    weights, loss, optimizer = problem(case)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    for _ in range(4):
        optimizer.step(loss)
        scheduler.step()
    if how == "pickle":
        twin_weights, twin = pickle.loads(pickle.dumps((weights, optimizer)))
    else:
        twin_weights, twin = copy.deepcopy((weights, optimizer))
    assert all(twin.named_params[name] is twin_weights[name] is not weights[name] for name in weights)
    twin_loss = lambda: 0.5 * sum(w.square().sum() for w in twin_weights.values())  # noqa: E731
    assert [twin.step(twin_loss) for _ in range(5)] == [optimizer.step(loss) for _ in range(5)]
    assert all(torch.equal(twin_weights[name], weights[name]) for name in weights)
    assert (twin.step_count, twin.num_forwards) == (optimizer.step_count, optimizer.num_forwards)


WAYS = [(p, d) for p in ("in_place:copy", "in_place:grid", "in_forward") for d in ("low_rank(1)", "sparse(0.5)")]
# A sphere perturbs all tensors together, and in_forward a few at a time.
WAYS += [(p, Dense("sphere")) for p in ("in_place:copy", "in_place:grid")]


@pytest.mark.parametrize(("perturb", "directions"), WAYS)
def test_copies_perturb_their_own_weights(perturb, directions):
    weight = nn.Parameter(torch.ones(6, 5))
    optimizer = ZerothOrder([weight], lr=0.01, directions=directions, perturb=perturb)
    loss = lambda w: (1.0 * w).square().sum()  # noqa: E731
    for _ in range(3):
        optimizer.step(lambda: loss(weight))
    other, twin = copy.deepcopy((weight, optimizer))
    before = weight.detach().clone()
    losses = [twin.step(lambda: loss(other)) for _ in range(4)]
    assert torch.equal(weight, before)
    assert losses == [optimizer.step(lambda: loss(weight)) for _ in range(4)]


@every_zeroth_order
def test_empty_tensors_are_allowed(case):
    full, empty = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(0, 5))
    name, (rate, _, options) = CASES[case]
    optimizer = get_method(name)([("a", full), ("b", empty)], lr=rate, **options)
    losses = [optimizer.step(lambda: full.square().sum()) for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]


def test_lozo_carries_a_rested_average_over_to_new_factors():
    """The average of a matrix is tied to the right factors of its last step, however long it has rested."""
    weights = {"a": nn.Parameter(torch.ones(4, 3)), "b": nn.Parameter(torch.ones(4, 3))}
    optimizer = get_method("lozo_m")(weights.items(), lr=0.0, rank=3, refresh=4)
    loss = lambda: sum(w.sum() for w in weights.values())  # noqa: E731
    for _ in range(3):
        optimizer.step(loss)
    rule, directions = optimizer.rule, optimizer.directions
    before = optimizer.state[weights["b"]]["average"].clone()
    weights["b"].requires_grad_(False)
    for _ in range(6):
        optimizer.step(loss)
    weights["b"].requires_grad_(True)
    optimizer.step(loss)
    old, new = (directions.right("b", (4, 3), seed=0, step=step) for step in (2, 9))
    projected = before @ (old @ new.T) / 3
    step = optimizer.last_estimate.scaled
    left = sum(c * directions.left("b", (4, 3), seed=0, step=9, index=i) for i, c in step.items()) / 3**0.5
    expected = rule.momentum * projected + (1 - rule.momentum) * left
    assert torch.allclose(optimizer.state[weights["b"]]["average"], expected, atol=1e-4)
