"""States of other estimators and other parameters are refused before anything is loaded, in one sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from method_cases import CASES
from torch import nn

from zokernel.errors import UsageError
from zokernel.optim import SGD, AdamW, ForwardDifference, KerZOO, MeZO, ZerothOrder, ZOAdam, get_method


def tensors(**shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


def stepped(optimizer: torch.optim.Optimizer) -> dict:
    weights = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    optimizer.step(lambda: sum(weight.square().sum() for weight in weights))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("saving", "loading", "kinds"),
    [
        (MeZO, KerZOO, ("TwoPoint", "Smoothed")),
        (KerZOO, MeZO, ("Smoothed", "TwoPoint")),
        (MeZO, ForwardDifference, ("TwoPoint", "OneSided")),
        (
            lambda w: ForwardDifference(w, per_example=True),
            ForwardDifference,
            ("PerExample(OneSided)", "OneSided"),
        ),
        (
            lambda w: ZerothOrder(w, estimator="population(1e-3, 4)"),
            lambda w: ZerothOrder(w, estimator="leave_one_out(1e-3, 4)"),
            ("Population", "LeaveOneOut"),
        ),
    ],
)
def test_a_state_of_another_estimator_is_refused(saving, loading, kinds):
    saved = saving(tensors(w=(3,))).state_dict()
    with pytest.raises(UsageError) as caught:
        loading(tensors(w=(3,))).load_state_dict(saved)
    assert str(caught.value) == (
        f"This state was saved with estimator {kinds[0]!r}, and this optimizer has {kinds[1]!r}: make the optimizer as "
        "it was."
    )


OTHERS = {
    "shape": (
        {"a": (3, 2), "b": (5,)},
        "This state was saved with parameter 'b' of shape (4,), and this optimizer has it with shape (5,): make the "
        "optimizer as it was.",
    ),
    "name": (
        {"a": (3, 2), "c": (4,)},
        "This state was saved with parameter 'b' where this optimizer has 'c': make the optimizer as it was.",
    ),
    "order": (
        {"b": (4,), "a": (3, 2)},
        "This state was saved with parameter 'a' where this optimizer has 'b': make the optimizer as it was.",
    ),
    "count": (
        {"a": (3, 2)},
        "This state was saved with parameter groups of 2 tensors, and this optimizer has groups of 1: make the "
        "optimizer as it was.",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("make", [MeZO, lambda w: MeZO(w, momentum=0.9), ZOAdam, get_method("lozo_m")])
def test_a_state_of_other_parameters_is_refused_and_changes_nothing(make, other):
    saved = stepped(make(tensors(a=(3, 2), b=(4,))))
    shapes, message = OTHERS[other]
    optimizer = make(tensors(**shapes))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UsageError) as caught:
        optimizer.load_state_dict(saved)
    assert str(caught.value) == message
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["zeroth_order"] == before["zeroth_order"]
    assert after["state"].keys() == before["state"].keys()


@pytest.mark.parametrize("method", [MeZO, SGD])
def test_a_state_of_other_groups_is_refused(method):
    saved = method(tensors(a=(3,), b=(3,))).state_dict()
    optimizer = method(tensors(a=(3,)))
    optimizer.add_param_group({"params": tensors(b=(3,))})
    with pytest.raises(UsageError, match=r"groups of 2 tensors, and this optimizer has groups of 1 \+ 1: make the"):
        optimizer.load_state_dict(saved)


def test_names_address_directions_so_a_state_without_them_is_refused():
    saved = MeZO(tensors(a=(3,))).state_dict()
    with pytest.raises(UsageError, match="saved with parameter 'a' where this optimizer has '0'"):
        MeZO([nn.Parameter(torch.ones(3))]).load_state_dict(saved)


@pytest.mark.parametrize("method", [SGD, AdamW])
def test_first_order_states_are_checked_too(method):
    make = (lambda w: SGD(w, momentum=0.9)) if method is SGD else AdamW
    saved = stepped(make(tensors(a=(3, 2))))
    with pytest.raises(UsageError) as caught:
        make(tensors(a=(4, 2))).load_state_dict(saved)
    assert str(caught.value) == (
        "This state was saved with parameter 'a' of shape (3, 2), and this optimizer has it with shape (4, 2): make "
        "the optimizer as it was."
    )
    other = AdamW if method is SGD else SGD
    for state in (stepped(other(tensors(a=(3, 2)))), stepped(MeZO(tensors(a=(3, 2))))):
        with pytest.raises(UsageError, match=f"not saved by {method.__name__}: load it into the optimizer that saved"):
            make(tensors(a=(3, 2))).load_state_dict(state)


@pytest.mark.parametrize("case", CASES)
def test_settings_of_groups_are_those_of_the_state(case):
    """As torch has it: learning rate and weight decay come from the state, whatever the optimizer was made with."""
    name, (_, _, options) = CASES[case]
    make = lambda **settings: get_method(name)(tensors(a=(3, 2), b=(4,)), **options | settings)  # noqa: E731
    saved = make(lr=0.25, weight_decay=0.5).state_dict()
    loaded = make(lr=0.5)
    loaded.load_state_dict(saved)
    (group,) = loaded.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)


def test_a_state_from_before_shapes_and_estimators_were_noted_still_loads():
    saved = stepped(MeZO(tensors(a=(3,)), lr=0.1, momentum=0.9))
    del saved["zeroth_order"]["parameters"], saved["zeroth_order"]["parts"]["estimator"]
    loaded = MeZO(tensors(a=(3,)), lr=0.1, momentum=0.9)
    loaded.load_state_dict(saved)
    assert loaded.step_count == 1
