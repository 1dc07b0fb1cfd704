r"""ZO-eNTK, Figures 4 and 5 with all weights: how long ZO-SGD follows SGD, how closely, and why they part.

Both start from the same weights and take the same batches at the same rate :math:`\eta`.  With f the beliefs over the
whole vocabulary in the observed sentences, the gap after t steps is

.. math:: D_t = \|f_t^{ZO} - f_t^{FO}\| / \|f_t^{FO} - f_0\| .

It is taken twice: of the beliefs, as in the paper, and of their square roots (Hellinger's distance).  A few tokens
decide the first, so that single runs scatter widely; the second weighs all tokens and resolves more with few runs.

ZO-SGD is SGD and a random walk.  To first order the walk spreads f, to second order it shifts it.  With J the Jacobian
of f at the start, :math:`c = \tfrac12 \mathrm{tr} \nabla^2 f`, and :math:`g_s` the gradients of SGD,

.. math:: \|f_t^{FO} - f_0\|^2 \, E D_t^2 \approx
    \frac{\eta^2}{P} \sum_{s \le t} \left( \|J\|_F^2 \|g_s\|^2 + \|J g_s\|^2 \right)
    + \Big( \frac{\eta^2}{P} \sum_{s \le t} \|g_s\|^2 \Big)^2 \|c\|^2 .

The first term alone is the law of a kernel that stays: :math:`D_t = \sqrt{v / (P t)}` for one batch, so runs approach.
Its sum grows as t and the second term as :math:`t^2`; they are equal, and the gap stops falling, at

.. math:: t^* = \frac{P \|J\|_F^2}{\eta^2 \|g\|^2 \|c\|^2} .

Beliefs are bounded, so the gap is, too; the loss is not.  Of the decrease A of the mean loss by SGD the walk leaves
:math:`1 - B / (P A)` with :math:`B = \tfrac12 \mathrm{tr} H\, \eta^2 \sum_s \|g_s\|^2`: below P = B / A the loss rises.

There are two rates.  At the first, a step of SGD lowers the loss of its own batch by 0.1 to first order
(:math:`\eta = 0.1 / \|g\|^2`, mean over batches), and t* lies far beyond the run.  At the second it is 1, and t* lies
within eight steps for P = 1.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import (
    NOT_RUN,
    Interval,
    combined,
    format_interval,
    interval,
    student_quantile,
    within,
)
from zokernel.experiments.entk.array_cache import ArrayCache
from zokernel.experiments.entk.model_sizes import beliefs, inner, last_logits
from zokernel.experiments.entk.sentences import LanguageTask, language_task
from zokernel.figures import PALETTE, figures
from zokernel.optim import MeZO

logger = logging.getLogger(__name__)

MEASURES = {"l2": 1.0, "hellinger": 0.5}  # the power of the beliefs whose distances are taken
Arrays = dict[str, np.ndarray]


@experiment("entk/trajectories", "ZO-eNTK Fig. 4, 5: trajectories of SGD and ZO-SGD, by model size, all weights")
def run(config: Config) -> Result:
    """Train every model by both methods at two rates; compare the gaps with the law."""
    names = config.pick("models", smoke=("16",), cpu=("smollm2",))
    names = [names] if isinstance(names, str) else list(names)
    counts = one_for_each(config.pick("counts", smoke=(1, 4, 16), cpu=(1, 5, 20), full=(1, 5, 10, 20, 50, 100)), names)
    steps = one_for_each(config.pick("steps", smoke=4, cpu=8), names)
    directions = one_for_each(config.pick("directions", smoke=16, cpu=16), names)
    decreases = config.pick("decreases", smoke=(0.1, 1.0), cpu=(0.1, 1.0))  # of a batch's loss, by a step of SGD
    seeds = one_for_each(config.pick("seeds", smoke=2, cpu=3), names)  # of a model: for all P, or a list, for each
    batch_size = config.pick("batch_size", smoke=2, cpu=2)
    eps = config.pick("eps", smoke=1e-3, cpu=2.5e-4)
    distribution = config.pick("distribution", smoke="rademacher", cpu="rademacher")
    sizes: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    agreement: list[dict[str, Any]] = []
    for name, model_counts, runs, length, number in zip(names, counts, seeds, steps, directions, strict=True):
        plan = ModelRuns(model_counts, runs, length, number, batch_size, eps, distribution)
        size, model_rows, model_agreement = run_model(config, name, plan, decreases)
        sizes.append(size)
        rows += model_rows
        agreement += model_agreement
    largest = {size["model"]: max(model_counts) for size, model_counts in zip(sizes, counts, strict=True)}
    text = "; ".join(
        f"{row['model']}, {row['decrease']:g} per step, P = {row['P']}: {format_interval(row['hellinger']['gap'])} "
        f"(kernel that stays {row['hellinger']['law'][-1]:.2f})"
        for row in rows
        if row["P"] == largest[row["model"]]
    )
    summary = (
        f"All weights, batches of {batch_size} sentences, the paper's five sentences, the whole vocabulary. "
        f"Hellinger gap to SGD over what SGD changed, after the last step: {text}."
    )
    settings = {"batch_size": batch_size, "eps": eps, "distribution": distribution}
    seconds = sum(size["seconds"] for size in sizes)
    numbers = {"sizes": sizes, "rows": rows, "agreement": agreement, "seconds": seconds} | settings
    verdict = judge(agreement, small=config.scale == "smoke")
    return Result(summary, numbers, {}, {"fig4_gaps": draw(rows)}, [verdict])


@dataclass(frozen=True)
class ModelRuns:
    """What is measured and run with one model.

    Attributes:
        counts: Numbers of directions per step.
        runs: Runs of each number: one for all, or a list with one for each.
        steps: Steps of a run.
        directions: Single directions whose changes of beliefs are measured at the start.
        batch_size: Sentences in each batch.
        eps: Perturbation size.
        distribution: That of the directions.
    """

    counts: list[int]
    runs: Any
    steps: int
    directions: int
    batch_size: int
    eps: float
    distribution: str


def run_model(
    config: Config, name: str, plan: ModelRuns, decreases: Sequence[float]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Train one model by both methods at each rate.

    Args:
        config: The experiment's configuration.
        name: The model.
        plan: What is measured and run.
        decreases: By how much a step of SGD lowers the loss of its batch, at each rate.

    Returns:
        The row of the model, a row for each rate and P, and a row of the agreement with the law for each rate.
    """
    load = partial(language_task, config, steps=plan.steps, batch_size=plan.batch_size, name=name)
    cached = ArrayCache(config, name)
    perturbation: dict[str, Any] = {"eps": plan.eps, "distribution": plan.distribution}
    data = f"{plan.steps}-{plan.batch_size}-{config.seed}"
    key = f"{plan.eps}-{plan.distribution}-{data}"
    start = cached(
        f"start-{plan.directions}-{key}",
        partial(measure_start, load, plan.directions, seed=config.seed, **perturbation),
    )
    size = describe_start(start) | {"steps": plan.steps, "directions": plan.directions}
    rows, agreement = [], []
    for decrease in decreases:
        labels = {"model": size["model"], "decrease": decrease}
        lr = decrease / float(start["gradient_sq"].mean())
        reference = cached(f"sgd-{lr:.8g}-{data}", partial(first_order, load, lr))
        rows_of_rate = []
        for count, num_runs in zip(plan.counts, one_for_each(plan.runs, plan.counts), strict=True):
            train = partial(zeroth_order, load, lr, count, **perturbation)
            paths = [
                cached(f"zo-{lr:.8g}-{count}-{seed}-{key}", partial(train, seed=seed))
                for seed in range(config.seed, config.seed + num_runs)
            ]
            rows_of_rate.append(labels | compare_runs(start, reference, paths, lr=lr, count=count))
            logger.info(
                "%s, %g, P = %d: %s", name, decrease, count, format_interval(rows_of_rate[-1]["hellinger"]["gap"])
            )
        rows += rows_of_rate
        agreement.append(labels | {measure: agreement_with_law(rows_of_rate, measure) for measure in MEASURES})
    return size | {"seconds": cached.seconds}, rows, agreement


def one_for_each(setting: Any, names: Sequence[Any]) -> list[Any]:
    """Return a setting of each of some models: the same for all (a number or tuple), or a list with one for each.

    Example:
        >>> one_for_each((1, 5), ["a", "b"]), one_for_each([4, 5], ["a", "b"])
        ([[1, 5], [1, 5]], [4, 5])
    """
    if not isinstance(setting, list):
        return [list(setting) if isinstance(setting, tuple) else setting] * len(names)
    if len(setting) != len(names):
        raise UsageError(f"There are {len(setting)} settings for {len(names)} of {list(names)}: give one for each.")
    return setting


def batch_loss(task: LanguageTask, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch."""
    return F.cross_entropy(last_logits(task.model, batch), batch["targets"])


@torch.no_grad()
def mean_loss(task: LanguageTask) -> float:
    """Return the mean loss of all training batches."""
    return sum(batch_loss(task, batch).item() for batch in task.batches) / len(task.batches)


def measure_start(
    load: Callable[[], LanguageTask], directions: int, *, eps: float, distribution: str, seed: int
) -> Arrays:
    """Measure the gradients of all batches, and what D single directions do to the beliefs, to both orders.

    Returns:
        ``gradient_sq`` of every batch; for each measure the squares of the changes per unit along each direction, (D,),
        and the inner products of the halved second differences, (D, D); ``rise``, those of the loss, (D,), whose mean
        is half the trace of its Hessian; ``loss`` of the batches; and what the model is.
    """
    task = load()
    parameters = list(task.model.parameters())
    squares = []
    for batch in task.batches:
        gradients = torch.autograd.grad(batch_loss(task, batch), parameters)
        squares.append(sum(g.square().sum(dtype=torch.float64).item() for g in gradients))
        del gradients  # before there are those of the next batch: each are as large as the model
    middle, loss, evaluations, rise = beliefs(task), mean_loss(task), list[tuple[Tensor, float]](), []
    odd: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    even: dict[str, list[Tensor]] = {measure: [] for measure in MEASURES}

    def closure() -> float:
        evaluations.append((beliefs(task), mean_loss(task)))
        return evaluations[-1][1]

    optimizer = MeZO(task.model, lr=0.0, eps=eps, distribution=distribution, seed=seed + 1000)  # a stream of its own
    for _ in range(directions):
        evaluations.clear()
        optimizer.step(closure)
        (plus, loss_plus), (minus, loss_minus) = evaluations[:2]  # the first step takes its last loss twice
        for measure, power in MEASURES.items():
            up, down, centre = plus**power, minus**power, middle**power
            odd[measure].append((up - down).square().sum(dtype=torch.float64).item() / (2 * eps) ** 2)
            even[measure].append(((up - centre) + (down - centre)).flatten() / (2 * eps**2))
        rise.append((loss_plus + loss_minus - 2 * loss) / (2 * eps**2))
    stacked = {measure: torch.stack(values) for measure, values in even.items()}
    return {
        "gradient_sq": np.array(squares),
        **{f"odd_{measure}": np.array(values) for measure, values in odd.items()},
        **{f"even_{measure}": inner(values, values) for measure, values in stacked.items()},
        "rise": np.array(rise),
        "loss": np.array(loss),
        "d": np.array(sum(p.numel() for p in parameters)),
        "V": np.array(task.vocab_size),
        "source": np.array(task.source),
    }


def first_order(load: Callable[[], LanguageTask], lr: float) -> Arrays:
    """Return the beliefs under SGD, (T + 1, N, V), its squared gradients, (T,), and the loss after the last step."""
    task = load()
    optimizer = torch.optim.SGD(task.model.parameters(), lr=lr)
    path, squares = [beliefs(task)], []
    for batch in task.batches:
        optimizer.zero_grad()
        batch_loss(task, batch).backward()
        gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
        squares.append(sum(g.square().sum(dtype=torch.float64).item() for g in gradients))
        optimizer.step()
        path.append(beliefs(task))
    return {"beliefs": torch.stack(path).numpy(), "gradient_sq": np.array(squares), "loss": np.array(mean_loss(task))}


def zeroth_order(
    load: Callable[[], LanguageTask], lr: float, count: int, *, eps: float, distribution: str, seed: int
) -> Arrays:
    """Return the beliefs under ZO-SGD with P directions per step, (T + 1, N, V), and the loss after the last step."""
    task = load()
    optimizer = MeZO(task.model, lr=lr, eps=eps, num_perturbations=count, distribution=distribution, seed=seed)

    @torch.no_grad()
    def closure(batch: dict[str, Tensor]) -> float:
        return batch_loss(task, batch).item()

    path = [beliefs(task)]
    for batch in task.batches:
        optimizer.step(partial(closure, batch))
        path.append(beliefs(task))
    return {"beliefs": torch.stack(path).numpy(), "loss": np.array(mean_loss(task))}


def curvature_sq(even: np.ndarray) -> float:
    r"""Return :math:`\|c\|^2` from inner products of independent estimates of c: their mean over pairs has no bias."""
    count = len(even)
    return max(0.0, float(even.sum() - np.trace(even)) / (count * (count - 1)))


def describe_start(start: Arrays) -> dict[str, Any]:
    """Return what a model is and what its start says."""
    return {
        "model": str(start["source"]).split(",")[0],
        "source": str(start["source"]),
        "d": int(start["d"]),
        "V": int(start["V"]),
        "gradient_sq": float(start["gradient_sq"].mean()),
        "jacobian_sq": {measure: interval(start[f"odd_{measure}"]) for measure in MEASURES},
        "curvature_sq": {measure: curvature_sq(start[f"even_{measure}"]) for measure in MEASURES},
        "rise": interval(start["rise"]),
        "loss": float(start["loss"]),
    }


def predicted(
    jacobian_sq: float, curvature: float, gradient_sq: np.ndarray, change_sq: np.ndarray, *, lr: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    r"""Return spread and squared shift after each step, (T,), from :math:`\|g_s\|^2` and :math:`\|\eta J g_s\|^2`.

    Example:
        >>> spread, shift = predicted(10.0, 4.0, np.ones(3), np.zeros(3), lr=1.0, count=2)
        >>> spread.tolist(), shift.tolist()
        ([5.0, 10.0, 15.0], [1.0, 4.0, 9.0])
    """
    walk_sq = lr**2 * np.cumsum(gradient_sq) / count
    return jacobian_sq * walk_sq + np.cumsum(change_sq) / count, curvature * walk_sq**2


def compare_runs(start: Arrays, reference: Arrays, paths: list[Arrays], *, lr: float, count: int) -> dict[str, Any]:
    """Return the losses of the runs of one rate and P, and their gaps by either measure."""
    drop = float(start["loss"] - reference["loss"])
    walk_sq = lr**2 * float(reference["gradient_sq"].sum()) / count  # mean square of the move of a weight
    shares, loss_share = (
        [float(start["loss"] - path["loss"]) / drop for path in paths],
        walk_sq * start["rise"].mean() / drop,
    )
    return {
        "P": count,
        "lr": lr,
        "walk": math.sqrt(walk_sq),
        "sgd_lowers_loss": drop,
        "share_of_sgds_decrease": interval(shares, logs=False),
        "share_predicted": float(1 - loss_share),
        "least_count": float(count * loss_share),
    } | {measure: gaps(measure, start, reference, paths, lr=lr, count=count) for measure in MEASURES}


def gaps(
    measure: str, start: Arrays, reference: Arrays, paths: list[Arrays], *, lr: float, count: int
) -> dict[str, Any]:
    """Return the gaps of the runs of one rate and P after every step, measured and predicted."""
    exact, *beliefs_of_runs = (
        arrays["beliefs"].astype(np.float64) ** MEASURES[measure] for arrays in (reference, *paths)
    )
    changed_sq = np.square(exact[1:] - exact[0]).sum((1, 2))
    moves_sq = np.square(np.diff(exact, axis=0)).sum((1, 2))
    relative = np.sqrt([np.square(path - exact).sum((1, 2))[1:] / changed_sq for path in beliefs_of_runs])  # (seeds, T)
    jacobian_sq, curvature = float(start[f"odd_{measure}"].mean()), curvature_sq(start[f"even_{measure}"])
    gradient_sq = reference["gradient_sq"]
    spread, shift = predicted(jacobian_sq, curvature, gradient_sq, moves_sq, lr=lr, count=count)
    law = np.sqrt(spread / changed_sq)
    per_step = lr**2 * float(gradient_sq.mean()) * curvature
    return {
        "gap": interval(relative[:, -1]),
        "gap_by_seed": relative[:, -1].tolist(),
        "gap_by_step": np.sqrt(np.square(relative).mean(0)).tolist(),
        "law": law.tolist(),
        "with_curvature": np.sqrt((spread + shift) / changed_sq).tolist(),
        "gap_over_law": interval(relative[:, -1] / law[-1]),
        "parting_step": count * jacobian_sq / per_step if per_step else math.inf,
    }


def agreement_with_law(rows: list[dict[str, Any]], measure: str) -> dict[str, Interval]:
    """Return the gap after the last step over the law, rms over the runs of all P, and its log-log slope against P."""
    squares = [np.square(row[measure]["gap_by_seed"]) for row in rows]
    ratios = [square / row[measure]["law"][-1] ** 2 for square, row in zip(squares, rows, strict=True)]
    mean, low, high = interval(np.concatenate(ratios), logs=False)
    over_law = math.sqrt(mean), math.sqrt(max(0.0, low)), math.sqrt(high)
    if len(rows) < 2 or min(map(len, squares)) < 2:
        return {"over_law": over_law, "slope": (math.nan, -math.inf, math.inf)}
    logs = np.log([row["P"] for row in rows])
    weights = (logs - logs.mean()) / np.square(logs - logs.mean()).sum()
    slope = float(weights @ [math.log(square.mean()) / 2 for square in squares])
    errors = [square.std(ddof=1) / square.mean() / len(square) ** 0.5 / 2 for square in squares]
    half = student_quantile(sum(map(len, squares)) - len(rows)) * math.hypot(*(weights * errors))
    return {"over_law": over_law, "slope": (slope, slope - half, slope + half)}


def judge(agreement: list[dict[str, Any]], *, small: bool = False) -> Verdict:
    """Judge Fig. 4 and 5 at every model and rate: the slope in P is -1/2 up to 0.15, the size the law's up to 1.5."""
    slopes, sizes = (
        "; ".join(
            f"{row['model']} at {row['decrease']:g} per step {format_interval(row['hellinger'][key])}"
            for row in agreement
        )
        for key in ("slope", "over_law")
    )
    parts = [within(row["hellinger"]["slope"], -0.65, -0.35) for row in agreement]
    parts += [within(row["hellinger"]["over_law"], 1 / 1.5, 1.5) for row in agreement]
    return Verdict(
        "ZO-SGD approaches the trajectory of SGD as the inverse root of P (Fig. 4, 5).",
        NOT_RUN if small else combined(parts),
        f"Log-log slope of Hellinger's gap after the last step against P (95%, all weights): {slopes}; required: "
        "within 0.15 of -0.5. The gap over sqrt(v / (P T)) of a kernel that stays, v from SGD alone (rms over the runs "
        f"of all P): {sizes}; required: within 0.67 to 1.5.",
        id="entk-trajectories",
    )


def draw(rows: list[dict[str, Any]]):
    """Draw the gap against the steps for every P: dots are measured, lines predicted; a row per model."""
    models, rates = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "decrease"))
    with figures() as Figure:
        figure = Figure(figsize=(4.2 * len(rates), 3.3 * len(models)), layout="constrained")
        axes = figure.subplots(len(models), len(rates), sharey="row", squeeze=False)
        for (model, rate), axis in zip(itertools.product(models, rates), axes.flat, strict=True):
            curves = [row for row in rows if (row["model"], row["decrease"]) == (model, rate)]
            for row, color in zip(curves, itertools.cycle(PALETTE)):
                gaps = row["hellinger"]
                steps = np.arange(1, len(gaps["law"]) + 1)
                axis.loglog(steps, gaps["gap_by_step"], "o", base=2, color=color, markersize=4, label=f"P = {row['P']}")
                axis.loglog(steps, gaps["law"], "--", base=2, color=color, linewidth=1)
                axis.loglog(steps, gaps["with_curvature"], base=2, color=color, linewidth=1)
            axis.set_title(f"{model}, {rate:g} nats per step")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
        panels = [axis.get_legend_handles_labels() for axis in axes.flat]
        figure.legend(*max(panels, key=lambda entries: len(entries[1])), loc="outside upper center", ncols=6)
        figure.supxlabel("step")
        figure.supylabel("Hellinger gap / change by SGD")
    return figure
