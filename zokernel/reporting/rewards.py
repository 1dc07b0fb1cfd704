"""The rewards of a population, step by step: quantiles of its members, and their picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zokernel.readable import plural
from zokernel.reporting.page import Picture
from zokernel.reporting.series import band_look, look
from zokernel.reporting.svg import draw

QUANTILES = {"least": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "most": 1.0}
Band = dict[str, float | None]


def band(losses: Sequence[float]) -> Band:
    """Return the least, the quartiles and the most of the rewards of a step's members; each is minus a loss.

    Args:
        losses: Of every member; those that are not finite are left out.

    Example:
        >>> band([-1.0, -0.0, -0.5])
        {'least': 0.0, 'lower': 0.25, 'median': 0.5, 'upper': 0.75, 'most': 1.0}
    """
    rewards = [0.0 - loss for loss in losses if math.isfinite(loss)]
    return {name: float(np.quantile(rewards, at)) if rewards else None for name, at in QUANTILES.items()}


def is_rewarded(metrics: dict[str, Any], run: dict[str, Any]) -> bool:
    """Say whether a run is one on rewards, from its ``metrics.json`` or, before that is there, its ``run.json``."""
    settings = run.get("settings")
    noted = settings.get("objective") if isinstance(settings, dict) else None
    return (metrics.get("objective") or noted) == "reward"


def reward_picture(
    x: Sequence[float],
    bands: Sequence[Band],
    *,
    label: str,
    validation: Sequence[tuple[float, float]],
    test: Sequence[tuple[float, float]],
    test_name: str = "test",
) -> Picture:
    """Draw the spread of the members' rewards over a run.

    Args:
        x: Where each step is: its number, or the forward passes so far.
        bands: Quantiles of each step.
        label: What ``x`` is.
        validation: Rewards of greedy answers to the validation prompts, with where they were taken.
        test: Those to the held-out prompts before and after, likewise.
        test_name: What these prompts are.
    """
    at = np.array(x, dtype=float)
    value = {
        name: np.array([math.nan if row[name] is None else row[name] for row in bands], dtype=float)
        for name in QUANTILES
    }

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.fill_between(at, value["least"], value["most"], label="all members", **band_look("all"))
        axes.fill_between(at, value["lower"], value["upper"], label="half of them", **band_look("half"))
        axes.plot(at, value["median"], label="median member", **look("median"))
        if validation:
            axes.plot(*zip(*validation, strict=True), label="validation", **look("validation"))
        if test:
            axes.plot(*zip(*test, strict=True), label=f"{test_name}, before and after", **look("test"))
        axes.set(xlabel=label, ylabel="reward")

    medians = value["median"][np.isfinite(value["median"])]
    ends = f", from {medians[0]:.3g} to {medians[-1]:.3g} at the median" if len(medians) else ""
    return draw(
        paint,
        "rewards",
        title="Rewards of the population",
        alt=f"Rewards of the members over {plural(len(bands), 'step')}{ends}.",
        caption="Members differ by their weights; each answered the prompts of the step. Circles and diamonds are "
        "greedy answers to other prompts. A band of no width says nothing about which way to go.",
    )


def describe_rewards(metrics: dict[str, Any], examples: str) -> str:
    """Return how the reward on held-out prompts changed, as a sentence.

    Args:
        metrics: The content of ``metrics.json``.
        examples: What the prompts are.
    """
    before, after = metrics["before"], metrics["after"]
    sentence = f"The mean reward on {examples} went from {before['reward']:.3f} to {after['reward']:.3f}"
    errors = [scores.get("reward_error") for scores in (before, after)]
    if None not in errors:
        sentence += f" (standard errors {errors[0]:.3f} and {errors[1]:.3f})"
    if "pass_rate" in before and "pass_rate" in after:
        sentence += (
            f", and the share that passes from {100 * before['pass_rate']:.1f}% to {100 * after['pass_rate']:.1f}%"
        )
    if "kl" in after:
        sentence += f"; the answers are {after['kl']:.3g} nats per token from the starting weights"
    return f"{sentence}."
