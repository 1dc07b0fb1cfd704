r"""What every NZK experiment computes: the paper's curves, the honest baseline, and four fair comparisons.

The paper compares gradient descent on the NTK with gradient descent on the expected NZK, at one learning rate.  Here
the same curves are computed in closed form, beside the process itself (its expected loss, its runs, its stability
limit) at equal learning rate, at equal effective learning rate (learning rate times the mean factor of the kernel),
at equal distance from the stability limit, and at equal numbers of forward passes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.dynamics.budget import LR_FRACTIONS, steps_to_reach
from zokernel.dynamics.evolution import Evolution
from zokernel.dynamics.parametric import ParametricRun, all_ones_line_minimum, squared_loss, zo_sgd_run
from zokernel.dynamics.simulation import Simulation, record_steps, simulate
from zokernel.experiments.criteria import Interval, interval
from zokernel.experiments.nzk.problems import Problem
from zokernel.kernels.nzk_matrix import NzkEstimate, sample_nzk
from zokernel.theory.nzk_moments import ProcessMoments, expected_nzk_factor, process_moments

TARGET_FRACTION = 0.1  # "reached" means: a tenth of the reducible loss is left
FORWARD_PASSES_OF_A_GRADIENT = 3  # one forward, and a backward worth two
RULES = ("equal_lr", "equal_effective_lr", "equal_distance")


@dataclass(frozen=True)
class Variant:
    """One NZK of an experiment.

    Attributes:
        label: How figures name it.
        distribution: Distribution of z.
        coupling: ``shared`` or ``independent``.
        zeta: Distribution of the second vector of ``independent``.
    """

    label: str
    distribution: str | Distribution = "gaussian"
    coupling: str = "shared"
    zeta: str | None = None


@dataclass(frozen=True)
class Curve:
    """The paper's deterministic curve of one kernel.

    Attributes:
        label: How figures name it.
        factor: Mean factor of the kernel over the NTK.
        losses: Loss of the mean path at ``Study.steps``.
        predictions: Predictions at ``Study.snapshots``, (S, n).
        sampled: Monte Carlo estimate of the kernel; None for the NTK.
        z_rms: Root mean square z-score of the estimate against the closed form.
        z_max: Largest absolute z-score.
        collapse: Largest relative difference to gradient descent read at ``factor`` times the step.
    """

    label: str
    factor: float
    losses: Tensor
    predictions: Tensor
    sampled: NzkEstimate | None = None
    z_rms: float = 0.0
    z_max: float = 0.0
    collapse: float = 0.0


@dataclass(frozen=True)
class Row:
    """One method under one rule for its learning rate.

    Attributes:
        rule: One of ``RULES``, or ``best_lr``.
        method: Name of the method.
        lr: Learning rate.
        effective_lr: Learning rate times the mean factor.
        limit: Largest mean-square stable learning rate.
        steps: Steps until a tenth of the reducible loss is left in expectation; None if never.
        passes: Forward passes until then.
    """

    rule: str
    method: str
    lr: float
    effective_lr: float
    limit: float
    steps: int | None
    passes: int | None


@dataclass(frozen=True)
class Method:
    """A training method of the comparisons: its moments and its forward passes per step."""

    name: str
    label: str
    moments: ProcessMoments
    passes: int


@dataclass
class Study:
    """Everything computed about one problem; figures and verdicts only read it."""

    problem: Problem
    steps: list[int]
    snapshots: list[int]
    curves: list[Curve]
    methods: list[Method]
    rows: list[Row] = field(default_factory=list)
    expected: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    baseline: ParametricRun | None = None
    best_of: ParametricRun | None = None
    process: Simulation | None = None
    process_curves: tuple[Tensor, Tensor] | None = None
    stated: tuple[Simulation, Tensor] | None = None
    fourth_moment: dict[str, Interval] = field(default_factory=dict)
    check: dict[str, float] = field(default_factory=dict)
    line_minimum: float = 0.0
    floor: float = 0.0
    seconds: float = 0.0

    def row(self, rule: str, method: str) -> Row:
        """Return the row of one method under one rule."""
        return next(row for row in self.rows if (row.rule, row.method) == (rule, method))


@dataclass(frozen=True)
class Size:
    """How much to sample and simulate.

    Attributes:
        nzk_samples: Samples of each Monte Carlo kernel.
        runs: Simulated runs of the shared-vector process.
        process_steps: Steps of those runs.
        baseline_steps: Steps of the parameter-space baseline.
        check_runs: Runs of the check of the closed form against the process.
        best_of: Directions of the biased best-of baseline; 0 leaves it out.
        stated_steps: Steps of runs at the paper's learning rate, where the public code uses another one.
    """

    nzk_samples: int
    runs: int
    process_steps: int
    baseline_steps: int
    check_runs: int
    best_of: int = 0
    stated_steps: int = 0


def study(problem: Problem, variants: list[Variant], size: Size, seed: int) -> Study:
    """Compute everything about one problem.

    Args:
        problem: The model and data.
        variants: The NZKs of the experiment; the first is the one that figures compare.
        size: How much to sample and simulate.
        seed: Seed of every draw.

    Returns:
        The study.
    """
    start = time.perf_counter()
    steps = record_steps(problem.steps, 250)
    snapshots = [step for step in (0, 49, 99, 199, 999, 1999, 3999) if step < problem.steps] + [problem.steps - 1]
    curves = paper_curves(problem, variants, steps, snapshots, size.nzk_samples, seed)
    seconds = time.perf_counter() - start
    dim = problem.dim
    methods = [
        Method("first_order", "gradient descent", ProcessMoments.deterministic(), FORWARD_PASSES_OF_A_GRADIENT),
        Method("zo_sgd", "ZO-SGD", process_moments("gaussian", dim, "zo_sgd"), 2),
        Method("shared", "shared vector", process_moments("gaussian", dim, "shared"), 2),
        Method("independent", "two vectors", process_moments("gaussian", dim, "independent"), 2),
    ]
    result = Study(problem, steps, snapshots, curves, methods, seconds=seconds)
    result.floor = Evolution(problem.f0, problem.y, problem.kernel, problem.lr).floor
    compare(result)
    run_processes(result, size, seed)
    result.fourth_moment = {
        name: sampled_factor(problem, name, size.nzk_samples, seed) for name in ("rademacher", "gaussian", "laplace")
    }
    return result


def sampled_factor(problem: Problem, distribution: str, samples: int, seed: int, batches: int = 8) -> Interval:
    """Return the factor of the sampled shared-vector kernel over the NTK, with its interval over batches of samples."""
    kernel = problem.kernel
    factors = []
    for batch in range(batches):
        stream = 7_000_003 * (batch + 1) + seed  # other streams than those of the curves
        sampled = sample_nzk(
            problem.features, distribution=distribution, num_samples=max(1, samples // batches), seed=stream
        )
        factors.append(float((sampled.mean * kernel).sum() / kernel.square().sum()))
    return interval(factors)


def paper_curves(
    problem: Problem, variants: list[Variant], steps: list[int], snapshots: list[int], samples: int, seed: int
) -> list[Curve]:
    """Return the curve of the NTK, then of every variant's exact expected kernel, each with its sampled kernel.

    Args:
        problem: The model and data.
        variants: The NZKs.
        steps: Steps at which losses are read.
        snapshots: Steps at which predictions are kept.
        samples: Samples of each Monte Carlo kernel.
        seed: Seed of the draws.

    Returns:
        Curves, gradient descent first.
    """
    first = Evolution(problem.f0, problem.y, problem.kernel, problem.lr)
    curves = [Curve("gradient descent (NTK)", 1.0, first.mean_loss(steps), first.mean(snapshots))]
    for number, variant in enumerate(variants):
        distribution, zeta = variant.distribution, variant.zeta
        factor = expected_nzk_factor(distribution, problem.dim, variant.coupling, zeta_distribution=zeta)
        moments = ProcessMoments.deterministic(factor)
        run = first.at(problem.lr, moments=moments)
        sampled = sample_nzk(
            problem.features,
            distribution=distribution,
            coupling=variant.coupling,
            zeta_distribution=zeta,
            num_samples=samples,
            seed=1_000_003 * (number + 1) + seed,  # another stream than the data's
        )
        z = (sampled.mean - factor * problem.kernel) / sampled.standard_error
        losses, early = run.mean_loss(steps), [step for step in steps if step * factor <= problem.steps]
        stretched = first.mean_loss([round(step * factor) for step in early])
        collapse = float((losses[: len(early)] / stretched - 1).abs().max())
        curves.append(
            Curve(
                variant.label,
                factor,
                losses,
                run.mean(snapshots),
                sampled,
                float(z.square().mean().sqrt()),
                float(z.abs().max()),
                collapse,
            )
        )
    return curves


def compare(result: Study) -> None:
    """Fill in expected losses and the steps and forward passes to the target, under every rule."""
    problem = result.problem
    first = Evolution(problem.f0, problem.y, problem.kernel, problem.lr)
    start = float(first.expected_loss(0))
    target = first.floor + TARGET_FRACTION * (start - first.floor)
    for method in result.methods:
        limit = first.at(1.0, moments=method.moments).stability_limit
        rates = {
            "equal_lr": problem.lr,
            "equal_effective_lr": problem.lr / method.moments.mean,
            "equal_distance": 0.5 * limit,
        }
        for rule, lr in rates.items():
            run = first.at(lr, moments=method.moments)
            result.expected[rule, method.name] = run.expected_loss(result.steps)
            result.rows.append(_row(rule, method, lr, limit, steps_to_reach(run, target)))
        fractions = [share * limit for share in LR_FRACTIONS]
        options = [(steps_to_reach(first.at(lr, moments=method.moments), target), lr) for lr in fractions]
        best = min((num_steps, lr) for num_steps, lr in options if num_steps is not None)
        result.rows.append(_row("best_lr", method, best[1], limit, best[0]))


def _row(rule: str, method: Method, lr: float, limit: float, steps: int | None) -> Row:
    passes = None if steps is None else steps * method.passes
    return Row(rule, method.name, lr, lr * method.moments.mean, limit, steps, passes)


def run_processes(result: Study, size: Size, seed: int) -> None:
    """Run the stochastic algorithms: the parameter-space baseline, the shared-vector process, and a check."""
    problem = result.problem
    x, y, f0, lr = problem.features, problem.y, problem.f0, problem.lr
    loss = squared_loss(x, y, problem.theta0, f0)
    recorded = [step for step in result.steps if step <= size.baseline_steps]
    result.baseline = zo_sgd_run(loss, problem.theta0, lr, recorded, runs=5, seed=seed)
    if size.best_of:
        result.best_of = zo_sgd_run(
            loss, problem.theta0, lr, recorded, num_perturbations=size.best_of, estimator="best_of", seed=seed
        )
    result.line_minimum = all_ones_line_minimum(x, y, f0)
    recorded = [step for step in result.steps if step <= size.process_steps]
    rate = problem.notebook_lr or lr
    result.process = simulate(x, y, f0, rate, recorded, coupling="shared", runs=size.runs, seed=seed)
    shared = next(method.moments for method in result.methods if method.name == "shared")
    exact = Evolution(f0, y, problem.kernel, rate, moments=shared)
    result.process_curves = exact.mean_loss(recorded), exact.expected_loss(recorded)
    if problem.notebook_lr is not None and size.stated_steps:
        recorded = record_steps(min(size.stated_steps, problem.steps), 40)
        runs = simulate(x, y, f0, lr, recorded, coupling="shared", runs=size.runs, seed=seed)
        path = Evolution(f0, y, problem.kernel, lr, moments=shared).mean_loss(recorded)
        result.stated = runs, path
    moments = next(method.moments for method in result.methods if method.name == "zo_sgd")
    rate = 0.5 * result.row("equal_distance", "zo_sgd").limit
    exact = Evolution(f0, y, problem.kernel, rate, moments=moments)
    steps = [1, 5, 20]
    runs = simulate(x, y, f0, rate, steps, runs=size.check_runs, seed=seed)
    z_mean = (runs.mean - exact.mean(steps)) / runs.mean_error
    z_square = (runs.square - exact.second_moment(steps)) / runs.square_error
    result.check = {
        "runs": size.check_runs,
        "mean_z_rms": float(z_mean.square().mean().sqrt()),
        "mean_z_max": float(z_mean.abs().max()),
        "second_moment_z_rms": float(z_square.square().mean().sqrt()),
        "second_moment_z_max": float(z_square.abs().max()),
    }
