"""Trajectories of SGD and ZO-SGD: the law of their gap, its parts, and what is made of them."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from zokernel.errors import UsageError
from zokernel.experiments import Config
from zokernel.experiments.criteria import FAILS, HOLDS, NOT_RUN, OPEN, PARTLY
from zokernel.experiments.entk import trajectories, trajectory_gaps
from zokernel.experiments.entk.sentences import language_task

WAYS = {"eps": 1e-3, "distribution": "gaussian"}


def test_the_spread_and_the_shift_are_those_of_a_quadratic():
    """A walk along a constant gradient, and beliefs quadratic in the weights: the mean squared gap is the law's."""
    rng = np.random.default_rng(0)
    dim, outputs, steps, count, lr, runs = 60, 4, 3, 2, 0.02, 4000
    jacobian, gradient = rng.normal(size=(outputs, dim)), rng.normal(size=dim)
    hessians = np.stack([np.eye(dim) * scale for scale in rng.normal(size=outputs)])
    sgd = -lr * gradient * np.arange(1, steps + 1)[:, None]
    z = rng.normal(size=(runs, steps, count, dim))
    moves = -lr * np.einsum("rtp,rtpd->rtd", z @ gradient, z) / count
    walk = moves.cumsum(1) - sgd  # without SGD's own path, whose curvature is no part of the walk
    apart = walk @ jacobian.T + np.einsum("rtd,odk,rtk->rto", walk, hessians, walk) / 2
    c = np.trace(hessians, axis1=1, axis2=2) / 2
    spread, shift = trajectory_gaps.predicted(
        np.square(jacobian).sum(),
        np.square(c).sum(),
        np.full(steps, gradient @ gradient),
        np.full(steps, lr**2 * np.square(jacobian @ gradient).sum()),
        lr=lr,
        count=count,
    )
    first = np.square(walk @ jacobian.T).sum(-1)
    error = first.std(0) / math.sqrt(runs)
    assert (abs(first.mean(0) - spread) < 4 * error).all()
    shifted = np.square((apart - walk @ jacobian.T).mean(0)).sum(-1)
    # E |z|^2 of a walk is dim |g|^2 / P and little more: 1 + 1 / dim, squared, and the noise of the mean.
    assert shifted == pytest.approx(shift, rel=0.1)
    assert (shift > spread / 20).all()


def test_the_gap_follows_the_law_of_a_kernel_that_stays():
    """At a small rate the mean squared gap of 40 runs over that of the law is 1, within four errors of both."""
    fresh = partial(language_task, Config("smoke"), steps=3, batch_size=2, name="16")
    start = trajectories.measure_start(fresh, 100, seed=0, **WAYS)
    lr = 1e-3 / start["gradient_sq"].mean()
    reference = trajectories.first_order(fresh, lr)
    paths = [trajectories.zeroth_order(fresh, lr, 2, seed=seed, **WAYS) for seed in range(40)]
    row = trajectory_gaps.compare_runs(start, reference, paths, lr=lr, count=2)
    for measure in ("l2", "hellinger"):
        gaps, sizes = row[measure], start[f"odd_{measure}"]
        ratios = np.square(np.array(gaps["gap_by_seed"]) / gaps["law"][-1])
        error = math.hypot(ratios.std() / math.sqrt(40), sizes.std() / sizes.mean() / math.sqrt(100))
        assert abs(ratios.mean() - 1) < 4 * error
        assert gaps["gap_by_step"][-1] == pytest.approx(np.sqrt(np.square(gaps["gap_by_seed"]).mean()))
        assert gaps["with_curvature"][-1] == pytest.approx(gaps["law"][-1], rel=0.01)
        assert gaps["parting_step"] > 100 * 3
    mean, low, high = row["share_of_sgds_decrease"]
    assert abs(row["share_predicted"] - mean) < 4 * (high - low) / 2 / 2.02
    assert row["share_predicted"] == pytest.approx(1 - row["least_count"] / 2)
    # To first order SGD lowers the losses of its batches by the rate times the inner products of their gradients.
    assert 0 < row["sgd_lowers_loss"] < 2 * 3 * 1e-3


def test_at_the_start_the_rise_is_half_of_z_h_z():
    """Mean and variance over directions are those of other directions with the Hessian in float64."""
    fresh = partial(language_task, Config("smoke"), steps=1, batch_size=2, name="16")
    start = trajectories.measure_start(fresh, 200, seed=0, **WAYS | {"eps": 3e-3})
    task = fresh()
    model, batch = task.model.double(), task.batches[0]
    weights = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # which has second derivatives
        loss = trajectories.batch_loss(task, batch)
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    assert start["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert start["gradient_sq"][0] == pytest.approx(sum(g.square().sum().item() for g in slopes), rel=1e-4)
    generator, exact = torch.Generator().manual_seed(5), []
    for _ in range(200):
        z = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
        along = sum((g * d).sum() for g, d in zip(slopes, z, strict=True))
        curved = torch.autograd.grad(along, weights, retain_graph=True)
        exact.append(sum((h * d).sum().item() for h, d in zip(curved, z, strict=True)) / 2)
    error = math.hypot(np.std(exact), start["rise"].std()) / math.sqrt(200)
    assert abs(start["rise"].mean() - np.mean(exact)) < 4 * error
    # A sum of many squares is nearly normal: the variance of n has the relative error sqrt(2 / n).
    assert abs(math.log(start["rise"].var() / np.var(exact))) < 4 * math.sqrt(2 / 200 + 2 / 200)


def test_the_square_of_the_shift_has_no_bias():
    rng = np.random.default_rng(1)
    c, estimates = np.array([1.0, -2.0, 0.5]), []
    for _ in range(2000):
        noisy = c + 3 * rng.normal(size=(4, 3))
        mean = noisy.mean(0)
        estimates.append((16 * mean @ mean - np.square(noisy).sum()) / 12)
        limited = trajectory_gaps.curvature_sq(noisy @ noisy.T)
        assert limited == pytest.approx(max(0.0, estimates[-1]))
    assert abs(np.mean(estimates) - c @ c) < 4 * np.std(estimates) / math.sqrt(2000)


def test_the_gap_over_the_law_is_a_mean_square_over_all_runs():
    rows = [
        {"P": 1, "l2": {"gap_by_seed": [6.0, 2.0], "law": [9.0, 2.0]}},
        {"P": 5, "l2": {"gap_by_seed": [1.0], "law": [1.0]}},
    ]
    agreement = trajectory_gaps.agreement_with_law(rows, "l2")
    middle, low, high = agreement["over_law"]  # ratios 3, 1 and 1
    assert agreement["slope"][1:] == (-math.inf, math.inf)  # a single run has no error
    assert middle == pytest.approx(math.sqrt(11 / 3))
    half = 4.303 * np.std([9, 1, 1], ddof=1) / math.sqrt(3)
    assert (low, high) == pytest.approx((0.0, math.sqrt(11 / 3 + half)))


def test_the_slope_and_its_error_are_those_of_simulated_runs():
    """Of 2,000 sets of runs the mean slope is the true one, and 95% of the intervals include it, within four errors."""
    rng, slopes, inside = np.random.default_rng(3), [], []
    for _ in range(2000):
        rows = [
            {"P": count, "l2": {"law": [1.0], "gap_by_seed": np.sqrt(rng.gamma(10, 0.1 / count, size=8)).tolist()}}
            for count in (1, 5, 20)
        ]
        slope, low, high = trajectory_gaps.agreement_with_law(rows, "l2")["slope"]
        slopes.append(slope)
        inside.append(low < -0.5 < high)
    assert abs(np.mean(slopes) + 0.5) < 4 * np.std(slopes) / math.sqrt(2000)
    assert abs(np.mean(inside) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_the_verdict_is_of_slopes_and_sizes_of_all_models_and_rates():
    def verdict(slopes, sizes, small=False):
        agreements = [
            {"model": "a", "decrease": 0.1, "hellinger": {"slope": slope, "over_law": size}}
            for slope, size in zip(slopes, sizes, strict=True)
        ]
        return trajectories.judge(agreements, small=small).verdict

    half, flat, unsure = (-0.5, -0.6, -0.4), (-0.1, -0.2, 0.0), (-0.5, -0.9, -0.1)
    right, large = (1.1, 0.8, 1.4), (2.5, 2.0, 3.0)
    assert verdict([half, half], [right, right]) == HOLDS
    assert verdict([half, unsure], [right, right]) == verdict([flat], [right]) == verdict([half], [large]) == PARTLY
    assert verdict([flat], [large]) == verdict([unsure], [large]) == FAILS
    assert verdict([unsure], [(1.0, 0.2, 4.0)]) == OPEN
    assert verdict([half], [right], small=True) == NOT_RUN


def test_trajectories_continue_from_the_cache(tmp_path, monkeypatch):
    options = {
        "models": ["16"],
        "counts": [[1, 4]],
        "seeds": [[2, 1]],
        "steps": 2,
        "directions": 3,
        "cache": str(tmp_path),
    }
    first = trajectories.run(Config("smoke", options=options))
    monkeypatch.setattr(trajectories, "MeZO", None)
    resumed = trajectories.run(Config("smoke", options=options))
    assert resumed.numbers == first.numbers
    assert [row["P"] for row in resumed.numbers["rows"]] == [1, 4, 1, 4]
    assert [len(row["l2"]["gap_by_seed"]) for row in resumed.numbers["rows"]] == [2, 1, 2, 1]
    assert resumed.verdicts[0].verdict == NOT_RUN
    # A longer run needs what the cache lacks.
    with pytest.raises(TypeError, match="not callable"):
        trajectories.run(Config("smoke", options=options | {"steps": 3}))


def test_settings_are_one_for_all_models_or_one_for_each():
    assert trajectories.one_for_each((1, 5), ["a", "b"]) == [[1, 5], [1, 5]]
    with pytest.raises(UsageError, match="3 settings for 2 of"):
        trajectories.one_for_each([1, 2, 3], ["a", "b"])
