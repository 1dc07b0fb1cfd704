"""ZO-eNTK, Figures 4 and 5: SGD against ZO-SGD on a language model, full vocabulary, identical batches.

At cpu scale the last decoder block and the final norm are trained (the blocks below are evaluated once, exactly);
``options={"num_blocks": n}`` trains more.  The paper does not state its learning rate, batch size, number of steps or
perturbation size; they are settings here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import (
    NOT_RUN,
    Interval,
    below,
    combined,
    graded,
    interval,
    jackknife,
    log_slope,
    shown,
    within,
    worst,
)
from zokernel.experiments.entk.sentences import Tail, language_task
from zokernel.figures import PALETTE, figures
from zokernel.optim import MeZO
from zokernel.readable import counted

logger = logging.getLogger(__name__)

COUNTS = (1, 5, 10, 20, 50, 100)
DISTRIBUTIONS = ("gaussian", "rademacher")


@experiment("entk/language_model", "ZO-eNTK Fig. 4, 5: beliefs of a language model under SGD and ZO-SGD")
def run(config: Config) -> Result:
    """Train with both methods from the same weights on the same batches; compare beliefs on the five sentences."""
    steps = config.pick("steps", smoke=3, cpu=4, full=50)
    batch_size = config.pick("batch_size", smoke=4, cpu=4, full=16)
    counts = config.pick("num_perturbations", smoke=(1, 4, 10), cpu=COUNTS[:-1], full=COUNTS)
    streams = config.pick("streams", smoke=2, cpu=3, full=5)
    num_blocks = config.pick("num_blocks", smoke=1, cpu=1, full=30)
    lr = config.pick("lr", smoke=1e-2, cpu=2e-4)
    eps = config.pick("eps", smoke=1e-3, cpu=1e-3)
    task = language_task(config, steps=steps, batch_size=batch_size)
    tail = Tail(task.model, num_blocks)
    batches = [tail.cache(task.model, batch) for batch in task.batches]
    targets = [batch["targets"] for batch in task.batches]
    watched, answers = tail.cache(task.model, task.observed), task.observed["targets"]
    dim = sum(p.numel() for p in tail.parameters())
    reference = trajectory(tail, batches, targets, watched, lr=lr)
    change = (reference[-1] - reference[0]).norm().item()
    table: list[dict[str, Any]] = []
    arrays = {"fo": label_beliefs(reference, answers).numpy()}
    ends: dict[tuple[str, int], list[Tensor]] = {}
    for distribution in DISTRIBUTIONS:
        for count in counts:
            chosen = {"lr": lr, "count": count, "distribution": distribution, "eps": eps}
            found = [
                trajectory(tail, batches, targets, watched, **chosen, seed=config.seed + stream)
                for stream in range(streams)
            ]
            apart = torch.stack([run - reference for run in found]).norm(dim=-1)  # (streams, steps + 1, sentences)
            ends[distribution, count] = [run[-1] for run in found]
            relative = [((run[-1] - reference[-1]).norm() / change).item() for run in found]
            table.append(
                {
                    "distribution": distribution,
                    "P": count,
                    "final_l2": interval(apart[:, -1].mean(-1).numpy()),
                    "mean_l2": apart[:, 1:].mean().item(),
                    "relative": interval(relative),
                    "final_l2_by_stream": apart[:, -1].mean(-1).tolist(),
                    "relative_by_stream": relative,
                }
            )
            arrays[f"{distribution}_{count}"] = label_beliefs(found[0], answers).numpy()
            logger.info("%s, P = %d: %s of the change", distribution, count, shown(table[-1]["relative"]))
    slopes = {name: rms_slope(table, (name,)) for name in DISTRIBUTIONS}
    pooled = rms_slope(table, DISTRIBUTIONS)
    alike = distance_ratio(table)
    crossed = {str(count): crossing(*(ends[name, count] for name in DISTRIBUTIONS)) for count in counts}
    nearest = [interval(pair_distances(*(ends[n, counts[-1]] for n in DISTRIBUTIONS)) / change)]
    numbers = {
        "rows": table,
        "d": dim,
        "V": task.vocab_size,
        "source": task.source,
        "trained": f"the last {counted(num_blocks, 'decoder block')} and the final norm",
        "streams": streams,
        "slopes": slopes,
        "pooled_slope": pooled,
        "distance_gaussian_over_rademacher": alike,
        "distance_between_distributions_over_within": crossed,
        "distance_between_distributions_over_change_at_largest_P": nearest[0],
        "lr": lr,
        "steps": steps,
        "eps": eps,
    }
    largest = min(50, max(counts))
    fifty = {row["distribution"]: row["relative"] for row in table if row["P"] == largest}
    summary = (
        f"{task.source}; trained: {numbers['trained']}, {dim:,} parameters; V = {task.vocab_size:,}, {steps} steps of "
        f"{batch_size} sentences, {streams} streams of directions. The l2 distance between ZO and FO beliefs after all "
        f"steps falls with slope {shown(pooled)}; at P = {largest} it is "
        + " and ".join(f"{shown(value)} ({name})" for name, value in fifty.items())
        + " of what FO training changed."
    )
    drawn = {
        "fig4_trajectories": trajectories_figure(arrays, counts),
        "fig5_difference": difference_figure(table, task.source),
    }
    judged = [
        judge_root(pooled, streams, (min(counts), max(counts))),
        judge_fifty(fifty, largest, streams, small=config.scale == "smoke"),
        judge_distributions(alike, crossed[str(counts[-1])], nearest[0], counts[-1], streams),
    ]
    return Result(summary, numbers, arrays, drawn, judged)


def judge_root(slope: Interval, streams: int, span: tuple[int, int]) -> Verdict:
    """Judge Fig. 5: the slope of the distance against P is -1/2 up to 0.15."""
    return Verdict(
        "The difference of beliefs tends to zero as P grows, as the inverse root (Fig. 5).",
        within(slope, -0.65, -0.35),
        f"Log-log slope {shown(slope)} (95%, {streams} streams, mean of both distributions) over P = {span[0]}.."
        f"{span[1]}; required: within 0.15 of -0.5.",
        id="entk-beliefs-root-p",
    )


def judge_fifty(gaps: dict[str, Interval], count: int, streams: int, *, small: bool = False) -> Verdict:
    """Judge Fig. 4: the gap at P = 50 is below a fifth of the change (holds) or a half of it (under conditions)."""
    return Verdict(
        "P = 50 effectively mimics first-order training (Fig. 4).",
        NOT_RUN if small else worst(graded(gap, 0.2, 0.5) for gap in gaps.values()),
        f"The gap at P = {count} over the change by FO training is "
        + " and ".join(f"{shown(gap)} ({name})" for name, gap in gaps.items())
        + f" (95%, {streams} streams); required: below 0.2, or under conditions below 0.5.",
        id="entk-p50",
    )


def judge_distributions(alike: Interval, crossed: Interval, nearest: Interval, count: int, streams: int) -> Verdict:
    """Judge whether trajectories agree: in distribution (equal distances up to 25%), and one by one (a fifth apart)."""
    return Verdict(
        "Gaussian and Rademacher trajectories agree (Fig. 4, 5).",
        combined([within(alike, 0.8, 1.25), within(crossed, 0.8, 1.25), below(nearest, 0.2)]),
        f"Distance to FO, Gaussian over Rademacher: {shown(alike)}; required: within 0.8 to 1.25. At P = {count} two "
        f"trajectories of different distributions are {shown(crossed)} times as far apart as two of the same one "
        f"(required: the same), and {shown(nearest)} of the change apart (required: below 0.2); {streams} streams.",
        id="entk-laws-of-trajectories",
    )


def rms_slope(table: list[dict[str, Any]], distributions: Sequence[str]) -> Interval:
    """Return the log-log slope of the rms final distance against P, mean of the distributions, by the jackknife."""
    parts = [[row for row in table if row["distribution"] == name] for name in distributions]

    def fitted(keep: Sequence[int]) -> float:
        squares = [[np.square(np.array(row["final_l2_by_stream"])[keep]).mean() for row in part] for part in parts]
        slopes = [
            log_slope([row["P"] for row in part], np.sqrt(found)) for part, found in zip(parts, squares, strict=True)
        ]
        return float(np.mean(slopes))

    every = list(range(len(parts[0][0]["final_l2_by_stream"])))
    return jackknife(fitted(every), [fitted(every[:n] + every[n + 1 :]) for n in every])


def distance_ratio(table: list[dict[str, Any]]) -> Interval:
    """Return the distance to FO of Gaussian over that of Rademacher directions: mean over P, interval over streams."""
    logs = [
        np.log([row["final_l2_by_stream"] for row in table if row["distribution"] == name]).mean(0)
        for name in DISTRIBUTIONS
    ]
    return interval(np.exp(logs[0] - logs[1]), logs=True)


def pair_distances(left: list[Tensor], right: list[Tensor]) -> np.ndarray:
    """Return the distances between beliefs of the same streams."""
    return np.array([(a - b).norm().item() for a, b in zip(left, right, strict=True)])


def crossing(gaussian: list[Tensor], rademacher: list[Tensor]) -> Interval:
    """Return how far a Gaussian and a Rademacher run are apart, over two runs of one distribution on two streams."""
    shifted = [pair_distances(ends, [*ends[1:], ends[0]]) for ends in (gaussian, rademacher)]
    return interval(pair_distances(gaussian, rademacher) / np.sqrt(shifted[0] * shifted[1]), logs=True)


def trajectory(
    tail: nn.Module,
    batches: list[Any],
    targets: list[Tensor],
    watched: Any,
    *,
    lr: float,
    count: int | None = None,
    distribution: str = "gaussian",
    eps: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """Return beliefs over the whole vocabulary at the watched sentences, (steps + 1, sentences, V).

    Args:
        tail: The model; a copy is trained.
        batches: One cached batch per step.
        targets: Their target tokens.
        watched: The cached sentences to watch.
        lr: Learning rate of both methods.
        count: P; ``None`` for gradient descent.
        distribution: That of the directions.
        eps: Perturbation size.
        seed: Seed of the directions.

    Returns:
        Probabilities.
    """
    net = copy.deepcopy(tail)
    optimizer: torch.optim.Optimizer
    if count is None:
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    else:
        optimizer = MeZO(net, lr=lr, eps=eps, num_perturbations=count, distribution=distribution, seed=seed)

    def beliefs() -> Tensor:
        with torch.no_grad():
            return net(watched).softmax(-1)

    found = [beliefs()]
    for batch, target in zip(batches, targets, strict=True):
        if count is None:
            optimizer.zero_grad()
            F.cross_entropy(net(batch), target).backward()
            optimizer.step()
        else:
            optimizer.step(partial(_loss, net, batch, target))
        found.append(beliefs())
    return torch.stack(found)


def _loss(net: nn.Module, batch: Any, target: Tensor) -> float:
    return F.cross_entropy(net(batch), target).item()


def label_beliefs(beliefs_TNV: Tensor, answers: Tensor) -> Tensor:
    """Return the belief in each sentence's own label word, (steps + 1, sentences)."""
    return beliefs_TNV[:, torch.arange(len(answers)), answers]


def trajectories_figure(arrays: dict[str, np.ndarray], counts: tuple[int, ...]):
    """Draw the belief in the right label word of each sentence (rows) for each P (columns)."""
    reference = arrays["fo"]
    with figures() as Figure:
        figure = Figure(figsize=(2.0 * len(counts), 1.5 * reference.shape[1]), layout="constrained")
        axes = figure.subplots(reference.shape[1], len(counts), sharex=True, sharey="row", squeeze=False)
        for n, line in enumerate(axes):
            for axis, count in zip(line, counts, strict=True):
                axis.plot(reference[:, n], color="black", label="FO-SGD")
                for name, color in zip(DISTRIBUTIONS, PALETTE, strict=False):
                    axis.plot(arrays[f"{name}_{count}"][:, n], color=color, linewidth=1.1, label=f"ZO, {name}")
                axis.ticklabel_format(axis="y", scilimits=(-2, 2))
                axis.yaxis.get_offset_text().set_fontsize(7)
                if n == 0:
                    axis.set_title(f"P = {count}", fontsize=9)
                axis.tick_params(labelsize=7)
            line[0].set_ylabel(f"sample {n + 1}", fontsize=8)
        axes[0, 0].legend(fontsize=6)
        figure.supxlabel("step")
        figure.supylabel("belief in the right label word")
    return figure


def difference_figure(table: list[dict[str, Any]], source: str):
    """Draw the l2 distance of beliefs against P."""
    with figures() as Figure:
        figure = Figure(layout="constrained")
        axis = figure.subplots()
        for name, color in zip(DISTRIBUTIONS, PALETTE, strict=False):
            rows = [row for row in table if row["distribution"] == name]
            counts = [row["P"] for row in rows]
            mean, low, high = (np.array([row["final_l2"][k] for row in rows]) for k in range(3))
            label = f"{name}, last step (95% over streams)"
            axis.errorbar(counts, mean, [mean - low, high - mean], fmt="o-", color=color, label=label, capsize=3)
            axis.plot(counts, [row["mean_l2"] for row in rows], "s--", color=color, label=f"{name}, mean over steps")
        scale = np.exp(np.mean([np.log(row["final_l2"][0]) + 0.5 * np.log(row["P"]) for row in table]))
        axis.plot(counts, scale / np.sqrt(counts), ":", color="black", label=r"$\propto P^{-1/2}$")
        axis.set(xscale="log", yscale="log", xlabel="perturbations P", ylabel="l2 distance of ZO and FO beliefs")
        axis.set_title(source, fontsize=8)
        axis.legend(fontsize=8)
    return figure
