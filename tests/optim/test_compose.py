"""Optimizers composed from parts, as objects or by text, and parts that do not go together."""

from __future__ import annotations

import math

import pytest
import torch
from method_cases import CASES
from torch import nn

from zokernel.directions import LowRank
from zokernel.errors import UsageError
from zokernel.estimators import ForwardDerivative, OneSided, TwoPoint
from zokernel.optim import ForwardDifference, HiZOO, MeZO, ZerothOrder, get_method, method_options
from zokernel.optim.updates import SGD, Adam, Clip, Normalized, PolyakBound, Sign, iterate_average
from zokernel.perturb import InForward, InPlace, Tangents


def run(steps=5, **parts):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(6, 4), torch.randn(8, 6)
    optimizer = ZerothOrder(layer, lr=0.01, **parts)
    losses = [optimizer.step(lambda: layer(inputs).square().mean()) for _ in range(steps)]
    return losses, [p.detach().clone() for p in layer.parameters()]


def test_text_and_objects_make_the_same_optimizer():
    by_objects = run(directions=LowRank(2), estimator=OneSided(1e-3, 8), update=Adam())
    by_text = run(directions="low_rank(2)", estimator="one_sided(1e-3, 8)", update="adam")
    assert by_objects[0] == by_text[0]
    assert all(torch.equal(left, right) for left, right in zip(by_objects[1], by_text[1], strict=True))


def test_a_recipe_is_its_parts():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(6, 4), torch.randn(8, 6)
    optimizer = ForwardDifference(
        layer, lr=0.01, num_perturbations=3, normalize=True, polyak_share=0.3, beta=0.7, momentum=0.5
    )
    losses = [optimizer.step(lambda: layer(inputs).square().mean()) for _ in range(5)]
    update = [Normalized(0.7), PolyakBound(0.3, 0.7), SGD(0.5)]
    parts = run(estimator=OneSided(1e-3, 3), update=update)
    assert losses == parts[0]
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), parts[1], strict=True))


def test_polyaks_bound_holds_for_the_group_with_the_largest_rate():
    """The step of a group with ten times the rate was ten times the bound."""
    rate, large = 1.0, 10.0
    results = []
    for factor in (1.0, large):
        weight = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))
        group = {"params": [weight], "lr": rate * factor * 1e3}
        optimizer = ForwardDifference(
            [group], lr=1e3, num_perturbations=1, eps=1e-6, normalize=True, beta=0.0, polyak_share=1.0
        )
        optimizer.step(lambda weight=weight: weight.square().sum())
        results.append(float(weight))
    assert results == pytest.approx([1.5, 1.5], rel=1e-4)  # a whole Polyak step halves the way to the minimum


def test_polyaks_bound_survives_a_checkpoint_under_a_schedule():
    ends = []
    for stop in (None, 3):
        torch.manual_seed(0)
        layer, inputs = nn.Linear(6, 4), torch.randn(8, 6)
        make = lambda: ForwardDifference(layer, lr=0.5, normalize=True, polyak_share=0.1)  # noqa: B023, E731
        optimizer = make()
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 0.5 * (1 - step / 6)
            if step == stop:
                saved, optimizer = optimizer.state_dict(), make()
                optimizer.load_state_dict(saved)
            optimizer.step(lambda: layer(inputs).square().mean())  # noqa: B023
        ends.append(layer.weight.detach().clone())
    assert torch.equal(*ends)


def test_clip_limits_the_norm_of_the_estimate():
    weight = nn.Parameter(torch.zeros(10))
    optimizer = ZerothOrder([weight], lr=0.1, update=Clip(0.01))
    optimizer.step(lambda: (weight * 5.0).sum())
    assert float(weight.detach().norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert optimizer.effective_lr() < 0.1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"update": [Adam(), Sign()]}, "one rule, not 2"),
        ({"update": [Adam(), iterate_average("fp32")]}, "average"),
        ({"update": [SGD(0.9), iterate_average("journal")]}, "average"),
        ({"update": "adam(beta1=2)"}, "beta1"),
        ({"update": "lion"}, "choose one of sgd"),
        ({"update": "adam(speed=3)"}, "cannot be made"),
        ({"directions": "low_rank(2"}, "not of the form"),
        ({"directions": "lowest_rank"}, "choose one of"),
        ({"estimator": "one_sided(eps=-1)"}, "eps must be positive"),
        ({"update": Adam(), "perturb": "in_place:grid"}, "grid"),
        ({"perturb": "stacked"}, "Stacked"),
        ({"update": "clip(0.1) + normalized"}, "would undo Clip"),
        ({"update": [PolyakBound(0.1), Normalized()]}, "would undo PolyakBound"),
        ({"update": "normalized + sign_of_projections"}, "would undo Normalized"),
        ({"update": "curvature_weights + sign_of_projections"}, "would undo CurvatureWeights"),
        ({"update": 5}, "not part of an update"),
        ({"update": ["adam"]}, "not part of an update"),
        ({"update": ""}, "not of the form"),
        ({"directions": ""}, "not of the form"),
        ({"directions": "low_rank(2.5)"}, "whole numbers"),
        ({"estimator": "two_point(1e-3, 2.5)"}, "whole number"),
        ({"estimator": "two_point(1e999)"}, "eps must be"),
        ({"estimator": 5}, "not an estimator"),
        ({"estimator": ForwardDerivative(2)}, "belong together"),
        ({"perturb": Tangents()}, "belong together"),
        ({"perturb": "in_situ"}, "choose one of in_place"),
        ({"perturb": InForward}, r"no way of perturbing: pass 'in_place', or an object such as InForward\(\)"),
        ({"perturb": None}, "None is no way of perturbing"),
        ({"directions": LowRank}, "no family of directions: pass one such as"),
        ({"directions": 3}, "3 is no family of directions"),
        ({"estimator": TwoPoint}, "not an estimator"),
        ({"update": SGD}, "not part of an update"),
        ({"lr": None}, "lr must be a finite number >= 0, not None"),
        ({"perturb": "in_place:undo"}, "choose one of fold"),
        ({"update": Clip(1.0), "weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts, message):
    with pytest.raises(UsageError, match=message):
        ZerothOrder(nn.Linear(2, 2), **parts)


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="MeZO has no option 'learning_rate': it has eps, num_pert"):
        MeZO(nn.Linear(2, 2), learning_rate=0.1)


def test_averages_of_preconditioned_directions_are_refused():
    directions = HiZOO(nn.Linear(2, 2)).directions
    with pytest.raises(UsageError, match="preconditioned"):
        ZerothOrder(nn.Linear(2, 2), directions=directions, estimator=TwoPoint(), update=iterate_average("fp32"))


def test_restore_is_deprecated_with_one_warning_and_a_date():
    with pytest.warns(FutureWarning, match="after 2027-06-01: pass perturb='in_place:copy'") as caught:
        optimizer = MeZO(nn.Linear(2, 2), restore="copy")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert optimizer.perturb.name == "in_place:copy"
    with pytest.raises(UsageError, match="leave out restore"):
        MeZO(nn.Linear(2, 2), restore="copy", perturb="in_place")


def test_perturb_can_be_assigned_between_steps_and_serves_one_optimizer():
    layer, inputs = nn.Linear(3, 2), torch.ones(4, 3)
    optimizer = MeZO(layer, lr=0.0)
    loss = lambda: layer(inputs).square().mean()  # noqa: E731
    first = optimizer.step(loss)
    optimizer.perturb = InForward()
    optimizer.step_count = 0
    assert optimizer.step(loss) == pytest.approx(first, rel=1e-6)
    with pytest.raises(UsageError, match="serves another optimizer"):
        MeZO(nn.Linear(3, 2), perturb=optimizer.perturb)
    with pytest.raises(UsageError, match="serves no optimizer"):
        InPlace().walks_points  # noqa: B018


def test_what_is_assigned_to_perturb_takes_the_place_of_what_was_there():
    first, second = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), nn.Linear(3, 2)
    loss = lambda: first(torch.ones(4, 3)).square().mean()  # noqa: E731
    kept = InForward()
    optimizer = MeZO(first, lr=1e-3, perturb=kept)
    optimizer.step(loss)
    optimizer.perturb = "in_place"
    MeZO(second, lr=0.0, perturb=kept).step(lambda: second(torch.ones(4, 3)).square().mean())
    other = InPlace("copy")
    optimizer.perturb = other
    with pytest.raises(UsageError, match="serves another optimizer"):
        optimizer.perturb = kept
    assert optimizer.perturb is other
    with pytest.raises(UsageError, match="serves another optimizer"):
        MeZO(second, perturb=other)
    optimizer.perturb = "in_place"
    first[0].weight.requires_grad_(False)
    optimizer.step(loss)
    optimizer.perturb = other  # which served all parameters before
    resting = first[0].weight.detach().clone()
    before, after = optimizer.step(loss), [optimizer.step(loss) for _ in range(30)][-1]
    assert after < before
    assert torch.equal(first[0].weight, resting)


def test_what_was_refused_serves_no_optimizer():
    perturb, strided, layer = InForward(), nn.Parameter(torch.ones(3, 4).t()), nn.Linear(3, 2)
    with pytest.raises(UsageError, match="not contiguous"):
        MeZO([strided], perturb=perturb)
    optimizer = MeZO(layer, lr=0.0)
    optimizer.perturb = perturb
    assert math.isfinite(optimizer.step(lambda: layer(torch.ones(4, 3)).square().mean()))


@pytest.mark.parametrize("case", CASES)
def test_steps_in_and_out_of_inference_mode(case):
    """What a step keeps, such as momentum, may be changed out of inference mode, too."""
    name, (lr, _, options) = CASES[case]
    method, ends = get_method(name), []
    for modes in ((False, False), (True, False), (False, True)):
        torch.manual_seed(0)
        layer, inputs = nn.Linear(3, 4), torch.linspace(-1, 1, 6).view(2, 3)
        optimizer = method(layer, lr=lr, **options)
        for inference in modes:
            with torch.inference_mode(inference and not method.first_order):
                optimizer.step(lambda layer=layer, inputs=inputs: layer(inputs).square().mean())
        ends.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    assert torch.equal(ends[1], ends[0])
    assert torch.equal(ends[2], ends[0])


def test_options_of_a_method_include_the_shared_ones():
    options = method_options("forward_difference")
    assert options["num_perturbations"] == 2
    assert math.isinf(options["polyak_share"])
    assert (options["perturb"], options["seed"], options["weight_decay"]) == ("in_place", 0, 0.0)
    assert method_options("lozo_m")["momentum"] == 0.9
    assert "seed" not in method_options("adamw")


def test_a_parameter_group_added_later_trains():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = MeZO([("a", first)], lr=0.05, momentum=0.5)
    loss = lambda: first.square().sum() + second.square().sum()  # noqa: E731
    optimizer.step(loss)
    optimizer.add_param_group({"params": [("b", second)], "lr": 0.05})
    losses = [optimizer.step(loss) for _ in range(100)]
    assert losses[-1] < 1e-2 < losses[0]
    renewed = HiZOO([("a", first)], lr=0.05)
    renewed.add_param_group({"params": [("b", second)]})
    assert renewed.curvature["b"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
def test_an_added_group_is_perturbed_and_bounded(perturb):
    """With in_forward it was moved by slopes that it had no part in."""
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = ZerothOrder([("a", first)], lr=0.1, perturb=perturb, estimator=TwoPoint(1e-3, 8))
    loss = lambda: (first - 1).square().sum() + (second * 1.0 - 1).square().sum()  # noqa: E731
    optimizer.step(loss)
    optimizer.add_param_group({"params": [("b", second)]})
    losses = [optimizer.step(loss) for _ in range(30)]
    assert losses[-1] < 1e-2
    bounded = ZerothOrder(
        [("a", nn.Parameter(torch.ones(3)))], lr=1e-3, estimator=TwoPoint(1e-3, 64), update=PolyakBound(0.1)
    )
    bounded.step(lambda: bounded.named_params["a"].square().sum())
    bounded.add_param_group({"params": [("b", nn.Parameter(torch.ones(3)))], "lr": 1.0})
    bounded.step(lambda: sum(p.square().sum() for p in bounded.named_params.values()))
    assert bounded.last_factor < 0.05  # L / |g|^2 is 1/4, and the largest rate 1


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    weight = nn.Parameter(torch.ones(3))
    optimizer = ZerothOrder([("a", weight)], lr=0.05, perturb="in_place:grid")
    for name, options, message in (
        ("a", {}, "Two parameters are named 'a'"),
        ("b", {"momentum": 0.9}, "set momentum to 0"),
        ("b", {"lr": -1.0}, "lr must be a finite number >= 0"),
    ):
        group = {"params": [(name, nn.Parameter(torch.ones(2)))], **options}
        with pytest.raises(UsageError, match=message):
            optimizer.add_param_group(group)
    assert math.isfinite(optimizer.step(lambda: weight.square().sum()))
    assert len(optimizer.state_dict()["param_groups"]) == 1


@pytest.mark.parametrize(
    "setting",
    [
        *({"lr": value} for value in (-1.0, math.nan, None, "1e-3")),
        *({"weight_decay": value} for value in (-1.0, math.nan, None)),
        *({"momentum": value} for value in (1.5, None)),
    ],
)
def test_settings_of_groups_are_checked(setting):
    with pytest.raises(UsageError, match=next(iter(setting))):
        MeZO([{"params": [nn.Parameter(torch.ones(2))], **setting}], lr=0.1)


@pytest.mark.parametrize("disturb", ["a failed step", "an averaged model"])
def test_weights_put_back_to_the_bit_keep_their_grid(disturb):
    ends = []
    for disturbed in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 20))
        optimizer = ZerothOrder([weight], lr=0.3, perturb="in_place:grid", update=iterate_average("journal"))
        for step in range(5):
            if disturbed and step == 2 and disturb == "a failed step":
                with pytest.raises(RuntimeError, match="singular"):
                    optimizer.step(lambda: torch.linalg.inv(torch.zeros(2, 2)).sum())
            elif disturbed and step == 2:
                with optimizer.averaged():
                    pass
            optimizer.step(lambda weight=weight: (weight - 3).square().sum())
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)


def test_states_of_other_parts_are_refused():
    def make(**parts):
        return ZerothOrder([nn.Parameter(torch.ones(3))], lr=0.1, **parts)

    saved = make(update=Adam()).state_dict()
    for parts, kind in (
        ({"update": SGD(0.9)}, "update"),
        ({"directions": "low_rank(2)", "update": Adam()}, "directions"),
    ):
        with pytest.raises(UsageError, match=f"saved with {kind}"):
            make(**parts).load_state_dict(saved)
    with pytest.raises(UsageError, match="grid"):
        make(perturb="in_place:grid").load_state_dict(make().state_dict())


def test_removed_names_point_to_their_replacement():
    optimizer = MeZO([nn.Parameter(torch.ones(2))])
    with pytest.raises(UsageError, match=r"assign optimizer\.perturb"):
        optimizer.evaluator = InForward()
    with pytest.raises(UsageError, match="in_forward"):
        MeZO([nn.Parameter(torch.ones(2))], restore="still")
    part = Normalized()
    ZerothOrder([nn.Parameter(torch.ones(2))], update=part)
    with pytest.raises(UsageError, match="serves another optimizer"):
        ZerothOrder([nn.Parameter(torch.ones(2))], update=part)
    by_old_name = ZerothOrder([nn.Parameter(torch.ones(2, 2))], directions="frames(2)")
    assert repr(by_old_name.directions) == "Orthogonal(size=2)"


def test_objects_cannot_be_written_into_a_journal():
    from zokernel.journal import make_header

    optimizer = ZerothOrder([nn.Parameter(torch.ones(2))], update=Adam())
    with pytest.raises(UsageError, match="spell parts as text"):
        make_header(optimizer, "zeroth_order", {"update": Adam()}, base_sha256="")


def test_moved_names_point_to_their_new_place():
    import zokernel

    with pytest.raises(AttributeError, match=r"use zokernel\.perturb\.InForward"):
        _ = zokernel.optim.InForward
