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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from zokernel.experiments.entk.sentences import LanguageTask, language_task
from zokernel.figures import PALETTE, figures
from zokernel.optim import MeZO

logger = logging.getLogger(__name__)

COUNTS = (1, 5, 10, 20, 50, 100)
DISTRIBUTIONS = ("gaussian", "rademacher")
FIDELITY = 0.5  # the relative error whose P is reported
LOSS_CHANGE = 0.01  # of the step along the gradient by which J g is measured

Gradients = Callable[[int], tuple[float, Tensor]]
"""By number of a batch, the squared norm of its gradient and the change of beliefs per unit along it."""


@dataclass(frozen=True)
class Changes:
    r"""What single directions do to beliefs, and what the gradient does; B batches, D directions.

    Attributes:
        slopes: Slopes of each batch's loss along each direction, (B, D).
        gram: Inner products of the changes of beliefs :math:`J z_p`, (D, D).
        along_gradient: Inner products of :math:`J g_b` with :math:`J z_p`, (B, D).
        gradient_sq: :math:`\|g_b\|^2`, (B,).
        change_sq: :math:`\|J g_b\|^2`, (B,).
    """

    slopes: np.ndarray
    gram: np.ndarray
    along_gradient: np.ndarray
    gradient_sq: np.ndarray
    change_sq: np.ndarray

    def variance(self, jacobian_sq: float) -> np.ndarray:
        r"""Return v of each batch by the law, from :math:`\|J\|_F^2`."""
        return 1 + self.gradient_sq * jacobian_sq / self.change_sq

    def errors(self, count: int) -> np.ndarray:
        """Return the squared relative errors of disjoint groups of ``count`` directions, (B, groups)."""
        groups = len(self.gram) // count
        errors = np.empty((len(self.slopes), groups))
        for batch, group in itertools.product(range(len(self.slopes)), range(groups)):
            part = slice(group * count, (group + 1) * count)
            slopes = self.slopes[batch, part]
            change = slopes @ self.gram[part, part] @ slopes / count**2
            shared = slopes @ self.along_gradient[batch, part] / count
            errors[batch, group] = 1 + (change - 2 * shared) / self.change_sq[batch]
        return errors


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


def along_gradient(task: LanguageTask, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Return the squared norm of a batch's gradient, and the change of beliefs per unit along it."""
    parameters = list(task.model.parameters())
    loss = F.cross_entropy(last_logits(task.model, batch), batch["targets"])
    gradients = torch.autograd.grad(loss, parameters)
    size = sum(g.square().sum(dtype=torch.float64).item() for g in gradients)
    return size, difference(task, parameters, gradients, LOSS_CHANGE / size)


def gradients_of(task: LanguageTask) -> Gradients:
    """Return :func:`along_gradient` of a task's batches by number, each taken when it is first asked for."""
    return cache(lambda number: along_gradient(task, task.batches[number]))


def measure_gradients(task: LanguageTask, gradient: Gradients) -> dict[str, np.ndarray]:
    """Return the squares of every batch's gradient and of the change of beliefs along it."""
    sizes, changes = zip(*map(gradient, range(len(task.batches))), strict=True)
    return {
        "gradient_sq": np.array(sizes),
        "change_sq": np.array([change.square().sum(dtype=torch.float64).item() for change in changes]),
    }


def measure(
    task: LanguageTask,
    gradient: Gradients,
    num_batches: int,
    directions: int,
    *,
    distribution: str,
    eps: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Measure what the gradients of batches and single directions do to the beliefs in the observed sentences.

    Args:
        task: Model and observed sentences; all weights move.
        gradient: What :func:`gradients_of` returns for the task.
        num_batches: B; the task's first training batches, of equal size.
        directions: D.
        distribution: That of the directions.
        eps: Half of the distance between the two points of a direction.
        seed: Seed of the directions.

    Returns:
        The fields of :class:`Changes`.
    """
    model, batches = task.model, task.batches[:num_batches]
    gradient_sq, along = zip(*map(gradient, range(num_batches)), strict=True)
    widths = [batch["input_ids"].shape[1] for batch in batches]
    padded = {
        key: torch.cat([F.pad(b[key], (0, max(widths) - width)) for b, width in zip(batches, widths, strict=True)])
        for key in ("input_ids", "attention_mask")
    }
    targets = torch.cat([batch["targets"] for batch in batches])
    evaluations: list[tuple[Tensor, Tensor]] = []

    def closure() -> float:
        losses = F.cross_entropy(last_logits(model, padded), targets, reduction="none")
        evaluations.append((losses.double().view(len(batches), -1).mean(1), beliefs(task)))
        return losses.mean().item()

    optimizer = MeZO(model, lr=0.0, eps=eps, distribution=distribution, seed=seed)  # step p evaluates direction p
    slopes, changes = [], []
    for _ in range(directions):
        evaluations.clear()
        optimizer.step(closure)
        (plus, plus_beliefs), (minus, minus_beliefs) = evaluations[:2]  # the first step takes its last loss twice
        slopes.append((plus - minus).numpy() / (2 * eps))
        changes.append((plus_beliefs - minus_beliefs).flatten() / (2 * eps))
    stacked, gradient_changes = torch.stack(changes), torch.stack(along).flatten(1)
    return {
        "slopes": np.array(slopes).T,
        "gram": inner(stacked, stacked),
        "along_gradient": inner(gradient_changes, stacked),
        "gradient_sq": np.array(gradient_sq),
        "change_sq": np.diagonal(inner(gradient_changes, gradient_changes)).copy(),
    }


def inner(left: Tensor, right: Tensor) -> np.ndarray:
    """Return all inner products of two sets of vectors, summed in float64 a block at a time."""
    parts = zip(left.split(1 << 16, dim=1), right.split(1 << 16, dim=1), strict=True)
    return cast(Tensor, sum(a.double() @ b.double().T for a, b in parts)).numpy()


@torch.no_grad()
def difference(task: LanguageTask, parameters: list[nn.Parameter], vector: Sequence[Tensor], step: float) -> Tensor:
    """Return the change of beliefs per unit along a vector, by a central difference; the weights are restored."""
    at_points = []
    for move in (step, -2 * step, step):
        for parameter, direction in zip(parameters, vector, strict=True):
            parameter.add_(direction, alpha=move)
        at_points.append(beliefs(task))
    return (at_points[0] - at_points[1]) / (2 * step)


@torch.no_grad()
def beliefs(task: LanguageTask) -> Tensor:
    """Return the probabilities of the next token of each observed sentence, (N, V)."""
    return last_logits(task.model, task.observed).softmax(-1)


def last_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits at the last token of every row, (N, V)."""
    mask = batch["attention_mask"]
    hidden = model.get_decoder()(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)[0]
    return model.get_output_embeddings()(hidden[torch.arange(len(mask)), mask.sum(1) - 1])


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
