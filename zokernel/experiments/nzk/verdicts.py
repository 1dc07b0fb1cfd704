"""What a study says about the paper's two headline claims, with the numbers that decide."""

from __future__ import annotations

import math
from typing import Any

from zokernel.dynamics.drift import DriftRow
from zokernel.experiments.base import Verdict
from zokernel.experiments.criteria import (
    FAILS,
    HOLDS,
    Interval,
    below,
    combined,
    format_interval,
    largest_z_by_chance,
    within,
    worst,
)
from zokernel.experiments.nzk.study import Row, Study

CONSTANT = (
    "For linear models the expected NZK stays constant through training and depends on the first and second moments of "
    "the perturbation (NZK, abstract)."
)
FASTER = "A single shared random vector accelerates convergence (NZK, abstract)."
ATTAINED = "The plotted curve is what training with a single shared vector does (NZK, image experiments)."
CONSTANT_ID, FASTER_ID, ATTAINED_ID = "nzk-constant", "nzk-acceleration", "nzk-attainable"


def constancy(
    check: dict[str, float], factors: dict[str, Interval], examples: int, drift: list[DriftRow] | None
) -> Verdict:
    """Judge the constancy of the expected kernel, and whether two moments of the perturbation determine it.

    Args:
        check: z-scores of simulated runs against the closed form of a constant kernel.
        factors: Sampled factors of two distributions of equal mean and variance.
        examples: Number of predictions that were compared, at three steps.
        drift: How the real network's kernel moved, if there is one.

    Returns:
        The verdict.
    """
    z = max(check["mean_z_max"], check["second_moment_z_max"])
    bound = largest_z_by_chance(6 * examples, 0.001) + 1  # squared residuals of a few thousand runs have heavy tails
    (first, second), names = factors.values(), " and ".join(factors)
    parts = [HOLDS if z < bound else FAILS, equal_factors(first, second)]
    reason = (
        f"Mean and second moment of {check['runs']:.0f} simulated runs are on the constant-kernel closed form (largest "
        f"|z| {z:.2f}, required: below {bound:.2f}). Sampled factors of the shared vector for {names}, of equal mean "
        f"and variance: {format_interval(first)} and {format_interval(second)}; two moments suffice if they are "
        "equal to 5%."
    )
    if drift:
        last = drift[-1]
        parts.append(HOLDS if last.relative_change < 0.1 else FAILS)
        reason += (
            f" The kernel of the network that was linearised has changed by {100 * last.relative_change:.1f}% after "
            f"{last.step:,} gradient steps (constant: below 10%; cosine {last.alignment:.3f}; loss {last.loss:.4g}; "
            f"linear model {last.predicted_loss:.4g})."
        )
    return Verdict(CONSTANT, combined(parts), reason, id=CONSTANT_ID)


def equal_factors(first: Interval, second: Interval) -> str:
    """Return whether two factors are equal to 5%, by the interval of their ratio."""
    logs = [[math.log(value) for value in factor] for factor in (first, second)]
    half = math.hypot(*((high - low) / 2 for _, low, high in logs))
    centre = logs[1][0] - logs[0][0]
    return within((math.exp(centre), math.exp(centre - half), math.exp(centre + half)), 0.95, 1.05)


def attainability(by_rate: dict[str, dict[str, Any]]) -> Verdict:
    """Judge the plotted curve: real runs end on it to a tenth (the median), and none in a hundred ends above its start.

    Args:
        by_rate: By learning rate, see :func:`zokernel.experiments.nzk.record.attainment`.
    """
    parts, texts = [], []
    for name, run in by_rate.items():
        median, share_risen = run["median_loss_over_mean_path"], run["share_of_runs_above_their_start"]
        parts.append(worst([within(median, 0.9, 1.1), below(share_risen, 0.01)]))
        texts.append(
            f"at the rate of the {name}, {run['lr']:g}, after {run['steps']:,} steps of {run['runs']} runs the median "
            f"loss is {short(median)} times that of the plotted mean path, and {100 * share_risen[0]:.1f}% "
            f"[{100 * share_risen[1]:.1f}, {100 * share_risen[2]:.1f}] of the runs are above their start"
        )
    text = "; ".join(texts)
    return Verdict(
        ATTAINED,
        combined(parts),
        f"{text[0].upper()}{text[1:]}. Required: 0.9 to 1.1, and below 1%.",
        id=ATTAINED_ID,
    )


def short(value: Interval) -> str:
    """Return an interval of any magnitude as text."""
    mean, low, high = value
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def acceleration(study: Study) -> Verdict:
    """Judge the acceleration by a single shared vector.

    Args:
        study: What was computed.

    Returns:
        The verdict: what remains once the learning rate is matched.
    """
    equal, matched, distance, best = (
        (study.row(rule, "zo_sgd"), study.row(rule, "shared"))
        for rule in ("equal_lr", "equal_effective_lr", "equal_distance", "best_lr")
    )
    factor = matched[0].effective_lr / matched[1].lr
    reason = (
        f"At one learning rate its mean kernel is {factor:.4g} times the NTK: {_ratio(equal)}. "
        f"At equal effective learning rate {_ratio(matched)}; at half of each stability limit {_ratio(distance)}; "
        f"at each one's best learning rate {_ratio(best)}."
    )
    two_vectors = study.row("best_lr", "independent")
    if two_vectors.steps is not None and best[1].steps is not None:
        reason += (
            f" Two independent vectors, the paper's other kernel, need {two_vectors.steps:,} steps at their best "
            f"learning rate ({two_vectors.steps / best[1].steps:.3g} times the shared vector's)."
        )
    pairs = (matched, distance, best)
    verdict = combined(fewer_steps(shared.steps, zo.steps) for zo, shared in pairs)
    return Verdict(FASTER, verdict, reason, id=FASTER_ID)


def fewer_steps(shared: int | None, zo: int | None) -> str:
    """Return whether the shared vector reaches the target in fewer steps; None where a method never does."""
    return HOLDS if shared is not None and (zo is None or shared < zo) else FAILS


def _ratio(pair: tuple[Row, Row]) -> str:
    zo, shared = pair
    if shared.steps is None or zo.steps is None:
        return "the expected loss does not reach the target" + (" (unstable)" if shared.lr >= shared.limit else "")
    return f"{shared.steps:,} steps where ZO-SGD takes {zo.steps:,} ({shared.steps / zo.steps:.3g} times)"
