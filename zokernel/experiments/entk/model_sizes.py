r"""ZO-eNTK, Figures 4 and 5 at several model sizes: how many directions one step of all weights needs.

For a small step, P directions change the beliefs f of the observed sentences by

.. math:: \Delta_P = \frac1P \sum_p (g^\top z_p)\, J z_p, \qquad \Delta = J g,

where g is the loss gradient of the training batch and J the Jacobian of f.  For Gaussian z the relative error follows

.. math:: E\|\Delta_P - \Delta\|^2 / \|\Delta\|^2 = v / P, \qquad v = 1 + \|g\|^2 \|J\|_F^2 / \|J g\|^2.

Everything is measured with finite differences of forward passes; g comes from one backward pass per batch.

A trajectory of T small steps with new directions has the relative error :math:`\sqrt{v / (P T)}` as long as the kernel
does not move, so runs do not part further with time: the first step is the hardest.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from zokernel.errors import UsageError
from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import (
    NOT_RUN,
    Interval,
    format_interval,
    graded,
    interval,
    log_slope,
    student_quantile,
)
from zokernel.experiments.entk.array_cache import ArrayCache
from zokernel.experiments.entk.belief_changes import Changes, gradients_of, measure, measure_gradients
from zokernel.experiments.entk.sentences import language_task
from zokernel.figures import PALETTE, figures

logger = logging.getLogger(__name__)

COUNTS = (1, 5, 10, 20, 50, 100)
DISTRIBUTIONS = ("gaussian", "rademacher")
FIDELITY = 0.5  # the relative error whose P is reported


@experiment("entk/model_sizes", "ZO-eNTK Fig. 4, 5: the P that one step needs, by model size, all weights")
def run(config: Config) -> Result:
    """Measure v and the errors at each P for every model; compare sizes."""
    names = config.pick("models", smoke=("16", "32", "64"), cpu=("smollm2",))
    names = [names] if isinstance(names, str) else list(names)
    directions = config.pick("directions", smoke=20, cpu=100)
    # One number for all, one for each model, or a pair for a model, of Gaussian and of Rademacher directions.
    counts = directions if isinstance(directions, list) else [directions] * len(names)
    if len(counts) != len(names):
        raise UsageError(f"directions has {len(counts)} numbers for {len(names)} models.")
    batches = config.pick("batches", smoke=2, cpu=4)
    gradients = config.pick("gradients", smoke=4, cpu=24)  # batches whose v is measured; fewer have slopes, too
    batch_size = config.pick("batch_size", smoke=2, cpu=2)
    eps = config.pick("eps", smoke=1e-3, cpu=2.5e-4)
    rows: list[dict[str, Any]] = []
    sizes: list[dict[str, Any]] = []
    for name, number in zip(names, counts, strict=True):
        sampling = Sampling(number, batches, gradients, batch_size, eps)
        size, errors = measure_model(config, name, sampling)
        sizes.append(size)
        rows += errors
        logger.info("%s: v = %s", name, format_interval(size["v"]))
    exponent = size_exponent(sizes)
    numbers = {
        "sizes": sizes,
        "rows": rows,
        "exponent": exponent,
        "fidelity": FIDELITY,
        "batches": batches,
        "gradients": gradients,
        "batch_size": batch_size,
        "eps": eps,
        "seconds": sum(size["seconds"] for size in sizes),
    }
    text = "; ".join(f"{row['model']} ({row['d']:,}) {format_interval(row['v'], 0)}" for row in sizes)
    summary = (
        f"All weights, {gradients} batches of {batch_size} sentences, its five sentences, the whole vocabulary. "
        f"Relative variance v of one direction: {text}; as a power of d: {format_interval(exponent)}. "
        f"A relative error of {FIDELITY:g} needs v / {FIDELITY**2:g} directions, of one step or of all steps together."
    )
    verdict = judge(exponent, len({row["d"] for row in sizes}), gradients, small=config.scale == "smoke")
    return Result(summary, numbers, {}, {"fig5_sizes": draw(rows)}, [verdict])


@dataclass(frozen=True)
class Sampling:
    """How much is measured of one model.

    Attributes:
        directions: Single directions of each distribution, or a pair: of Gaussian and of Rademacher ones.
        batches: Batches whose slopes along the directions are measured.
        gradients: Batches whose gradient is taken.
        batch_size: Sentences in each.
        eps: Half of the distance between the two points of a direction.
    """

    directions: int | list[int]
    batches: int
    gradients: int
    batch_size: int
    eps: float


def measure_model(config: Config, name: str, sampling: Sampling) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the row of a model, and a row of its errors per distribution."""
    task = language_task(config, steps=sampling.gradients, batch_size=sampling.batch_size, name=name)
    cached = ArrayCache(config, name)
    gradient = gradients_of(task)
    settings = f"{sampling.gradients}-{sampling.batch_size}-{config.seed}"
    squares = cached(f"gradients-{settings}", partial(measure_gradients, task, gradient))
    directions = sampling.directions
    changes = {}
    for distribution, number in zip(
        DISTRIBUTIONS, directions if isinstance(directions, list) else [directions] * len(DISTRIBUTIONS), strict=True
    ):
        if number == 0:
            continue
        options: dict[str, Any] = {"distribution": distribution, "eps": sampling.eps, "seed": config.seed}
        settings = f"{distribution}-{number}-{sampling.batches}-{sampling.batch_size}-{sampling.eps}-{config.seed}"
        arrays = cached(settings, partial(measure, task, gradient, sampling.batches, number, **options))
        changes[distribution] = Changes(**arrays)
    model: dict[str, Any] = {"model": task.source.split(",")[0], "d": sum(p.numel() for p in task.model.parameters())}
    details = {"source": task.source, "V": task.vocab_size, "directions": directions, "seconds": cached.seconds}
    size = model | details | pooled_variance(changes, squares)
    rows = [
        model | {"distribution": distribution} | error_table(of_distribution, size["jacobian_sq"])
        for distribution, of_distribution in changes.items()
    ]
    return size, rows


def pooled_variance(changes: dict[str, Changes], squares: dict[str, np.ndarray]) -> dict[str, Any]:
    r"""Return v of every batch whose gradient was taken; :math:`E\|Jz\|^2 = \|J\|_F^2` for either distribution."""
    change_sq = np.concatenate([np.diagonal(one.gram) for one in changes.values()])
    variance = 1 + squares["gradient_sq"] * change_sq.mean() / squares["change_sq"]
    return {
        "jacobian_sq": float(change_sq.mean()),
        "jacobian_sq_relative_error": float(change_sq.std(ddof=1) / change_sq.mean() / len(change_sq) ** 0.5),
        "v": interval(variance),
        "v_by_batch": variance.tolist(),
        "directions_for_fidelity": interval(variance / FIDELITY**2),
    }


def error_table(changes: Changes, jacobian_sq: float) -> dict[str, Any]:
    """Return the errors at each P, measured and by the law, of one model and distribution."""
    variance = changes.variance(jacobian_sq)
    errors = []
    for count in COUNTS:
        if count <= len(changes.gram):
            mean_squares = changes.errors(count).mean(1)
            errors.append(
                {
                    "P": count,
                    "groups": len(changes.gram) // count,
                    "relative_rms": interval(np.sqrt(mean_squares)),
                    "predicted": float(np.exp(np.log(variance / count).mean() / 2)),
                    "measured_over_predicted": interval(np.sqrt(mean_squares * count / variance)),
                }
            )
    return {
        "slope_sq_over_gradient_sq": interval(np.square(changes.slopes).mean(1) / changes.gradient_sq),
        "errors": errors,
    }


def size_exponent(sizes: list[dict[str, Any]]) -> Interval:
    """Return the exponent of v in d: one slope per batch of sentences, which all models share.

    The error of each model's Jacobian, which its batches share, is added to that over batches.
    """
    logs = np.log([row["d"] for row in sizes])
    if len(set(logs)) < 2:
        return math.nan, -math.inf, math.inf
    batches = zip(*(row["v_by_batch"] for row in sizes), strict=True)
    slope, low, _ = interval([log_slope(np.exp(logs), values) for values in batches], logs=False)
    weights = (logs - logs.mean()) / np.square(logs - logs.mean()).sum()
    shared = math.hypot(*(weights * [row["jacobian_sq_relative_error"] for row in sizes]))
    half = math.hypot(slope - low, student_quantile(10**6) * shared)
    return slope, slope - half, slope + half


def judge(exponent: Interval, sizes: int, batches: int, *, small: bool = False) -> Verdict:
    """Judge whether P is free of the size: the exponent of v below 0.1 in size (holds), or below 0.5."""
    _, low, high = exponent
    size = (max(abs(low), abs(high)), max(0.0, low, -high), max(abs(low), abs(high)))
    return Verdict(
        "The number of perturbations that suffices does not depend on the model's size.",
        NOT_RUN if small or sizes < 3 else graded(size, 0.1, 0.5),
        f"Exponent of v in d over {sizes} sizes (95%, {batches} batches of sentences, all weights, one step): "
        f"{format_interval(exponent, 3)}; required: below 0.1 in size, or under conditions below 0.5. A "
        "parameter-space view would give 1.",
        id="entk-threshold-across-sizes",
    )


def draw(rows: list[dict[str, Any]]):
    """Draw the relative error of one step against P, measured and by the law, for every model."""
    with figures() as Figure:
        figure = Figure(figsize=(8.5, 3.4), layout="constrained")
        for axis, distribution in zip(figure.subplots(1, 2, sharey=True), DISTRIBUTIONS, strict=True):
            models = [row for row in rows if row["distribution"] == distribution]
            for row, color in zip(models, itertools.cycle(PALETTE)):
                counts = [at_count["P"] for at_count in row["errors"]]
                middle, low, high = (
                    np.array([at_count["relative_rms"][k] for at_count in row["errors"]]) for k in range(3)
                )
                label = f"{row['model']}, {row['d'] / 1e6:,.0f} million"
                spread = [middle - low, high - middle]
                axis.errorbar(counts, middle, spread, fmt="o", color=color, label=label, capsize=3)
                axis.plot(counts, [at_count["predicted"] for at_count in row["errors"]], "--", color=color, linewidth=1)
            axis.set(xscale="log", yscale="log", xlabel="perturbations P", title=distribution)
            axis.legend(fontsize=7)
        figure.supylabel("relative error of the change of beliefs")
    return figure
