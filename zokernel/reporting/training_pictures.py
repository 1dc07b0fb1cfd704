"""The figures of a training run: rewards, loss, score and projected gradient, with what was predicted for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zokernel.readable import plural
from zokernel.reporting.page import Picture
from zokernel.reporting.rewards import is_rewarded, reward_picture
from zokernel.reporting.series import band_look, look
from zokernel.reporting.svg import draw
from zokernel.reporting.training import TrainingRun
from zokernel.reporting.training_text import SHARES, loss_ends, score_name

MOST_POINTS = 1000  # of a series, so that a page stays small
WIDE_RANGE = 50.0  # largest over smallest value from which an axis is logarithmic


def pictures(run: TrainingRun) -> list[Picture]:
    """Draw what a run has recorded."""
    axis = "forwards" if run.rows and "forwards" in run.rows[-1] else "step"
    rows = [row for row in run.rows if axis in row]
    if not rows:
        return []
    label = "forward passes" if axis == "forwards" else "step"
    drawings = [_reward_picture(run, rows, label, axis)] if run.rewards else []
    drawings.append(_loss_picture(run, rows, label, axis))
    drawings += [_score_picture(run, name, label, axis) for name in _scores(run, axis)]
    if any(row.get("projected_gradient") for row in rows):
        drawings.append(_gradient_picture(run, rows, label, axis))
    return drawings


def _scores(run: TrainingRun, axis: str) -> list[str]:
    """Return the scores to draw: the one that the task is judged by, and of rewards the share that passes."""
    recorded = {name for row in run.evaluations if axis in row for name in row}
    main_score = run.metrics.get("metric") or next(
        (n for n in ("accuracy", "f1", "em", "perplexity") if n in recorded), ""
    )
    return [name for name in (main_score, "pass_rate") if name in recorded and name != "reward"]


def _reward_picture(run: TrainingRun, rows: list[dict[str, float]], label: str, axis: str) -> Picture:
    steps = _thinned([row for row in rows if int(row["step"]) in run.rewards])
    return reward_picture(
        [row[axis] for row in steps],
        [run.rewards[int(row["step"])] for row in steps],
        label=label,
        validation=[(row[axis], row["reward"]) for row in run.evaluations if "reward" in row and axis in row],
        test=_ends(run, "reward", axis),
        test_name=_test_name(run),
    )


def _test_name(run: TrainingRun) -> str:
    """Return what the examples are that were scored before and after."""
    return "validation" if run.metrics.get("test_is_validation") else "test"


def _ends(run: TrainingRun, name: str, axis: str) -> list[tuple[float, float]]:
    """Return a score of the test examples before and after, where it was taken."""
    if not run.metrics or not all(name in run.metrics[when] for when in ("before", "after")):
        return []
    last = run.metrics["forwards"] if axis == "forwards" else run.metrics["steps"]
    return [(0, run.metrics["before"][name]), (last, run.metrics["after"][name])]


def _thinned(rows: list[Any]) -> list[Any]:
    """Return every n-th row, and the last, so that a figure has not too many points."""
    interval = math.ceil(len(rows) / MOST_POINTS) or 1
    return rows[::-interval][::-1]


def _dots(count: int) -> float:
    """Return the size of the dots of so many steps."""
    return 8.0 if count <= 60 else 6.0 if count <= 300 else 4.0


def _loss_picture(run: TrainingRun, rows: list[dict[str, float]], label: str, axis: str) -> Picture:
    smoothed = smooth(np.array([row["loss"] for row in rows], dtype=float))
    points = _thinned([(row[axis], row["loss"], mean) for row, mean in zip(rows, smoothed, strict=True)])
    x, loss, mean = np.array(points, dtype=float).T
    evaluations = [row for row in run.evaluations if "loss" in row and axis in row]
    ends = _ends(run, "loss", axis)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(x, loss, markersize=_dots(len(x)), label="training batches", **look("batches"))
        axes.plot(x, mean, label="their moving average", **look("training"))
        if evaluations:
            axes.plot(
                [r[axis] for r in evaluations],
                [r["loss"] for r in evaluations],
                label="validation",
                **look("validation"),
            )
        if ends:
            axes.plot(*zip(*ends, strict=True), label=f"{_test_name(run)}, before and after", **look("test"))
        if run.prediction:
            _add_prediction(axes, run, rows[-1], x[-1])
        rewarded = is_rewarded(run.metrics, run.run)
        axes.set(xlabel=label, ylabel="loss (negative reward)" if rewarded else "loss (nats)")
        visible = [*loss[np.isfinite(loss)], *(row["loss"] for row in evaluations), *(value for _, value in ends)]
        _scale(axes, visible)

    start, end = loss_ends(rows)
    return draw(
        paint,
        "loss",
        title="Loss",
        alt=f"Training loss over {plural(len(rows), 'step')}, from {start:.3g} at the beginning to {end:.3g} at the "
        "end.",
        caption="Batches differ far more than steps improve: judge by the line and the circles.",
    )


def _scale(axes: Any, values: list[float]) -> None:
    """Make the axis of values logarithmic if they are of many sizes; else let it begin at zero if they come near."""
    least, most = min(values, default=0.0), max(values, default=0.0)
    if least > 0 and most > WIDE_RANGE * least:
        axes.set_yscale("log")
    elif 0 <= least < 0.5 * most:
        axes.set_ylim(bottom=0.0)


def _add_prediction(axes: Any, run: TrainingRun, last: dict[str, float], end: float) -> None:
    scale = end / last["step"] if last["step"] else 1.0
    steps = np.array(run.prediction["step"], dtype=float)
    in_range = steps <= last["step"]
    low, high, expected = (
        np.array([math.nan if v is None else v for v in run.prediction[key]], dtype=float)[in_range]
        for key in ("band_low", "band_high", "expected_loss")
    )
    at = steps[in_range] * scale
    axes.fill_between(at, low, high, label="90% of runs, predicted", **band_look("predicted band"))
    axes.plot(at, expected, label="predicted (zokernel evolve)", **look("predicted"))


def _score_picture(run: TrainingRun, name: str, label: str, axis: str) -> Picture:
    evaluations = [row for row in run.evaluations if name in row and axis in row]
    share, title = name in SHARES, score_name(name)[0].upper() + score_name(name)[1:]
    scale = 100 if share else 1
    ends = _ends(run, name, axis)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        values = [scale * row[name] for row in evaluations]
        axes.plot([row[axis] for row in evaluations], values, label="validation", **look("validation"))
        if ends:
            places = [(at, scale * value) for at, value in ends]
            axes.plot(*zip(*places, strict=True), label=f"{_test_name(run)}, before and after", **look("test"))
        axes.set(xlabel=label, ylabel=f"{score_name(name)} (%)" if share else score_name(name))
        if share:
            axes.set_ylim(-2, 102)

    values = ", ".join(f"{100 * row[name]:.1f}%" if share else f"{row[name]:.4g}" for row in evaluations)
    alt = f"{title} on validation examples during training: {values}."
    caption = f"Circles: validation; diamonds: {_test_name(run)} before and after." if ends else ""
    return draw(paint, name.replace("_", "-"), title=title, alt=alt, caption=caption)


def _gradient_picture(run: TrainingRun, rows: list[dict[str, float]], label: str, axis: str) -> Picture:
    values = np.array([row.get("projected_gradient") or math.nan for row in rows], dtype=float)
    values[values <= 0] = math.nan  # equal losses, which a logarithmic axis has no place for
    smoothed = np.sqrt(smooth(values**2))
    x, dots, line = np.array(_thinned(list(zip((r[axis] for r in rows), values, smoothed, strict=True))), dtype=float).T

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(x, dots, markersize=_dots(len(x)), label="each step", **look("batches"))
        axes.plot(x, line, label="moving rms", **look("training"))
        if run.slope is not None:
            value, error = run.slope
            if math.isfinite(error):
                axes.axhspan(value - 2 * error, value + 2 * error, color=look("predicted")["color"], alpha=0.15)
            place = {"color": look("predicted")["color"], "linestyle": look("predicted")["linestyle"]}
            axes.axhline(value, label="rms slope, predicted by the plan", **place)
        axes.set(xlabel=label, ylabel="projected gradient")
        _scale(axes, [*dots[np.isfinite(dots)], *([run.slope[0]] if run.slope else [])])

    alt = f"Projected gradient at each step: {np.nanmedian(values):.3g} at the median."
    caption = (
        "The rms over many steps is the norm of a batch's gradient; a sudden rise is the first sign of divergence."
    )
    return draw(paint, "gradient", title="Projected gradient", alt=alt, caption=caption)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average over a twentieth of the run (three steps at least), without what is not finite.

    Args:
        values: (T,) numbers.

    Returns:
        (T,) averages.

    Example:
        >>> smooth(np.array([0.0, 3.0, 0.0, math.nan]))
        array([1.5, 1. , 1.5, 0. ])
    """
    ones = np.ones(min(len(values), max(3, len(values) // 20)))
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), ones, mode="same")
    count = np.convolve(finite.astype(float), ones, mode="same")
    return np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0.5)
