"""Options of methods: wrong values are refused when the optimizer is made, and no setting is taken and ignored."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from zokernel.errors import UsageError
from zokernel.optim import (
    GRZO,
    LOZO,
    LOZOM,
    AdamW,
    ForwardDifference,
    ForwardGradient,
    KerZOO,
    MeZO,
    SparseMeZO,
    ZerothOrder,
    ZOAdam,
    get_method,
    methods,
)
from zokernel.optim.compose import UPDATES
from zokernel.optim.options import own_options

ALL = (*methods(), "kerzoo_printed")
# What no option takes, and what those of a kind do not take besides.
NEVER = ("abc", math.nan, -math.inf, [3], {})
WRONG = {"int": (2.0, "3", True, -1), "float": ("0.5", True, math.inf), "bool": ("false", 1, None), "str": (3, True)}
# Options without effect unless another one is set.
TOGETHER = {
    "clip_radius": {"clip": "grad"},
    "polyak_share": {"normalize": True},
    "total_steps": {"radius_schedule": "rescaled", "sample_schedule": "linear"},
}


def weight() -> list[tuple[str, nn.Parameter]]:
    return [("weight", nn.Parameter(torch.ones(4, 4)))]


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except UsageError:
        return True
    return False


def wrong_values(option: inspect.Parameter) -> list[object]:
    kinds = [kind for kind in WRONG if kind in option.annotation]
    values = [*NEVER, *(value for kind in kinds for value in WRONG[kind])]
    return [value for value in values if value != option.default and not ("str" in kinds and value == "abc")]


@pytest.mark.parametrize("name", ALL)
def test_wrong_values_are_refused_when_the_optimizer_is_made(name):
    method = get_method(name)
    own = own_options(method)
    for option, declared in own.items():
        others = {key: value for key, value in TOGETHER.get(option, {}).items() if key in own}
        for value in wrong_values(declared):
            assert is_refused(lambda: method(weight(), **others | {option: value})), (option, value)  # noqa: B023


@pytest.mark.parametrize("name", ALL)
def test_wrong_values_of_shared_options_are_refused_when_the_optimizer_is_made(name):
    method = get_method(name)
    shared = {"weight_decay": (-1.0, math.nan, math.inf, "0.1")}
    if not getattr(method, "first_order", False):
        shared |= {"seed": (1.5, "x", None, True, -1, 2**63), "perturb": ("in_situ", "in_place:undo", 3, None)}
    for option, values in shared.items():
        for value in values:
            assert is_refused(lambda: method(weight(), **{option: value})), (option, value)  # noqa: B023


@pytest.mark.parametrize("name", UPDATES)
def test_wrong_values_of_updates_are_refused(name):
    for option, declared in inspect.signature(UPDATES[name]).parameters.items():
        for value in wrong_values(declared):
            if option != "share" or value != math.inf:
                assert is_refused(lambda: UPDATES[name](**{option: value})), (option, value)  # noqa: B023


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: MeZO(w, lr="1e-3"), "lr must be a finite number >= 0, not '1e-3'."),
        (lambda w: MeZO(w, eps="1e-3"), "eps must be positive, not '1e-3': 1e-3 suits most models."),
        (
            lambda w: MeZO(w, num_perturbations=4.0),
            "num_perturbations must be a whole number of at least 1, not 4.0.",
        ),
        (
            lambda w: MeZO(w, sample_schedule="linear", total_steps=2.5),
            "total_steps must be a whole number of at least 1, not 2.5.",
        ),
        (
            lambda w: MeZO(w, sample_schedule="linear"),
            "The linear sample schedule needs total_steps, the number of steps of the run.",
        ),
        (lambda w: MeZO(w, seed=1.5), "The seed 1.5 must be an integer from 0 to 2^63 - 1."),
        (lambda w: KerZOO(w, clip="grad", clip_radius="abc"), "clip_radius must be positive and finite, not 'abc'."),
        (
            lambda w: KerZOO(w, kernel_order=2.5),
            "A smoothing kernel has a whole order of 1 or higher, not 2.5: 3 is the usual choice.",
        ),
        (
            lambda w: KerZOO(w, kernel_constant=math.nan),
            "The constant of a smoothing kernel must be finite and not zero, not nan.",
        ),
        (lambda w: KerZOO(w, radius=math.inf), "radius must be positive, not inf: the paper recommends 1 or 1/2."),
        (
            lambda w: KerZOO(w, radius_schedule="rescaled", total_steps=-5),
            "total_steps must be a whole number of at least 1, not -5.",
        ),
        (
            lambda w: SparseMeZO(w, density="0.5"),
            "The density '0.5' of sparse directions must be above 0 and at most 1.",
        ),
        (
            lambda w: LOZO(w, refresh=0),
            "LOZO keeps V for some steps: refresh must be a whole number of at least 1, not 0.",
        ),
        (
            lambda w: LOZOM(w, refresh=0),
            "LOZO keeps V for some steps: refresh must be a whole number of at least 1, not 0.",
        ),
        (lambda w: GRZO(w, whiten="false"), "whiten must be True or False, not 'false'."),
        (lambda w: ZOAdam(w, beta1=1.0), "beta1 must be in [0, 1), not 1.0."),
        (lambda w: AdamW(w, beta2=math.nan), "beta2 must be in [0, 1), not nan."),
        (
            lambda w: ZerothOrder(w, estimator="two_point(1e-3, 2.0)"),
            "num_perturbations must be a whole number of at least 1, not 2.0.",
        ),
        (
            lambda w: ZerothOrder(w, directions="orthogonal(4.5)"),
            "A frame must hold a whole number of directions, at least 1, not 4.5.",
        ),
        (
            lambda w: ZerothOrder(w, directions="low_rank(2, backend='cuda')"),
            "There is no directions backend 'cuda': choose one of auto, numba, triton, torch.",
        ),
    ],
)
def test_messages_say_what_a_value_must_be(make, message):
    with pytest.raises(UsageError) as caught:
        make(weight())
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [0.01, torch.tensor(0.01), 0])
def test_numbers_of_other_types_are_taken(value):
    named = weight()
    tensor = named[0][1]
    optimizer = MeZO(named, lr=value)
    loss = optimizer.step(lambda: tensor.square().sum())
    assert loss == pytest.approx(16.0, rel=1e-2)


KINDS = {"int": np.int64, "float": np.float32, "bool": np.bool_}


def numbers_of_numpy(name: str) -> dict[str, object]:
    """Return the numeric options of a method that have a default, as numbers of numpy."""
    method, options = get_method(name), {}
    shared = {"weight_decay": 0.5} if getattr(method, "first_order", False) else {"weight_decay": 0.5, "seed": 3}
    for option, declared in own_options(method).items():
        kind = KINDS.get(str(declared.annotation).split(" | ")[0])
        if kind is not None and declared.default is not None:
            options[option] = kind(declared.default)
    return options | {option: KINDS[type(value).__name__](value) for option, value in shared.items()}


def parts_of(optimizer: torch.optim.Optimizer) -> str:
    parts = [getattr(optimizer, part, None) for part in ("estimator", "directions", "updates", "seed")]
    return repr([parts, [{**group, "params": None} for group in optimizer.param_groups]])


@pytest.mark.parametrize("name", ALL)
def test_numbers_of_numpy_become_pythons_own(name):
    """float32 options rounded what was computed with them, and no journal could hold them."""
    options = numbers_of_numpy(name)
    made, plain = (get_method(name)(weight(), **kind) for kind in (options, {k: v.item() for k, v in options.items()}))
    assert parts_of(made) == parts_of(plain)
    assert "np." not in parts_of(made)


@pytest.mark.parametrize("name", ALL)
def test_options_that_are_tensors_are_named(name):
    options = {
        option: value for option, value in numbers_of_numpy(name).items() if option not in ("lr", "weight_decay")
    }
    for option, value in options.items():
        with pytest.raises(UsageError) as caught:
            get_method(name)(weight(), **{option: torch.tensor(value.item())})
        assert str(caught.value) == f"{option} is a tensor: pass {option}.item()."
        with pytest.raises(UsageError, match=rf"^{option} is an array: pass {option}\.item\(\)\.$"):
            get_method(name)(weight(), **{option: np.array(value)})


def test_a_step_with_numbers_of_numpy_has_the_bits_of_pythons():
    ends = []
    for real, whole in ((np.float32, np.uint8), (lambda value: float(np.float32(value)), int)):
        named = weight()
        optimizer = MeZO(named, lr=real(0.01), eps=real(1e-3), num_perturbations=whole(130), seed=whole(7))
        optimizer.step(lambda first=named[0][1]: first.square().sum())
        ends.append(named[0][1])
        assert all(type(number) is float for number in optimizer.last_estimate.coefficients.values())
    assert torch.equal(*ends)


def test_a_scalar_of_numpy_that_is_no_number_is_not_called_a_tensor():
    for value in (np.complex64(1e-3), np.datetime64("2020")):
        with pytest.raises(UsageError, match=f"^eps must be positive.*not {re.escape(repr(value))}"):
            MeZO(weight(), lr=0.1, eps=value)


def test_groups_take_numbers_of_numpy():
    group = {"params": weight(), "lr": np.float32(0.5), "weight_decay": np.float64(0.1), "momentum": np.float32(0.5)}
    first = MeZO([group], lr=np.float32(0.25)).param_groups[0]
    assert [first[key] for key in ("lr", "weight_decay", "momentum")] == [0.5, 0.1, 0.5]
    assert all(type(first[key]) is float for key in ("lr", "weight_decay", "momentum"))
    with pytest.raises(UsageError, match=r"^lr is an array: pass lr\.item\(\)\.$"):
        MeZO(weight(), lr=np.array(0.1))
    with pytest.raises(UsageError, match=r"^momentum is a tensor: pass momentum\.item\(\)\.$"):
        MeZO([{"params": weight(), "momentum": torch.tensor(0.5)}])


FIXED = [ForwardGradient, GRZO, lambda w, **options: ForwardDifference(w, per_example=True, **options)]


@pytest.mark.parametrize("make", FIXED)
def test_methods_that_perturb_in_one_way_check_what_they_are_told(make):
    """``restore`` and modes of ``in_place`` were ignored, whatever they said."""
    for options, message in (
        ({"restore": "nonsense"}, "There is no restore='nonsense'"),
        ({"restore": "copy", "perturb": "in_place"}, "leave out restore"),
        ({"perturb": "in_place:whatever"}, "leave out perturb"),
        ({"perturb": "in_forward"}, "leave out perturb"),
        ({"perturb": None}, "leave out perturb"),
    ):
        with pytest.raises(UsageError, match=message):
            make(weight(), **options)
    with pytest.warns(FutureWarning, match="pass perturb='in_place:copy'"):
        make(weight(), restore="copy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for perturb in ("in_place", "in_place:grid", "in_place:copy"):
            make(weight(), perturb=perturb)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        (MeZO, {"eps": 1.0}, "group of MeZO has no eps of its own, only lr, weight_decay, momentum: leave"),
        (MeZO, {"seed": 3}, "no seed of its own"),
        (MeZO, {"betas": (0.9, 0.99)}, "no betas of its own"),
        (MeZO, {"maximize": True}, "no maximize of its own"),
        (
            ZOAdam,
            {"momentum": 0.5},
            "group of ZOAdam has no momentum of its own, only lr, weight_decay: leave",
        ),
        (ZOAdam, {"betas": (0.1, 0.1)}, "no betas of its own"),
        (ZOAdam, {"beta1": 0.1}, "no beta1 of its own"),
        (LOZO, {"rank": 4}, "no rank of its own"),
        (AdamW, {"beta1": 0.1}, "no beta1 of its own"),
        (AdamW, {"lr": -1.0}, "lr must be a finite number >= 0"),
    ],
)
def test_settings_that_a_group_cannot_have_are_refused(method, setting, message):
    """They stayed in the group, and all groups went by the optimizer's own."""
    with pytest.raises(UsageError, match=message):
        method([{"params": weight(), **setting}])
    optimizer = method(weight())
    other = [("other", nn.Parameter(torch.ones(2)))]
    with pytest.raises(UsageError, match=message):
        optimizer.add_param_group({"params": other, **setting})
    assert list(optimizer.named_params) == ["weight"]
    assert len(optimizer.param_groups) == 1


def test_groups_keep_their_own_settings_and_the_users():
    groups = [{"params": weight(), "lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "initial_lr": 0.5, "name": "head"}]
    group = MeZO(groups, lr=0.1).param_groups[0]
    assert [group[key] for key in ("lr", "momentum", "weight_decay", "initial_lr", "name")] == [
        0.5,
        0.9,
        0.1,
        0.5,
        "head",
    ]
    assert ZOAdam([{"params": weight(), "momentum": 0.0}]).param_groups[0]["lr"] == 1e-5
    assert AdamW([{"params": weight(), "betas": (0.5, 0.6)}]).param_groups[0]["betas"] == (0.5, 0.6)


def test_forwards_count_losses_that_were_evaluated_replayed_or_told():
    named = weight()
    tensor = named[0][1]
    optimizer = MeZO(named, num_perturbations=2)
    optimizer.step(lambda: tensor.square().sum())
    assert optimizer.num_forwards == 4
    optimizer.replay(optimizer.record())
    assert optimizer.num_forwards == 8
    optimizer.tell(dict.fromkeys(optimizer.ask(), 1.0))
    assert optimizer.num_forwards == 12
