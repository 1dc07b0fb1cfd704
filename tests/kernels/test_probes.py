"""Statistics of probes: unbiased, with honest standard errors, against exact gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from plan_tasks import small_task

from zokernel.kernels.plan_verify import exact_moments, gradients
from zokernel.kernels.prober import ProbedTask
from zokernel.kernels.probes import (
    Measurement,
    Slopes,
    belief_moments,
    fisher_moments,
    gradient_noise,
    jackknife,
    single_draw_variance,
    subset_error,
)


def true_slopes(task: ProbedTask, count: int, seeds: Iterable[int]) -> list[Slopes]:
    """Slopes along Gaussian directions from exact Jacobians, a set for each seed."""
    leaves = list(task.params.values())
    scores = task.score(task.batch)
    losses = F.cross_entropy(scores[: task.num_update], task.labels[: task.num_update], reduction="none")
    beliefs = scores[task.num_update :].log_softmax(-1).flatten()

    def rows(values):
        grads = [torch.autograd.grad(value, leaves, retain_graph=True) for value in values]
        return torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])

    jac_losses, jac_beliefs = rows(losses), rows(beliefs)
    logp = scores[: task.num_update].log_softmax(-1)
    weights = (logp.exp() / task.num_update).sqrt().detach().flatten()
    jac_fisher = weights[:, None] * rows(logp.flatten())

    def along(seed):
        z = torch.randn(count, jac_losses.shape[1], generator=torch.Generator().manual_seed(seed)).double()
        return Slopes(z @ jac_losses.T, z @ jac_beliefs.T, z @ jac_fisher.T)

    return [along(seed) for seed in seeds]


@pytest.mark.parametrize("classes", [2, 4])
def test_probe_statistics_are_unbiased(classes):
    """Means over 400 sets of 10 probes, against exact gradients, by z-scores."""
    task = small_task(classes)
    rows = gradients(task)
    exact = exact_moments(rows)
    slopes = true_slopes(task, 10, range(400))
    for name in ("rows_sq", "gradient_sq", "product_sq"):
        values = torch.tensor([getattr(belief_moments(s), name) for s in slopes])
        z = (values.mean() - getattr(exact, name)) / (values.std() / 20)
        assert abs(z) < 4, name
    for name, expected in (("rows_sq", rows.fisher_trace), ("product_sq", rows.fisher_along)):
        values = torch.tensor([getattr(fisher_moments(s), name) for s in slopes])
        assert abs(values.mean() - expected) / (values.std() / 20) < 4, name
    spread = torch.tensor([gradient_noise(s)[0] for s in slopes])
    assert abs(spread.mean() - rows.spread) / (spread.std() / 20) < 4
    signal = torch.tensor([gradient_noise(s)[1] for s in slopes])
    expected = exact.gradient_sq - rows.spread / task.num_update
    assert abs(signal.mean() - expected) / (signal.std() / 20) < 4


def test_exact_moments_are_those_of_dense_matrices():
    task = small_task(4)
    rows = gradients(task)
    flat = torch.cat([part.flatten(1) for part in rows.differences.values()], dim=1)
    g = torch.cat([part.flatten() for part in rows.gradient.values()])
    matrix = rows.to_beliefs(flat.T).T
    exact = exact_moments(rows)
    assert exact.rows_sq == pytest.approx(matrix.square().sum().item())
    assert exact.product_sq == pytest.approx((matrix @ g).square().sum().item())
    assert exact.diagonal == pytest.approx((matrix.square().sum(0) @ g.square()).item())
    # the rows are gradients of log-probabilities: compare one with autograd
    logp = task.score(task.batch)[task.num_update :].log_softmax(-1).flatten()[5]
    expected = torch.cat([p.flatten() for p in torch.autograd.grad(logp, list(task.params.values()))])
    torch.testing.assert_close(matrix[5], expected, rtol=1e-5, atol=1e-7)


def test_jackknife_is_calibrated():
    """The median of the standard errors that 300 plans state is the spread over these plans: |z| < 3, or within 26%."""
    slopes = true_slopes(small_task(), 40, range(300))
    estimates = [jackknife(found, lambda p: math.sqrt(single_draw_variance(p))) for found in slopes]
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    errors = torch.tensor([e.error for e in estimates], dtype=torch.float64)
    count, spread, stated = len(estimates), values.std(), errors.median()
    kurtosis = ((values - values.mean()) / spread).pow(4).mean()
    # Relative standard errors of a standard deviation, and of the median of nearly normal values.
    deviation_error = math.sqrt((kurtosis - 1) / (4 * count))
    median_error = math.sqrt(math.pi / (2 * count)) * (errors.std() / stated).item()
    standard_error = math.hypot(deviation_error, median_error)
    assert standard_error < 0.077
    assert abs(math.log(stated / spread)) < 3 * standard_error
    assert not math.isfinite(jackknife(Slopes(*torch.randn(3, 3, 2)), lambda p: math.inf).error)


def test_subset_error_is_the_average_over_subsets():
    from itertools import combinations

    e = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    for size in (1, 2, 4):
        squares = [e[list(s)].mean(0).square().sum() for s in combinations(range(6), size)]
        assert subset_error(e, size) == pytest.approx(math.sqrt(torch.stack(squares).mean()))


@pytest.mark.parametrize(
    ("value", "error", "is_known", "probes"),
    [
        (1.17, 0.2, True, 64),
        (1.17, math.inf, False, 64),
        (math.inf, math.inf, False, 64),
        (-2.0, 3.0, False, 150),
        (0.0, 0.1, False, 64),
        (6.11, 6.12, False, 65),
    ],
)
def test_what_counts_as_known(value, error, is_known, probes):
    """An error of 1.5 times the estimate is half of it with (2 * 1.5)^2 times the 16 probes: 144."""
    measurement = Measurement(value, error)
    assert (measurement.known, measurement.probes_needed(16)) == (is_known, probes)
