r"""Check a plan against real gradients: every number predicted from forward passes, measured by backpropagation.

Rows :math:`\nabla(s_c - s_0)` at the observed examples and the loss gradient g are held in memory; everything else is
inner products with them.  Errors at several P are measured on fresh directions, independent of the plan's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zokernel import theory
from zokernel.directions import Dense
from zokernel.kernels import checks
from zokernel.kernels.jacobians import dot, inner_products, squared_norm
from zokernel.kernels.model import Params
from zokernel.kernels.plan_record import Plan
from zokernel.kernels.prober import ProbedTask, Prober, Progress, wide
from zokernel.kernels.probes import subset_error
from zokernel.kernels.projections import SeededDirections
from zokernel.theory.kernel_error import BeliefMoments, expected_belief_error

logger = logging.getLogger(__name__)

# Shape suffixes: B update examples, O observed examples, C classes, K = O (C - 1) score differences, Y = O C beliefs.

DRAWS_AT_ONCE = 4
TRACE_DIRECTIONS = 8
EPS_GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Comparison:
    """One predicted number next to its measurement.

    Attributes:
        quantity: What it is.
        predicted: From forward passes only, with its standard error where there is one.
        error: Standard error of ``predicted`` (NaN when not estimated).
        measured: With real gradients.
    """

    quantity: str
    predicted: float
    error: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured if self.measured else math.nan


@dataclass(frozen=True)
class Rows:
    r"""Gradients of one task at the current weights.

    Attributes:
        gradient: g, by parameter name.
        differences: Rows of score differences, ``{name: (K, *shape)}``.
        spread: :math:`tr\Sigma` of per-example gradients.
        fisher_trace: :math:`tr F` of the update batch.
        fisher_along: :math:`g^T F g`.
        beliefs_OC: Probabilities at the observed examples.
    """

    gradient: Params
    differences: Params
    spread: float
    fisher_trace: float
    fisher_along: float
    beliefs_OC: Tensor

    def to_beliefs(self, differences: Tensor) -> Tensor:
        """Turn changes of score differences (..., K) into changes of log-probabilities (..., Y)."""
        num_observed, num_classes = self.beliefs_OC.shape
        shaped = differences.reshape(*differences.shape[:-1], num_observed, num_classes - 1)
        scores = F.pad(shaped, (1, 0)).to(self.beliefs_OC)
        centered = scores - (self.beliefs_OC * scores).sum(-1, keepdim=True)
        return centered.flatten(-2)


def verify(
    task: ProbedTask,
    plan: Plan,
    *,
    as_trained: ProbedTask | None = None,
    distribution: str = "rademacher",
    seed: int = 0,
    num_draws: int = 200,
    eps_directions: int = 4,
) -> list[Comparison]:
    """Measure what the plan predicted.

    Args:
        task: The task that was planned for, in full precision; its weights are put back exactly.
        plan: The plan.
        as_trained: The same task in the precision of training (for the best eps); ``task`` when ``None``.
        distribution: Distribution of the directions.
        seed: The plan's seed; draws here use ``seed + 1``.
        num_draws: Fresh directions for the measured errors.
        eps_directions: Directions on which perturbation sizes are compared.

    Returns:
        One comparison per quantity.

    Raises:
        RunError: If the gradients do not fit in memory.
    """
    num_rows = (len(task.labels) - task.num_update) * (_num_classes(task) - 1)
    held = num_rows + 3 + DRAWS_AT_ONCE  # vectors of the size of the weights
    checks.announce(
        f"gradients for verification: {held} x {plan.num_parameters:,}",
        held * plan.num_parameters * 4,
        "observe fewer examples, or train a LoRA adapter",
    )
    logger.info(
        "Verifying takes %d gradients, %d fresh directions, %d gradients at moved weights and %d forward passes.",
        _num_gradients(task, num_rows),
        num_draws,
        2 * TRACE_DIRECTIONS,
        2 * eps_directions * len(EPS_GRID),
    )
    rows = gradients(task)
    moments = exact_moments(rows)
    draw = SeededDirections(Dense(distribution), {name: p.detach() for name, p in task.params.items()}, seed + 1)
    deviations = _deviations(rows, draw, num_draws)
    gradient_sq = moments.gradient_sq
    signal = gradient_sq - rows.spread / task.num_update
    return [
        Comparison("rho", plan.rho.value, plan.rho.error, moments.rho),
        *_compare_errors(plan, moments, deviations, distribution),
        Comparison("gradient norm", plan.gradient_norm.value, plan.gradient_norm.error, math.sqrt(gradient_sq)),
        Comparison(
            "gradient noise scale (batch size)",
            plan.noise_scale.value,
            plan.noise_scale.error,
            rows.spread / signal if signal > 0 else math.inf,
        ),
        *_curvature(task, plan, rows, draw, gradient_sq),
        _best_eps(as_trained or task, plan, rows, draw, eps_directions),
    ]


def _deviations(rows: Rows, draw: SeededDirections, count: int) -> Tensor:
    """Return by how much the changes of beliefs along single directions miss their mean, (P, Y)."""
    slopes = torch.cat(_projections(rows, draw, count))
    changes = rows.to_beliefs(slopes[:, :-1]) * slopes[:, -1:]
    return changes - rows.to_beliefs(_products(rows)[None])


def _compare_errors(plan: Plan, moments: BeliefMoments, deviations: Tensor, distribution: str) -> list[Comparison]:
    """Compare the relative error at each P with its exact formula, and with fresh directions if there are enough."""
    comparisons, num_draws = [], len(deviations)
    for count, guess in plan.predicted_error.items():
        exact = expected_belief_error(moments, count, distribution)
        comparisons.append(Comparison(f"relative error at P = {count}, exact formula", guess.value, guess.error, exact))
        if count <= num_draws // 2:
            measured = subset_error(deviations, count) / math.sqrt(moments.product_sq)
            name = f"relative error at P = {count}, {num_draws} fresh directions"
            comparisons.append(Comparison(name, guess.value, guess.error, measured))
    return comparisons


def gradients(task: ProbedTask) -> Rows:
    """Backpropagate the loss, each example's loss, and each observed score difference."""
    with torch.enable_grad():
        scores = wide(task.score(task.batch))
        progress = Progress(_num_gradients(task, scores[task.num_update :, 1:].numel()), what="gradients")

        def grad(value: Tensor) -> Params:
            by_name = _grad(value, task)
            progress.step()
            return by_name

        losses = F.cross_entropy(scores[: task.num_update], task.labels[: task.num_update], reduction="none")
        observed = scores[task.num_update :]
        gradient = grad(losses.mean())
        squared = sum(squared_norm(grad(loss)) for loss in losses)
        targets = (observed[:, 1:] - observed[:, :1]).flatten()
        differences = {name: p.new_empty(len(targets), *p.shape).detach() for name, p in task.params.items()}
        for k, target in enumerate(targets):
            for name, row in grad(target).items():
                differences[name][k] = row
        traces, alongs = zip(*(_fisher(score, gradient, grad) for score in scores[: task.num_update]), strict=True)
    count = task.num_update
    spread = (squared - count * squared_norm(gradient)) / (count - 1)
    beliefs = observed.detach().softmax(-1).double()
    return Rows(gradient, differences, spread, sum(traces) / count, sum(alongs) / count, beliefs)


def _num_gradients(task: ProbedTask, num_rows: int) -> int:
    """Return how many gradients :func:`gradients` takes.

    Args:
        task: The task.
        num_rows: K, the score differences at the observed examples.
    """
    num_classes = 1 + num_rows // (len(task.labels) - task.num_update)
    return 1 + task.num_update * num_classes + num_rows


def _fisher(scores_C: Tensor, gradient: Params, grad: Callable[[Tensor], Params]) -> tuple[float, float]:
    r"""Return :math:`tr F` and :math:`g^TFg` of an example, :math:`F = E_\pi \nabla\log\pi_c \nabla\log\pi_c^T`."""
    rows = [grad(score - scores_C[0]) for score in scores_C[1:]]
    pi = scores_C.detach().softmax(-1).double()
    gram = torch.zeros(len(pi), len(pi), dtype=torch.float64)
    along = torch.zeros(len(pi), dtype=torch.float64)
    for i, left in enumerate(rows, start=1):
        along[i] = dot(left, gradient)
        for j, right in enumerate(rows, start=1):
            gram[i, j] = dot(left, right)
    trace = (pi * gram.diagonal()).sum() - pi @ gram @ pi
    return trace.item(), (pi * (along - pi @ along).square()).sum().item()


def exact_moments(rows: Rows) -> BeliefMoments:
    r"""Return :math:`\|M\|_F^2, \|g\|^2, \|Mg\|^2` and D exactly."""
    rows_sq = overlap = 0.0
    for name, grad in rows.gradient.items():
        flat, g = rows.differences[name].flatten(1), grad.flatten()
        for start in range(0, len(g), 2**20):
            part = slice(start, start + 2**20)
            columns = rows.to_beliefs(flat[:, part].T).square().sum(1)
            rows_sq += columns.sum().item()
            overlap += (columns @ g[part].double().square()).item()
    product = rows.to_beliefs(_products(rows)[None])
    dim = sum(grad.numel() for grad in rows.gradient.values())
    return BeliefMoments(rows_sq, squared_norm(rows.gradient), product.square().sum().item(), overlap, dim)


def _num_classes(task: ProbedTask) -> int:
    with torch.no_grad():
        return task.score(task.batch).shape[1]


def _grad(value: Tensor, task: ProbedTask) -> Params:
    grads = torch.autograd.grad(value, list(task.params.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(task.params.items(), grads, strict=True)
    }


def _products(rows: Rows) -> Tensor:
    """Return the inner products of every score difference's gradient with g, (K,)."""
    total: Tensor | float = 0.0
    for name, grad in rows.gradient.items():
        total = total + inner_products(rows.differences[name].flatten(1), grad.flatten()[None])[:, 0]
    assert isinstance(total, Tensor)
    return total


def _projections(rows: Rows, draw: SeededDirections, count: int) -> list[Tensor]:
    """Return the slopes along the first ``count`` directions, some of them at a time."""
    progress, parts = Progress(count, what="fresh directions"), []
    for indices in torch.arange(count).split(DRAWS_AT_ONCE):
        parts.append(_project(rows, draw, indices))
        for _ in indices:
            progress.step()
    return parts


def _project(rows: Rows, draw: SeededDirections, indices: Tensor) -> Tensor:
    """Return the slopes of every score difference and of the loss along some directions, (P, K + 1)."""
    directions = draw.rows(indices.tolist())
    total: Tensor | float = 0.0
    for name, grad in rows.gradient.items():
        flat = directions[name].flatten(1)
        sides = rows.differences[name].flatten(1), grad.flatten()[None]
        total = total + torch.cat([inner_products(flat, side) for side in sides], dim=1)
    assert isinstance(total, Tensor)
    return total


def _curvature(
    task: ProbedTask, plan: Plan, rows: Rows, draw: SeededDirections, gradient_sq: float
) -> list[Comparison]:
    """Compare traces and learning-rate ratios; tr H is measured by differences of gradients on fresh directions."""
    traces, progress = [], Progress(2 * TRACE_DIRECTIONS, what="gradients at moved weights")
    for index in range(TRACE_DIRECTIONS):
        z = draw.directions(draw.params, seed=draw.seed, step=0, index=index)
        traces.append(_hessian_form(task, z, plan.eps_derivatives, progress))
    trace = sum(traces) / len(traces)
    ratio = theory.curvature_ratio(rows.fisher_trace, gradient_sq, rows.fisher_along)
    name = f"trace of the Hessian, {TRACE_DIRECTIONS} directions"
    comparisons = [
        Comparison(name, plan.trace_hessian.value, plan.trace_hessian.error, trace),
        Comparison("trace of the Fisher matrix", plan.trace_fisher.value, plan.trace_fisher.error, rows.fisher_trace),
        Comparison("curvature ratio r", plan.curvature_ratio.value, plan.curvature_ratio.error, ratio),
    ]
    for count, guess in plan.learning_rate_ratio.items():
        real = theory.learning_rate_ratio(count, ratio)
        comparisons.append(Comparison(f"eta_zo / eta_fo at P = {count}", guess.value, guess.error, real))
    return comparisons


def _hessian_form(task: ProbedTask, vector: Params, step: float, progress: Progress) -> float:
    """Return v'Hv from the gradients at theta + step v and theta - step v."""
    forms = []
    saved = {name: p.detach().clone() for name, p in task.params.items()}
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in task.params.items():
                p.add_(vector[name], alpha=sign * step)
        with torch.enable_grad():
            scores = wide(task.score(task.batch))[: task.num_update]
            loss = F.cross_entropy(scores, task.labels[: task.num_update])
            forms.append(dot(_grad(loss, task), vector))
        with torch.no_grad():
            for name, p in task.params.items():
                p.copy_(saved[name])
        progress.step()
    return (forms[0] - forms[1]) / (2 * step)


def _best_eps(task: ProbedTask, plan: Plan, rows: Rows, draw: SeededDirections, num_directions: int) -> Comparison:
    """Compare finite differences at a grid of sizes with exact slopes; the best size is refined on its neighbours."""
    exact = _project(rows, draw, torch.arange(num_directions))[:, -1].tolist()
    errors = []
    progress = Progress(2 * len(EPS_GRID) * num_directions)
    with Prober(task, draw.directions.distribution.name, draw.seed, progress=progress) as prober:
        for eps in EPS_GRID:
            misses = []
            for index, slope in enumerate(exact):
                above, below = (prober.loss([sign * eps], [index]) for sign in (1, -1))
                misses.append((above - below) / (2 * eps) - slope)
            errors.append(math.sqrt(sum(miss**2 for miss in misses) / len(misses)))
    best = min(range(len(errors)), key=errors.__getitem__)
    return Comparison("best eps (of a grid of factors 3)", plan.eps.value, plan.eps.error, EPS_GRID[best])


def table(comparisons: Sequence[Comparison]) -> str:
    """Return the comparisons as text."""
    width = max(len(c.quantity) for c in comparisons)
    lines = [f"{'':<{width}}  {'predicted':>22}  {'measured':>10}  {'ratio':>6}"]
    for c in comparisons:
        guess = f"{c.predicted:.4g} ± {c.error:.1g}" if math.isfinite(c.error) else f"{c.predicted:.4g}"
        lines.append(f"{c.quantity:<{width}}  {guess:>22}  {c.measured:>10.4g}  {c.ratio:>6.3f}")
    return "\n".join(lines)
