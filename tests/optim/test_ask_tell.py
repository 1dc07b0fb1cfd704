"""Losses from anywhere: ask for points, take the losses elsewhere, tell them in any order."""

from __future__ import annotations

import json
import random

import pytest
import torch
from method_cases import CASES
from torch import nn

from zokernel.errors import LossError, RunError, UsageError
from zokernel.estimators import PerExample, TwoPoint
from zokernel.journal import Journal, ToldJournal, make_header, record_of, replay_, weights_sha256
from zokernel.optim import LOZO, MeZO, Point, ZerothOrder, get_method
from zokernel.perturb import Stacked

# Refused, with a word of the reason.
REFUSED = {
    "adamw": "gradients",
    "sgd": "gradients",
    "forward_gradient": "ForwardDerivative",
    "kerzoo_md_int8": "grad_at='md'",
    "grzo": "PerExample",
}
TOLD = [case for case in CASES if case not in REFUSED]
SCALES = torch.linspace(0.5, 2.0, 10)


def base() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.ones(3, 2)), "b": nn.Parameter(torch.linspace(0.3, 1.1, 4))}


def loss_of(weights) -> float:
    flat = torch.cat([weights[name].detach().reshape(-1) for name in ("a", "b")])
    return float(0.5 * (SCALES * flat.square()).sum())


def make(case: str, weights, **overrides):
    name, (lr, _, options) = CASES[case]
    return get_method(name)(list(weights.items()), lr=lr, **(options | overrides))


def tell_one_by_one(optimizer, take=loss_of, steps: int = 1, seed: int = 0) -> list[float]:
    """Take ``steps`` steps, their losses in an order of chance; return the losses of the steps."""
    shuffled, losses = random.Random(seed), []
    for _ in range(steps):
        points = optimizer.ask()
        shuffled.shuffle(points)
        for left, point in zip(range(len(points) - 1, -1, -1), points, strict=True):
            loss = optimizer.tell({point: take(optimizer.weights_at(point))})
            assert (loss is None) == (left > 0)
        losses.append(loss)
    return losses


def same(left, right) -> bool:
    return all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("perturb", ["in_place:copy", "in_place:grid"])
@pytest.mark.parametrize("case", TOLD)
def test_asking_and_telling_is_the_step_to_the_bit(case, perturb):
    """The weights at every point are those of the step, and so are losses, weights, state and the next points."""
    by_step, by_tell = base(), base()
    if perturb == "in_place:grid" and not make(case, base()).moves_along_directions:
        with pytest.raises(UsageError, match="grid"):
            make(case, by_tell, perturb=perturb)
        return
    one, other = make(case, by_step, perturb=perturb), make(case, by_tell, perturb=perturb)
    losses = [one.step(lambda: loss_of(by_step)) for _ in range(4)]
    assert tell_one_by_one(other, steps=4) == losses
    assert same(by_tell, by_step)
    assert other.record() == one.record()
    assert (other.step_count, other.num_forwards) == (one.step_count, one.num_forwards)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", ["mezo", "lozo", "hizoo", "sparse_mezo", "zo_adam"])
def test_in_forward_weights_are_those_of_the_points(case):
    def loss(weights):
        flat = torch.cat([nn.functional.linear(torch.eye(2), weights["a"]).reshape(-1), weights["b"] * 1.0])
        return 0.5 * (SCALES * flat.square()).sum()

    by_step, by_tell = base(), base()
    one = make(case, by_step, perturb="in_forward")
    other = make(case, by_tell, perturb="in_forward")
    losses = [one.step(lambda: loss(by_step)) for _ in range(3)]
    assert tell_one_by_one(other, lambda weights: loss(weights).item(), steps=3) == losses
    assert same(by_tell, by_step)


@pytest.mark.parametrize("case", TOLD)
def test_recorded_losses_told_backwards_repeat_the_step(case):
    """In the default way of perturbing, too, whose weights carry roundings of the points that were visited."""
    by_step, by_tell = base(), base()
    one, other = make(case, by_step), make(case, by_tell)
    for _ in range(4):
        one.step(lambda: loss_of(by_step))
        pairs = list(zip(other.ask(), one.record(), strict=True))
        assert other.tell(reversed(pairs)) is not None
        assert same(by_tell, by_step)


@pytest.mark.parametrize("case", REFUSED)
def test_methods_whose_step_needs_more_than_losses_are_refused(case):
    if case not in CASES:
        optimizer = ZerothOrder(list(base().items()), estimator=PerExample(TwoPoint()), perturb="per_example")
    else:
        optimizer = make(case, base())
    for call in (optimizer.ask, lambda: optimizer.tell({Point(0, 0): 1.0}), lambda: optimizer.weights_at(Point(0, 0))):
        with pytest.raises(UsageError, match=REFUSED[case]):
            call()


def test_a_point_is_two_integers_and_points_without_a_loss_are_asked_again():
    optimizer = MeZO(list(base().items()), lr=0.1, num_perturbations=2)
    points = optimizer.ask()
    assert points == [(0, 0), (0, 1), (0, 2), (0, 3)] == optimizer.ask()
    decoded = json.loads(json.dumps(points))
    assert optimizer.tell([(decoded[2], 0.5), (decoded[0], torch.tensor(0.25))]) is None
    assert optimizer.ask() == [(0, 1), (0, 3)]
    assert optimizer.told == {(0, 2): 0.5, (0, 0): 0.25}
    # Both came late, and one says otherwise: the first loss counts.
    assert optimizer.tell({Point(0, 1): 1.0, Point(0, 0): 9.0}) is None
    assert optimizer.tell({Point(0, 3): 1.25}) == (0.25 + 1.0 + 0.5 + 1.25) / 4
    assert optimizer.record() == [0.25, 1.0, 0.5, 1.25]
    assert optimizer.ask() == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert optimizer.tell({Point(0, 3): 7.0}) is None  # of a step that is over
    assert optimizer.told == {}


def test_weights_at_a_point_are_copies_and_the_model_stays():
    weights = base()
    weights["b"].requires_grad_(False)  # given to the optimizer, and frozen
    optimizer = LOZO(list(weights.items()), lr=0.1, eps=0.5)
    weights["a"].requires_grad_(True)
    before = {name: tensor.detach().clone() for name, tensor in weights.items()}
    copies = [optimizer.weights_at(point) for point in optimizer.ask()]
    assert same(weights, before)
    z = optimizer.directions(optimizer.active, seed=0, step=0, index=0)
    for sign, copy in zip((1, -1), copies, strict=True):
        assert list(copy) == ["a", "b"]
        assert torch.allclose(copy["a"], before["a"] + sign * 0.5 * z["a"], atol=1e-6)
        copy["b"].zero_()
    assert same(weights, before)
    with optimizer.at(Point(0, 1)):
        assert torch.equal(weights["a"], copies[1]["a"])
        with pytest.raises(UsageError, match="after the with block"):
            optimizer.tell({Point(0, 1): 1.0})
    assert same(weights, before)
    assert not optimizer.changed_by_others
    with pytest.raises(ZeroDivisionError), optimizer.at(Point(0, 0)):
        _ = 1 / 0
    assert same(weights, before)


def test_frozen_tensors_rest():
    weights = base()
    optimizer = MeZO(list(weights.items()), lr=0.1, perturb="in_place:copy")
    tell_one_by_one(optimizer)
    weights["b"].requires_grad_(False)
    resting = weights["b"].detach().clone()
    assert all(torch.equal(optimizer.weights_at(point)["b"], resting) for point in optimizer.ask())
    tell_one_by_one(optimizer)
    assert torch.equal(weights["b"], resting)
    assert optimizer.step_count == 2


def test_tied_weights_move_together():
    """Two names of the same memory: what the second would draw is not added."""

    def start():
        weight = torch.ones(3, 3)
        return weight, MeZO([("out", weight), ("in", weight.view(3, 3))], lr=0.1, perturb="in_place:copy")

    (by_step, one), (by_tell, other) = start(), start()
    for _ in range(2):
        one.step(lambda: by_step.square().sum())
    tell_one_by_one(other, lambda weights: (weights["out"] * weights["in"]).sum(), steps=2)
    assert torch.equal(by_tell, by_step)


def test_tied_weights_are_at_a_point_and_come_back():
    weight = torch.linspace(-1, 1, 9).view(3, 3)
    optimizer = MeZO([("out", weight), ("in", weight.view(3, 3))], lr=0.1, perturb="in_place:copy")
    start, point = weight.clone(), optimizer.ask()[0]
    expected = optimizer.weights_at(point)
    assert torch.equal(expected["in"], expected["out"])
    with optimizer.at(point):
        assert torch.equal(weight, expected["out"])
    assert torch.equal(weight, start)


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_tied_weights_move_once_with_every_method(case):
    """Methods that keep tensors moved them twice, the second time along directions of the other name."""
    ends = []
    for names in (["out"], ["out", "in"]):
        weight = torch.linspace(-1, 1, 12).view(3, 4)
        optimizer = make(case, {name: weight.view(3, 4) for name in names})
        for _ in range(3):
            optimizer.step(lambda weight=weight: (weight - 0.5).square().sum())
        ends.append(weight)
    assert torch.equal(ends[1], ends[0])


@pytest.mark.parametrize("perturb", ["in_forward", "stacked"])
def test_tied_weights_that_are_two_tensors_are_not_perturbed_as_one(perturb):
    weight = torch.ones(3, 3)
    use = Stacked(lambda copies: weight.square().sum().expand(copies)) if perturb == "stacked" else perturb
    with pytest.raises(UsageError, match=rf"'out' and 'in' have the same memory, of which {perturb}"):
        MeZO([("out", weight), ("in", weight.view(3, 3))], perturb=use)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    def start():
        weight = torch.linspace(-1, 1, 7).to(dtype)
        return weight, MeZO([("w", weight)], lr=0.1, eps=0.05, perturb="in_place:copy", num_perturbations=3)

    (by_step, one), (by_tell, other) = start(), start()
    for _ in range(3):
        one.step(lambda: by_step.double().square().sum())
    tell_one_by_one(other, lambda weights: weights["w"].double().square().sum(), steps=3)
    assert torch.equal(by_tell, by_step)
    assert other.weights_at((3, 0))["w"].dtype == dtype


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({Point(1, 0): 1.0}, "not a point of step 0"),
        ({Point(0, 2): 1.0}, "step 0 has 2"),
        ({Point(0, -1): 1.0}, "step 0 has 2"),
        ({0: 1.0}, "0 is not a point"),
        ({Point(0, 0.5): 1.0}, "two integers"),
        ([0.5, 0.25], "0.5 is not a point with its loss"),
        ({Point(0, 0): None}, "return loss"),
        ({Point(0, 0): torch.ones(2)}, "2"),
        ({Point(0, 1): 0.5, Point(0, 0): float("nan")}, "nan"),
        ({Point(0, 0): float("inf")}, "inf"),
    ],
)
def test_invalid_losses_are_refused_and_nothing_is_stored(losses, message):
    weights = base()
    optimizer = MeZO(list(weights.items()), lr=0.1)
    with pytest.raises((UsageError, LossError), match=message):
        optimizer.tell(losses)
    assert optimizer.ask() == [(0, 0), (0, 1)]
    assert same(weights, base())


def test_losses_of_other_weights_are_discarded_and_logged(caplog):
    weights = base()
    optimizer = MeZO(list(weights.items()), lr=0.1, perturb="in_place:copy")
    optimizer.tell({Point(0, 0): 1.0})
    with torch.no_grad():
        weights["a"].fill_(2.0)
    assert optimizer.ask() == [(0, 0), (0, 1)]
    assert "all losses of step 0 are needed again" in caplog.text
    assert (optimizer.weights_at((0, 0))["a"] - 2.0).abs().max() < 0.01
    optimizer.tell({Point(0, 0): 1.0})
    optimizer.step(lambda: loss_of(weights))  # the ordinary way, in the middle
    assert optimizer.ask() == [(1, 0), (1, 1)]
    optimizer.tell({Point(1, 0): 1.0})
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.told == {}


def journalled(path, weights, name, lr, options):
    header_of = weights_sha256(weights)
    optimizer = get_method(name)(list(weights.items()), lr=lr, **options)
    return optimizer, ToldJournal(path, optimizer, make_header(optimizer, name, options, base_sha256=header_of))


DURABLE = ["mezo", "hizoo", "lozo_m", "zo_adam", "kerzoo", "low_rank_one_sided_adam", "normalized_momentum"]


@pytest.mark.parametrize("perturb", ["in_place", "in_place:copy", "in_place:grid", "in_forward"])
@pytest.mark.parametrize("case", DURABLE)
def test_a_coordinator_killed_between_any_two_losses_ends_with_the_same_bits(case, perturb, tmp_path):
    """Killed after every loss, with half a record behind it: only missing losses are asked for, and no bit differs."""
    name, (lr, _, options) = CASES[case]
    if perturb == "in_place:grid" and not make(case, base()).moves_along_directions:
        return
    options = options | {"perturb": perturb}
    straight = base()
    one = get_method(name)(list(straight.items()), lr=lr, **options)
    tell_one_by_one(one, steps=2)
    forwards = one.num_forwards + 1

    path, points = tmp_path / "journal.zkj", []
    for _ in range(forwards):
        weights = base()
        optimizer, journal = journalled(path, weights, name, lr, options)
        point = optimizer.ask()[-1]
        points.append(point)
        journal.tell([(point, loss_of(optimizer.weights_at(point)))])
        with path.open("ab") as file:
            file.write(b"\xae\x00\x00")
    assert len(set(points)) == forwards
    last = optimizer.told
    weights = base()
    optimizer, journal = journalled(path, weights, name, lr, options)
    assert optimizer.told == last
    assert same(weights, straight)
    assert Journal.read(path).num_steps == 2


@pytest.mark.parametrize("perturb", ["in_place", "in_place:copy", "in_place:grid", "in_forward"])
@pytest.mark.parametrize("case", DURABLE)
def test_base_and_journal_are_all_that_a_worker_needs(case, perturb, tmp_path):
    name, (lr, _, options) = CASES[case]
    if perturb == "in_place:grid" and not make(case, base()).moves_along_directions:
        return
    weights = base()
    optimizer, journal = journalled(tmp_path / "journal.zkj", weights, name, lr, options | {"perturb": perturb})
    for _ in range(3):
        journal.tell({point: loss_of(optimizer.weights_at(point)) for point in optimizer.ask()})
    journal.tell({optimizer.ask()[0]: 1.0})
    worker = replay_({name: tensor.detach() for name, tensor in base().items()}, Journal.read(tmp_path))
    for point in optimizer.ask():
        assert same(worker.weights_at(point), optimizer.weights_at(point))
    with pytest.raises(UsageError, match="not a point of step 3"):
        worker.weights_at(Point(2, 0))


def test_a_journal_of_another_run_is_refused(tmp_path):
    path = tmp_path / "journal.zkj"
    _, journal = journalled(path, base(), "mezo", 0.1, {"seed": 1})
    journal.close()
    with pytest.raises(RunError, match="options and seed"):
        journalled(path, base(), "mezo", 0.1, {"seed": 2})
    weights = base()
    with torch.no_grad():
        weights["a"].fill_(3.0)
    with pytest.raises(RunError, match="base_sha256"):
        journalled(path, weights, "mezo", 0.1, {"seed": 1})
    optimizer = MeZO(list(base().items()), lr=0.1)
    optimizer.step(lambda: 1.0)
    with pytest.raises(UsageError, match="has taken 1 step:"):
        ToldJournal(path, optimizer, {})


@pytest.mark.filterwarnings("error")
def test_a_schedule_is_part_of_the_journal(tmp_path):
    weights = base()
    optimizer, journal = journalled(tmp_path / "journal.zkj", weights, "mezo", 0.1, {})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    for _ in range(3):
        journal.tell({point: loss_of(optimizer.weights_at(point)) for point in optimizer.ask()})
        schedule.step()
    assert [step.learning_rates[0] for step in Journal.read(tmp_path).steps] == [0.1, 0.05, 0.1 / 3]
    repeated = base()
    journalled(tmp_path / "journal.zkj", repeated, "mezo", 0.1, {})
    assert same(repeated, weights)
    assert record_of(optimizer).step == 2


def test_restarts_write_nothing_that_the_journal_holds(tmp_path):
    """Each restart appended the losses of the open step again."""
    path, options = tmp_path / "journal.zkj", {"num_perturbations": 2}
    optimizer, journal = journalled(path, base(), "mezo", 0.1, options)
    journal.tell(dict.fromkeys(optimizer.ask()[:3], 0.5))
    journal.close()
    size, events = path.stat().st_size, len(Journal.read(path).events)
    for _ in range(3):
        optimizer, journal = journalled(path, base(), "mezo", 0.1, options)
        assert optimizer.told == dict.fromkeys([(0, 0), (0, 1), (0, 2)], 0.5)
        journal.close()
        assert (path.stat().st_size, len(Journal.read(path).events)) == (size, events)
    optimizer, journal = journalled(path, base(), "mezo", 0.1, options)
    assert journal.tell({(0, 3): 0.25}) == 0.4375
    journal.close()
    assert Journal.read(path).num_steps == 1
