"""Shaped losses of a population: against their definitions, and against the gradient they stand for."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from zokernel.directions import Dense
from zokernel.errors import UsageError
from zokernel.estimators import LeaveOneOut, Population, TwoPoint
from zokernel.estimators.shaping import centred_ranks, leave_one_out, z_score
from zokernel.optim import EGGROLL, ES, ZerothOrder

LOSSES = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0]


def test_shapings_are_their_definitions():
    mean, spread = statistics.mean(LOSSES), statistics.pstdev(LOSSES)
    assert z_score(LOSSES) == pytest.approx([(x - mean) / spread for x in LOSSES])
    assert centred_ranks(LOSSES) == pytest.approx([2 / 5 - 0.5, -0.5, 3 / 5 - 0.5, 1 / 5 - 0.5, 4 / 5 - 0.5, 0.5])
    baselines = [statistics.mean(LOSSES[:n] + LOSSES[n + 1 :]) for n in range(6)]
    assert leave_one_out(LOSSES) == pytest.approx([x - other for x, other in zip(LOSSES, baselines, strict=True)])
    for shape in (z_score, centred_ranks, leave_one_out):
        assert sum(shape(LOSSES)) == pytest.approx(0, abs=1e-12)
        assert shape([2.0, 2.0, 2.0]) == [0.0, 0.0, 0.0]
    tied = centred_ranks([1.0, 0.0, 1.0, 1.0])
    assert tied == pytest.approx([1 / 6, -0.5, 1 / 6, 1 / 6])


@pytest.mark.parametrize("shaping", ["z_score", "centred_ranks", "leave_one_out"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_the_losses_of_members_that_are_equal_leave_the_weights(shaping, antithetic):
    """Bit for bit in bf16, after 30 members: nothing drifts."""
    start = torch.linspace(-2, 2, 64).to(torch.bfloat16)
    weight = torch.nn.Parameter(start.clone())
    options = {"num_perturbations": 15 if antithetic else 30, "shaping": shaping, "antithetic": antithetic}
    optimizer = ES([weight], lr=0.1, eps=0.05, perturb="in_place:copy", **options)
    optimizer.watches_loss = False
    for _ in range(3):
        optimizer.step(lambda: 1.0)
    assert torch.equal(weight.detach(), start)
    assert optimizer.forwards_per_step == 30


def test_updates_are_the_published_ones():
    """One-sided z-scores of 30 members: theta - lr / N sum z_n (l_n - mean) / std."""
    start = torch.linspace(-1, 1, 12, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = ES([("w", weight)], num_perturbations=30, antithetic=False)
    optimizer.step(lambda: weight.square().sum() + weight[0])
    lr, eps = 5e-4, 1e-3
    assert (optimizer.param_groups[0]["lr"], optimizer.estimator.eps) == (lr, eps)
    zs = [Dense("gaussian")({"w": start}, seed=0, step=0, index=n)["w"] for n in range(30)]
    losses = [float((start + eps * z).square().sum() + (start + eps * z)[0]) for z in zs]
    mean, spread = statistics.mean(losses), statistics.pstdev(losses)
    expected = start - lr / 30 * sum(z * (loss - mean) / spread for z, loss in zip(zs, losses, strict=True))
    # The spread of the losses is 3e-3 of their size, and the weights are restored up to rounding.
    assert torch.allclose(weight.detach(), expected, atol=1e-9)
    assert optimizer.effective_lr() == pytest.approx(lr * eps / spread, rel=1e-6)


def test_antithetic_leave_one_out_is_the_two_point_estimate_and_one_sided_that_of_rloo():
    antithetic = Population(0.1, 3, "leave_one_out").combine(LOSSES, seed=0, step=0)
    assert antithetic.coefficients == pytest.approx(TwoPoint(0.1, 3).combine(LOSSES, seed=0, step=0).coefficients)
    one = Population(0.1, 6, "leave_one_out", antithetic=False).combine(LOSSES, seed=0, step=0)
    rloo = LeaveOneOut(0.1, 6)
    assert rloo.combine(LOSSES, seed=0, step=0) == one
    assert rloo.points(seed=0, step=0) == [{index: 0.1} for index in range(6)]
    assert repr(rloo) == "LeaveOneOut(eps=0.1, num_perturbations=6)"
    baselines = [statistics.mean(LOSSES[:n] + LOSSES[n + 1 :]) for n in range(6)]
    expected = [(loss - other) / 0.6 for loss, other in zip(LOSSES, baselines, strict=True)]
    assert list(one.coefficients.values()) == pytest.approx(expected, rel=1e-12)
    assert antithetic.loss_std is None


@pytest.mark.parametrize("shaping", ["z_score", "centred_ranks"])
def test_the_gain_is_that_of_normal_losses(shaping):
    """On a linear loss, Gaussian directions: the slope along g of 300 estimates, z below 4.5."""
    gradient = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    population = Population(0.1, 64, shaping, antithetic=False)
    scores = []
    for step in range(300):
        z = torch.randn(64, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        estimate = population.combine((0.1 * z @ gradient).tolist(), seed=0, step=step)
        along = sum(c * float(z[n] @ gradient) for n, c in estimate.coefficients.items()) / float(gradient @ gradient)
        scores.append(along / population.gain_at(step + 1, estimate))
    mean, error = statistics.mean(scores), statistics.stdev(scores) / math.sqrt(len(scores))
    # A rank counts from 0 to N - 1, over N - 1: larger by N / (N - 1) than the distribution function; z-scores of the
    # members' own mean and spread have the slope 1 along their own sample.
    assert abs(mean - (64 / 63 if shaping == "centred_ranks" else 1.0)) < 4.5 * error + 0.01


def test_texts_and_refusals():
    by_text = ZerothOrder([torch.nn.Parameter(torch.ones(3))], estimator="population(1e-2, 4, 'centred_ranks')")
    assert by_text.estimator == Population(1e-2, 4, "centred_ranks")
    eggroll = EGGROLL(torch.nn.Linear(6, 5), num_perturbations=3)
    z = eggroll.directions(eggroll.named_params, seed=0, step=0, index=0)["weight"]
    later = eggroll.directions(eggroll.named_params, seed=0, step=1, index=0)["weight"]
    assert int(torch.linalg.matrix_rank(z)) == 1
    assert int(torch.linalg.matrix_rank(torch.cat([z, later]))) == 2, "both factors are new in every step"
    with pytest.raises(UsageError, match="shaping must be one of z_score"):
        Population(shaping="rank")
    with pytest.raises(UsageError, match="nothing to be compared with"):
        Population(num_perturbations=1, antithetic=False)
    assert Population(num_perturbations=1).forwards_at(0) == 2
