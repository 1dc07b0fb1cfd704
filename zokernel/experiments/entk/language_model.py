"""ZO-eNTK, Figures 4 and 5: SGD against ZO-SGD on a language model, full vocabulary, identical batches.

At cpu scale the last decoder block and the final norm are trained (the blocks below are evaluated once, exactly);
``options={"num_blocks": n}`` trains more.  The paper does not state its learning rate, batch size, number of steps or
perturbation size; they are settings here.
"""

from __future__ import annotations

import copy
import itertools
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
    format_interval,
    graded,
    interval,
    jackknife,
    log_slope,
    within,
    worst,
)
from zokernel.experiments.entk.sentences import Tail, language_task
from zokernel.figures import PALETTE, figures
from zokernel.optim import MeZO

logger = logging.getLogger(__name__)

COUNTS = (1, 5, 10, 20, 50, 100)
DISTRIBUTIONS = ("gaussian", "rademacher")

Ends = dict[tuple[str, int], list[Tensor]]
"""By distribution and P, the beliefs of every stream after the last step."""


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
    train = partial(trajectory, tail, batches, targets, tail.cache(task.model, task.observed), lr=lr)
    reference = train()
    answers = task.observed["targets"]
    table: list[dict[str, Any]] = []
    arrays = {"fo": label_beliefs(reference, answers).numpy()}
    ends: Ends = {}
    for distribution, count in itertools.product(DISTRIBUTIONS, counts):
        seeds = range(config.seed, config.seed + streams)
        paths = [train(count=count, distribution=distribution, eps=eps, seed=seed) for seed in seeds]
        table.append({"distribution": distribution, "P": count} | distances(paths, reference))
        arrays[f"{distribution}_{count}"] = label_beliefs(paths[0], answers).numpy()
        ends[distribution, count] = [path[-1] for path in paths]
        logger.info("%s, P = %d: %s of the change", distribution, count, format_interval(table[-1]["relative"]))
    agreement = agreement_of_distributions(table, ends, counts, change_of(reference))
    blocks = "decoder block" if num_blocks == 1 else f"{num_blocks} decoder blocks"
    numbers = {
        "rows": table,
        "d": sum(p.numel() for p in tail.parameters()),
        "V": task.vocab_size,
        "source": task.source,
        "trained": f"the last {blocks} and the final norm",
        "streams": streams,
        **agreement,
        "lr": lr,
        "steps": steps,
        "eps": eps,
    }
    drawn = {
        "fig4_trajectories": trajectories_figure(arrays, counts),
        "fig5_difference": difference_figure(table, task.source),
    }
    summary = _summary(numbers, batch_size)
    return Result(summary, numbers, arrays, drawn, _verdicts(numbers, counts, small=config.scale == "smoke"))


def change_of(path: Tensor) -> float:
    """Return by how much beliefs have changed at the end of a trajectory."""
    return (path[-1] - path[0]).norm().item()


def distances(paths: list[Tensor], reference: Tensor) -> dict[str, Any]:
    """Return the distances of the trajectories of several streams to that of first-order training."""
    distance = torch.stack([path - reference for path in paths]).norm(dim=-1)  # (streams, steps + 1, sentences)
    relative = [((path[-1] - reference[-1]).norm() / change_of(reference)).item() for path in paths]
    return {
        "final_l2": interval(distance[:, -1].mean(-1).numpy()),
        "mean_l2": distance[:, 1:].mean().item(),
        "relative": interval(relative),
        "final_l2_by_stream": distance[:, -1].mean(-1).tolist(),
        "relative_by_stream": relative,
    }


def agreement_of_distributions(
    table: list[dict[str, Any]], ends: Ends, counts: Sequence[int], change: float
) -> dict[str, Any]:
    """Return how distances fall with P, and how far the trajectories of both distributions are apart."""
    gaussian, rademacher = (ends[name, counts[-1]] for name in DISTRIBUTIONS)
    return {
        "slopes": {name: rms_slope(table, (name,)) for name in DISTRIBUTIONS},
        "pooled_slope": rms_slope(table, DISTRIBUTIONS),
        "distance_gaussian_over_rademacher": distance_ratio(table),
        "distance_between_distributions_over_within": {
            str(count): crossing(*(ends[name, count] for name in DISTRIBUTIONS)) for count in counts
        },
        "distance_between_distributions_over_change_at_largest_P": interval(
            pair_distances(gaussian, rademacher) / change
        ),
    }


def gaps_at(table: list[dict[str, Any]], count: int) -> dict[str, Interval]:
    """Return the gap at P directions over the change by first-order training, by distribution."""
    return {row["distribution"]: row["relative"] for row in table if row["P"] == count}


def _largest_count(table: list[dict[str, Any]]) -> int:
    """Return the P whose gaps are judged: 50, or the largest if that is smaller."""
    return min(50, max(row["P"] for row in table))


def _summary(numbers: dict[str, Any], batch_size: int) -> str:
    largest = _largest_count(numbers["rows"])
    return (
        f"{numbers['source']}; trained: {numbers['trained']}, {numbers['d']:,} parameters; V = {numbers['V']:,}, "
        f"{numbers['steps']} steps of {batch_size} sentences, {numbers['streams']} streams of directions. The l2 "
        f"distance between ZO and FO beliefs after all steps falls with slope "
        f"{format_interval(numbers['pooled_slope'])}; at P = {largest} it is "
        + " and ".join(f"{format_interval(gap)} ({name})" for name, gap in gaps_at(numbers["rows"], largest).items())
        + " of what FO training changed."
    )


def _verdicts(numbers: dict[str, Any], counts: Sequence[int], *, small: bool) -> list[Verdict]:
    largest, streams = _largest_count(numbers["rows"]), numbers["streams"]
    return [
        judge_root(numbers["pooled_slope"], streams, (min(counts), max(counts))),
        judge_fifty(gaps_at(numbers["rows"], largest), largest, streams, small=small),
        judge_distributions(
            numbers["distance_gaussian_over_rademacher"],
            numbers["distance_between_distributions_over_within"][str(counts[-1])],
            numbers["distance_between_distributions_over_change_at_largest_P"],
            counts[-1],
            streams,
        ),
    ]


def judge_root(slope: Interval, streams: int, span: tuple[int, int]) -> Verdict:
    """Judge Fig. 5: the slope of the distance against P is -1/2 up to 0.15."""
    return Verdict(
        "The difference of beliefs tends to zero as P grows, as the inverse root (Fig. 5).",
        within(slope, -0.65, -0.35),
        f"Log-log slope {format_interval(slope)} (95%, {streams} streams, mean of both distributions) over P = "
        f"{span[0]}..{span[1]}; required: within 0.15 of -0.5.",
        id="entk-beliefs-root-p",
    )


def judge_fifty(gaps: dict[str, Interval], count: int, streams: int, *, small: bool = False) -> Verdict:
    """Judge Fig. 4: the gap at P = 50 is below a fifth of the change (holds) or a half of it (under conditions)."""
    return Verdict(
        "P = 50 effectively mimics first-order training (Fig. 4).",
        NOT_RUN if small else worst(graded(gap, 0.2, 0.5) for gap in gaps.values()),
        f"The gap at P = {count} over the change by FO training is "
        + " and ".join(f"{format_interval(gap)} ({name})" for name, gap in gaps.items())
        + f" (95%, {streams} streams); required: below 0.2, or under conditions below 0.5.",
        id="entk-p50",
    )


def judge_distributions(ratio: Interval, across: Interval, gap: Interval, count: int, streams: int) -> Verdict:
    """Judge whether trajectories agree: in distribution (equal distances up to 25%), and one by one (a fifth apart)."""
    return Verdict(
        "Gaussian and Rademacher trajectories agree (Fig. 4, 5).",
        combined([within(ratio, 0.8, 1.25), within(across, 0.8, 1.25), below(gap, 0.2)]),
        f"Distance to FO, Gaussian over Rademacher: {format_interval(ratio)}; required: within 0.8 to 1.25. At P = "
        f"{count} two trajectories of different distributions are {format_interval(across)} times as far apart as two "
        f"of the same one (required: the same), and {format_interval(gap)} of the change apart (required: below 0.2); "
        f"{streams} streams.",
        id="entk-laws-of-trajectories",
    )


def rms_slope(table: list[dict[str, Any]], distributions: Sequence[str]) -> Interval:
    """Return the log-log slope of the rms final distance against P, mean of the distributions, by the jackknife."""
    parts = [[row for row in table if row["distribution"] == name] for name in distributions]

    def fit(keep: Sequence[int]) -> float:
        squares = [[np.square(np.array(row["final_l2_by_stream"])[keep]).mean() for row in part] for part in parts]
        slopes = [
            log_slope([row["P"] for row in part], np.sqrt(square)) for part, square in zip(parts, squares, strict=True)
        ]
        return float(np.mean(slopes))

    streams = list(range(len(parts[0][0]["final_l2_by_stream"])))
    return jackknife(fit(streams), [fit(streams[:n] + streams[n + 1 :]) for n in streams])


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
    observed: Any,
    *,
    lr: float,
    count: int | None = None,
    distribution: str = "gaussian",
    eps: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """Return beliefs over the whole vocabulary at the observed sentences, (steps + 1, sentences, V).

    Args:
        tail: The model; a copy is trained.
        batches: One cached batch per step.
        targets: Their target tokens.
        observed: The cached sentences to observe.
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
            return net(observed).softmax(-1)

    path = [beliefs()]
    for batch, target in zip(batches, targets, strict=True):
        if count is None:
            optimizer.zero_grad()
            F.cross_entropy(net(batch), target).backward()
            optimizer.step()
        else:
            optimizer.step(partial(_loss, net, batch, target))
        path.append(beliefs())
    return torch.stack(path)


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
