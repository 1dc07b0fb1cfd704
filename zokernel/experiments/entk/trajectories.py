r"""ZO-eNTK, Figures 4 and 5 with all weights: how long ZO-SGD follows SGD, how closely, and why they part.

Both start from the same weights and take the same batches at the same rate :math:`\eta`.  The gap between them, and the
law that it is compared with, are in :mod:`zokernel.experiments.entk.trajectory_gaps`.

There are two rates.  At the first, a step of SGD lowers the loss of its own batch by 0.1 to first order
(:math:`\eta = 0.1 / \|g\|^2`, mean over batches), and t*, the step after which the gap no longer
falls, lies far beyond the run.  At the second it is 1, and t* lies within eight steps for P = 1.
"""

from __future__ import annotations

import itertools
import logging
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
    combined,
    format_interval,
    within,
)
from zokernel.experiments.entk.array_cache import ArrayCache
from zokernel.experiments.entk.belief_changes import beliefs, inner, last_logits
from zokernel.experiments.entk.sentences import LanguageTask, language_task
from zokernel.experiments.entk.trajectory_gaps import MEASURES, Arrays, agreement_with_law, compare_runs, describe_start
from zokernel.figures import PALETTE, figures
from zokernel.optim import MeZO

logger = logging.getLogger(__name__)


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
        f"(constant kernel {row['hellinger']['law'][-1]:.2f})"
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
        "within 0.15 of -0.5. The gap over sqrt(v / (P T)) of a constant kernel, v from SGD alone (rms over the runs "
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
            panel_rows = [row for row in rows if (row["model"], row["decrease"]) == (model, rate)]
            for row, color in zip(panel_rows, itertools.cycle(PALETTE)):
                curve = row["hellinger"]
                steps = np.arange(1, len(curve["law"]) + 1)
                axis.loglog(
                    steps, curve["gap_by_step"], "o", base=2, color=color, markersize=4, label=f"P = {row['P']}"
                )
                axis.loglog(steps, curve["law"], "--", base=2, color=color, linewidth=1)
                axis.loglog(steps, curve["with_curvature"], base=2, color=color, linewidth=1)
            axis.set_title(f"{model}, {rate:g} nats per step")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
        panels = [axis.get_legend_handles_labels() for axis in axes.flat]
        figure.legend(*max(panels, key=lambda entries: len(entries[1])), loc="outside upper center", ncols=6)
        figure.supxlabel("step")
        figure.supylabel("Hellinger gap / change by SGD")
    return figure
