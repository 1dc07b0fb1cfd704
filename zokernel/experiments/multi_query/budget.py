"""The "multi-query paradox" (arXiv:2509.15552): directions per step at a fixed number of forward passes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zokernel.estimators import Estimator, OneSided, TwoPoint
from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import above, below, combined, interval
from zokernel.experiments.multi_query.runs import EPS, Problem, Quadratic, Softmax, aligned_coefficients, train
from zokernel.figures import PALETTE, figures

MULTIPLES = [2.0 ** (k / 2) for k in range(-5, 3)]
"""Rates of the sweep per direction, times the trace of the Hessian: a step along P directions takes P times as much."""
SCHEMES = ("two-point", "one-sided", "aligned")
AVERAGE = "For the average, more than one query per step is always query-inefficient (arXiv:2509.15552, abstract)."
ALIGN = "Projection alignment performs better with more queries per step (arXiv:2509.15552, abstract)."


@experiment("multi_query/budget", "The multi-query paradox: directions per step at a fixed number of forward passes")
def run(config: Config) -> Result:
    """Compare numbers of directions, at one rate, at one rate per direction, and at each one's best rate."""
    counts = config.pick("directions", smoke=(1, 4, 16), cpu=(1, 2, 4, 8, 16))
    seeds = config.pick("seeds", smoke=4, cpu=12)
    large = config.pick("dimension", smoke=200, cpu=500)
    forwards = config.pick("forwards", smoke=600, cpu=3000)
    problems: list[tuple[Problem, int, int]] = [
        (Quadratic("small quadratic", np.ones(20)), 128, 10 * seeds),
        (Quadratic("large quadratic", np.ones(large)), forwards, seeds),
        (Quadratic("power-law quadratic", 1 / np.arange(1.0, large + 1)), forwards, seeds),
        (Softmax.make("softmax regression", features=large // 10), forwards, seeds),
    ]
    rows = [
        row
        for problem, budget, runs in problems
        for scheme in SCHEMES
        for row in compare(problem, scheme, counts, forwards=budget, seeds=runs, seed=config.seed)
    ]
    distances = distance_table(config.pick("dimensions", smoke=(100, 1000, 10_000), cpu=(100, 1000, 10_000, 100_000)))
    verdicts = [judge_average(rows), judge_alignment(rows, distances)]
    return Result(
        summary=" ".join(verdict.reason for verdict in verdicts),
        numbers={"rows": rows, "distances": distances, "multiples": MULTIPLES},
        figures={"budget": draw_figure(rows)},
        verdicts=verdicts,
    )


def compare(
    problem: Problem, scheme: str, counts: tuple[int, ...], *, forwards: int, seeds: int, seed: int
) -> list[dict[str, Any]]:
    """Return a row per number of directions: how much further a run gets than with one direction per step.

    Args:
        problem: What to minimise.
        scheme: One of ``SCHEMES``.
        counts: Directions per step, one first.
        forwards: Forward passes of a run.
        seeds: Runs of each.
        seed: Seed of all of them.

    Returns:
        The rows.  A ratio is that of the logarithms of what the loss has fallen by, with its 95% interval.
    """
    rows: list[dict[str, Any]] = []
    dim, single_rate, single_best, baseline = len(problem.start), 0.0, 0, np.zeros(seeds)
    for count in counts:
        make: type[OneSided] | type[TwoPoint] = OneSided if scheme == "one-sided" else TwoPoint
        estimator: Estimator = make(EPS, count)
        # An aligned estimate is P / d times the average where d is large, so one nominal rate suits every P.
        unit = (dim if scheme == "aligned" else count) / problem.trace
        rates = [multiple * unit for multiple in MULTIPLES] + ([single_rate] if rows else [])
        aligns = scheme == "aligned"
        decreases = train(problem, estimator, rates, forwards=forwards, seeds=seeds, seed=seed, align=aligns)
        best = int(np.argmax(decreases[: len(MULTIPLES)].mean(axis=1)))
        if not rows:
            single_rate, single_best, baseline = rates[best], best, decreases[best]
        rows.append(
            {
                "problem": problem.name,
                "d": dim,
                "scheme": scheme,
                "P": count,
                "forwards": forwards,
                "steps": forwards // estimator.forwards_at(0),
                "best_rate_per_direction": MULTIPLES[best],
                "fallen": float(decreases[best].mean()),
                "best": interval(decreases[best] / baseline),
                "equal_rate_per_direction": interval(decreases[single_best] / baseline),
                "equal_rate": interval(decreases[-1 if rows else best] / baseline),
                "predicted": predicted(problem, scheme, count),
            }
        )
    return rows


def predicted(problem: Problem, scheme: str, count: int) -> float | None:
    r"""Return the ratio that theory gives for equal curvatures, at the best rate of each; None for other losses.

    A step multiplies the expected loss by :math:`1 - P/(d+P-1)`, or aligned by :math:`1 - P/d`.
    """
    if not isinstance(problem, Quadratic) or np.ptp(problem.curvature) > 0:
        return None
    dim = len(problem.curvature)
    if scheme == "aligned":
        return math.log1p(-count / dim) / math.log1p(-1 / dim) / count if count < dim else math.inf
    per_step = math.log1p(-count / (dim + count - 1)) / math.log1p(-1 / dim)
    return per_step * (2 / (count + 1) if scheme == "one-sided" else 1 / count)


def distance_table(dimensions: tuple[int, ...], count: int = 8, draws: int = 20) -> list[dict[str, float]]:
    r"""Return how far the aligned estimate is from :math:`P/d` times the average, relative to it.

    For Rademacher directions the root mean square is :math:`\sqrt{(P-1)/d}` to leading order.
    """
    rows = []
    for dim in dimensions:
        generator = np.random.default_rng(dim)
        errors = []
        for _ in range(draws):
            z = generator.integers(0, 2, (count, 1, dim), dtype=np.int8) * 2.0 - 1.0
            average = z[:, 0] @ generator.normal(size=dim) / count
            exact, scaled = aligned_coefficients(average[None], z)[0], count / dim * average
            difference, reference = ((c @ z[:, 0]) for c in (exact - scaled, scaled))
            errors.append(float(difference @ difference) / float(reference @ reference))
        expected = math.sqrt((count - 1) / dim)
        rows.append({"d": dim, "P": count, "distance": math.sqrt(np.mean(errors)), "predicted": expected})
    return rows


def judge_average(rows: list[dict[str, Any]]) -> Verdict:
    """Judge by the 95% intervals of all averages of several directions, at each one's best rate."""
    several = [row for row in rows if row["P"] > 1 and row["scheme"] != "aligned"]
    two_point, one_sided = (
        [row for row in several if row["scheme"] == scheme and row["P"] == 16] for scheme in ("two-point", "one-sided")
    )
    naive = [row["equal_rate"][0] for row in two_point]
    reason = (
        f"At one nominal rate 16 directions get {min(naive):.2f} to {max(naive):.2f} times as far as one with the same "
        f"forwards. Each at its best rate, two losses per direction: {format_ratios(two_point)}; with a shared base "
        f"loss (P + 1 forwards): {format_ratios(one_sided)}."
    )
    return Verdict(AVERAGE, combined(below(row["best"], 1.0) for row in several), reason, id="multi-query-average")


def judge_alignment(rows: list[dict[str, Any]], distances: list[dict[str, float]]) -> Verdict:
    """Judge by the 95% intervals of all aligned estimates from several directions, at each one's best rate."""
    several = [row for row in rows if row["P"] > 1 and row["scheme"] == "aligned"]
    largest = distances[-1]
    reason = (
        f"Aligned, the progress of 16 directions over that of one, each at its best rate: "
        f"{format_ratios([row for row in several if row['P'] == 16])}. The aligned estimate is P/d times the average "
        f"up to {largest['distance']:.2g} (predicted {largest['predicted']:.2g}) of its length at "
        f"d = {largest['d']:,}, P = {largest['P']}: it differs only where P is not small beside d."
    )
    return Verdict(ALIGN, combined(above(row["best"], 1.0) for row in several), reason, id="multi-query-align")


def format_ratios(rows: list[dict[str, Any]]) -> str:
    """Return the ratios at the best rates with their intervals, by problem."""
    return ", ".join(
        f"{row['problem']} {row['best'][0]:.3f} [{row['best'][1]:.3f}, {row['best'][2]:.3f}]" for row in rows
    )


def draw_figure(rows: list[dict[str, Any]]):
    """Draw the ratios against the number of directions, a panel for each way of estimating."""
    with figures() as Figure:
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        names = list(dict.fromkeys(row["problem"] for row in rows))
        for axis, scheme in zip(figure.subplots(1, 3, sharey=True), SCHEMES, strict=True):
            for name, color in zip(names, PALETTE, strict=False):
                points = [row for row in rows if row["problem"] == name and row["scheme"] == scheme]
                mean, low, high = (np.array([row["best"][k] for row in points]) for k in range(3))
                label = f"{name}, d = {points[0]['d']}"
                directions = [row["P"] for row in points]
                axis.errorbar(directions, mean, [mean - low, high - mean], fmt="o-", color=color, label=label)
                naive = [row["equal_rate"][0] for row in points]
                axis.plot(directions, naive, ":", color=color)
            axis.axhline(1.0, color="0.6", linewidth=0.8)
            axis.set(xscale="log", ylim=(0, 2.5), xlabel="directions per step", title=scheme)
            axis.set_xticks(directions, [str(count) for count in directions])
            axis.tick_params(axis="x", which="minor", bottom=False)
        figure.get_axes()[0].set_ylabel("progress over that of one direction")
        title = "each at its best rate (dotted: all at one rate)"
        figure.get_axes()[0].legend(fontsize=7, title=title, title_fontsize=7, loc="upper left")
    return figure
