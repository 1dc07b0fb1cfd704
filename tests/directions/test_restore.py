"""Restore modes: what comes back, how far it drifts, and that replay repeats every rounding."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zokernel.directions import Dense, LowRank, Sparse, make_restore, nearest_power_of_two
from zokernel.directions.weights.grid import Grid
from zokernel.directions.weights.restore import uninterrupted
from zokernel.errors import RunError, UsageError

DISTRIBUTIONS = ["gaussian", "rademacher", "sphere", "uniform"]
MODES = ["fold", "grid", "copy"]


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed": 0.02 * torch.randn(300, 40, generator=generator),
        "zero": torch.zeros(64),
        "norm": torch.ones(40),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def clone(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_unmoved_weights_take_the_steps_of_a_copy_without_one():
    for dtype in (torch.float32, torch.bfloat16):
        copied, unmoved = weights(dtype), weights(dtype)
        states = [
            make_restore(mode, Dense("gaussian"), t, seed=1) for mode, t in (("copy", copied), ("unmoved", unmoved))
        ]
        for step in range(4):
            wander(states[0], step, 1e-3)
            for state in states:
                state.commit(step, {0: 1e-4}, decay=0.999)
        assert same(copied, unmoved)
        with pytest.raises(UsageError, match="InForward"):
            states[1].move_to(9, {0: 1e-3})
        states[1].restore()


def wander(state, step, eps):
    state.move_to(step, {0: eps})
    state.move_to(step, {0: -eps})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_weights_are_at_the_reported_offsets(mode, distribution):
    tensors = weights()
    state = make_restore(mode, Dense(distribution), tensors, seed=1)
    theta, family = clone(tensors), Dense(distribution)
    state.move_to(3, {0: 1e-3, 4: -2e-3})
    assert state.offsets == {0: 1e-3, 4: -2e-3}
    z = [family(tensors, seed=1, step=3, index=index) for index in (0, 4)]
    for name in tensors:
        expected = theta[name].double() + 1e-3 * z[0][name].double() - 2e-3 * z[1][name].double()
        # A grid step is at most 2^-21 of the largest weight; float32 rounds to 2^-24 of it.
        torch.testing.assert_close(tensors[name].double(), expected, rtol=0, atol=2.0**-22)
    state.restore()
    assert state.offsets == {}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mode", ["grid", "copy"])
def test_exact_modes_return_the_same_bits(mode, distribution):
    tensors = weights()
    state = make_restore(mode, Dense(distribution), tensors, seed=1)
    theta = clone(tensors)
    for step in range(5):
        wander(state, step, 1e-3)
        state.restore()
        assert same(tensors, theta)


@settings(max_examples=40, deadline=None)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    offsets=st.lists(st.dictionaries(st.integers(0, 3), st.floats(-0.01, 0.01)), max_size=5),
    spread=st.floats(1e-4, 10.0),
)
def test_grid_is_exact_for_any_walk(distribution, offsets, spread):
    tensors = {"w": spread * torch.randn(700, generator=torch.Generator().manual_seed(0))}
    state = make_restore("grid", Dense(distribution), tensors, seed=1, reach=0.04)
    theta = clone(tensors)
    for target in offsets:
        state.move_to(7, target)
    state.restore()
    assert same(tensors, theta)


def test_grid_is_exact_for_structured_families():
    for family in (Sparse(0.5, distribution="gaussian"), LowRank(rank=3)):
        tensors = weights()
        state = make_restore("grid", family, tensors, seed=1)
        theta = clone(tensors)
        wander(state, 0, 1e-3)
        state.restore()
        assert same(tensors, theta)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        (mode, dtype)
        for mode in MODES
        for dtype in (torch.float32, torch.float64)
        if (mode, dtype) != ("grid", torch.float64)
    ],
)
def test_commit_updates_and_restores_in_one(mode, dtype):
    tensors = weights(dtype)
    state = make_restore(mode, Dense("gaussian"), tensors, seed=1)
    theta = clone(tensors)
    wander(state, 2, 1e-3)
    update = {name: {0: -1e-3 * (k + 1), 5: 2e-3} for k, name in enumerate(tensors)}
    decay = {name: 1 - 0.01 * k for k, name in enumerate(tensors)}
    state.commit(2, update, decay)
    z = [Dense("gaussian")(theta, seed=1, step=2, index=index) for index in (0, 5)]
    for name, old in theta.items():
        expected = decay[name] * old.double() + sum(
            scale * z[k][name].double() for k, scale in enumerate(update[name].values())
        )
        torch.testing.assert_close(tensors[name].double(), expected, rtol=0, atol=2.0**-21)
    assert state.offsets == {}


@pytest.mark.parametrize("mode", MODES)
def test_replay_repeats_every_bit(mode):
    def run(live):
        tensors = weights()
        state = make_restore(mode, Dense("gaussian"), tensors, seed=4)
        for step in range(6):
            if live or state.walks_points:
                wander(state, step, 1e-3)
            state.commit(step, {0: 1e-5 * (step - 2.5), 1: 1e-6}, decay=1 - 1e-5)
        return tensors

    assert same(run(live=True), run(live=False))


def fold_drift(distribution, eps, steps):
    tensors = {"w": 0.02 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))}
    state, theta = make_restore("fold", Dense(distribution), tensors, seed=1), clone(tensors)
    for step in range(steps):
        wander(state, step, eps)
        state.commit(step, {})
    return (tensors["w"].double() - theta["w"].double()).abs()


# Three roundings a step, each at most half an ulp of numbers below 0.125.
HALF_ULP = 2.0**-28


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "uniform"])
def test_fold_drift_is_bounded_by_three_half_ulps_per_step(distribution):
    drift = fold_drift(distribution, 1e-3, 200)
    assert 0 < float(drift.max()) <= 3 * 200 * HALF_ULP


def test_gaussian_fold_drift_is_a_random_walk():
    short, long = (fold_drift("gaussian", 1e-3, steps).square() for steps in (100, 400))
    growth = long - 4 * short  # in mean zero; the mean of n weights has the variance of one over n: 6% of the rms ratio
    assert abs(float(growth.mean())) < 5 * float(growth.std()) / math.sqrt(len(growth))
    assert float(long.mean().sqrt()) < math.sqrt(3 * 400) * HALF_ULP


def test_rademacher_fold_drift_stops_when_eps_is_a_power_of_two():
    eps = nearest_power_of_two(1e-3)
    short, long = fold_drift("rademacher", eps, 5), fold_drift("rademacher", eps, 200)
    assert torch.equal(short, long)
    assert float(long.max()) <= 2 * HALF_ULP
    # With another eps it does not stop.
    assert float(fold_drift("rademacher", 1e-3, 200).max()) > 50 * HALF_ULP


def test_grid_counts_updates_far_below_its_step_on_average():
    tensors = {"w": torch.full((50_000,), 0.5)}
    state = make_restore("grid", Dense("rademacher"), tensors, seed=1)
    grid, steps, scale = state.grid["w"], 40, state.grid["w"] / 50
    z = torch.zeros(50_000, dtype=torch.float64)
    for step in range(steps):
        state.commit(step, {0: scale})
        z += Dense("rademacher")(tensors, seed=1, step=step, index=0)["w"]
    deviation = (tensors["w"].double() - 0.5) - scale * z
    # Each rounding has variance at most (1/50)(49/50) grid^2.
    error = grid * math.sqrt(steps * 0.02 * 0.98 / 50_000)
    assert abs(float(deviation.mean())) < 5 * error
    assert float(tensors["w"].unique().diff().min()) >= grid * (1 - 1e-9)


def test_grid_coarsens_before_it_runs_out_and_stays_exact():
    tensors = {"w": torch.full((100,), 0.01)}
    state = make_restore("grid", Dense("rademacher"), tensors, seed=1, reach=1e-3)
    start = state.grid["w"]
    for step in range(8):
        state.commit(step, {}, decay=1.9)
    assert state.grid["w"] > start
    theta = clone(tensors)
    wander(state, 9, 1e-3)
    state.restore()
    assert same(tensors, theta)
    resumed = make_restore("grid", Dense("rademacher"), clone(tensors), seed=1)
    resumed.load_state_dict(state.state_dict())
    assert isinstance(resumed, Grid)
    assert resumed.grid == state.grid


def test_grid_refuses_perturbations_that_it_cannot_hold():
    state = make_restore("grid", Dense("rademacher"), {"w": torch.full((10,), 0.01)}, seed=1, reach=1e-3)
    with pytest.raises(RunError, match="larger reach"):
        state.move_to(0, {0: 5.0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copy_trains_low_precision_weights_without_bias(dtype):
    tensors = {"w": torch.full((40_000,), 1.0, dtype=dtype)}
    state = make_restore("copy", Dense("rademacher"), tensors, seed=1)
    unit, steps = torch.finfo(dtype).eps, 30
    z = torch.zeros(40_000, dtype=torch.float64)
    for step in range(steps):
        wander(state, step, 1e-2)
        state.commit(step, {0: unit / 20})
        z += Dense("rademacher")({"w": z}, seed=1, step=step, index=0)["w"]
    deviation = (tensors["w"].double() - 1) - unit / 20 * z
    assert abs(float(deviation.mean())) < 5 * unit * math.sqrt(steps * 0.05 / 40_000)
    assert float((tensors["w"] != 1).double().mean()) > 0.5


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_restored_after_an_exception(mode):
    tensors = weights()
    state = make_restore(mode, Dense("gaussian"), tensors, seed=1)
    theta = clone(tensors)

    def fail():
        try:
            state.move_to(0, {0: 1e-3})
            raise ZeroDivisionError
        finally:
            state.restore()

    with pytest.raises(ZeroDivisionError):
        fail()
    for name in tensors:
        torch.testing.assert_close(tensors[name], theta[name], rtol=0, atol=2.0**-23 if mode == "fold" else 0.0)


def test_an_interrupt_waits_until_weights_and_offsets_agree():
    finished = []

    def interrupted():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            finished.extend(range(1000))

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(finished) == 1000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("mode", MODES)
def test_directions_of_other_steps_can_be_committed(mode):
    # Momentum from a window of past steps: one sweep adds directions of several steps.
    tensors = weights()
    state = make_restore(mode, Dense("rademacher"), tensors, seed=1)
    theta = clone(tensors)
    state.commit(5, {(5, 0): 1e-3, (4, 0): 5e-4})
    z = {step: Dense("rademacher")(theta, seed=1, step=step, index=0) for step in (4, 5)}
    for name in tensors:
        expected = theta[name] + 1e-3 * z[5][name] + 5e-4 * z[4][name]
        torch.testing.assert_close(tensors[name], expected, rtol=0, atol=2.0**-21)


def test_modes_that_do_not_fit_are_refused():
    half = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    with pytest.raises(UsageError, match="in_place:copy"):
        make_restore("fold", Dense(), half, seed=0)
    with pytest.raises(UsageError, match="in_place:copy"):
        make_restore("grid", Dense(), half, seed=0)
    with pytest.raises(UsageError, match="no restore mode"):
        make_restore("undo", Dense(), half, seed=0)
    with pytest.raises(UsageError, match="no update for tensor 'norm'"):
        make_restore("fold", Dense(), weights(), seed=0).commit(0, {"embed": {0: 1.0}, "zero": {0: 1.0}})
