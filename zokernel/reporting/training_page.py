"""The page of a training run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from zokernel.figures import PALETTE
from zokernel.finetune.report.told import diagnosis_told, examples_told, weights_told
from zokernel.reporting.page import Page, Picture, Section, Table, table_of_rows, words
from zokernel.reporting.plan_page import plan_section
from zokernel.reporting.rewards import is_rewarded, reward_picture, rewards_told
from zokernel.reporting.svg import draw
from zokernel.reporting.training import TrainingRun, find_plan, read_training

SHOWN_STEPS = 200


def read_finetune(folder: Path) -> Page:
    """Return the page of a training run, finished or not.

    Args:
        folder: Its ``output_dir``.
    """
    run = read_training(folder)
    sections = [Section("Training", "training", pictures=pictures(run))] if run.rows else []
    if run.metrics:
        sections.append(Section("Numbers", "numbers", tables=[_numbers(run.metrics)]))
    tables = [table_of_rows("Validation during training", run.evaluations)] if run.evaluations else []
    if run.rows:
        tables.append(_steps(run.rows))
    if tables:
        sections.append(Section("Steps", "steps", tables=tables))
    plan = find_plan(folder)
    if plan is not None:
        sections.insert(1, plan_section(plan))
    versions = run.metrics.get("versions", {})
    return Page(
        title=_title(run),
        kind="finetune",
        summary=summary(run),
        facts=facts(run),
        sections=sections,
        command=command(run),
        made_with=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _title(run: TrainingRun) -> str:
    if run.metrics:
        model = Path(run.metrics["model"]).name if Path(run.metrics["model"]).is_absolute() else run.metrics["model"]
        return f"Fine-tuning {model} with {run.metrics['method']}" if run.metrics["steps"] else f"{model} as it is"
    return f"Training with {run.method or 'zokernel'}, {len(run.rows):,} steps so far"


def command(run: TrainingRun) -> str:
    """Return the command line that repeats the run, as far as its folder says."""
    import shlex

    if run.metrics:
        return str(run.metrics.get("command", ""))
    words_ = run.run.get("command", [])
    return shlex.join(["zokernel", *words_]) if words_ else ""


def summary(run: TrainingRun) -> list[str]:
    """Return what happened, in plain words."""
    metrics = run.metrics
    if not metrics:
        if not run.rows:
            return ["The run has begun and not finished a step yet."]
        return [
            f"{len(run.rows):,} steps so far. The loss went from {_mean_loss(run.rows[:20]):.4g} (first steps) to "
            f"{_mean_loss(run.rows[-20:]):.4g} (last steps)."
        ]
    before, after, count = metrics["before"], metrics["after"], metrics["num_test"]
    paragraphs = []
    if not metrics["steps"]:
        rewarded = metrics.get("metric") == "reward"
        told = {words(name): value for name, value in after.items() if name != "loss"}
        found = ", ".join(f"{n} {v:.3f}" if rewarded else f"{n} {100 * v:.1f}%" for n, v in told.items())
        return [f"No step was taken. On {examples_told(metrics)}: {found}, loss {after['loss']:.4g}."]
    if metrics.get("forwards_per_step"):
        paragraphs.append(
            f"Each step ran the model {metrics['forwards_per_step']} times on one batch with slightly different "
            "weights, compared the losses, and moved the weights along the random directions that had been tried. No "
            "gradient was computed and no activation was kept."
        )
    else:
        paragraphs.append("Each step computed the gradient by backpropagation (a first-order baseline).")
    if metrics.get("metric") == "reward":
        paragraphs.append(rewards_told(metrics, examples_told(metrics)))
        scores = []
    else:
        scores = [name for name in after if name != "loss" and isinstance(after[name], (int, float)) and name in before]
    for name in scores:
        gain = 100 * (after[name] - before[name])
        text = f"{words(name).capitalize()} on {examples_told(metrics)} went from {100 * before[name]:.1f}% to "
        text += f"{100 * after[name]:.1f}%: {gain:+.1f} points"
        if name == "accuracy":
            error = 100 * math.sqrt(sum(s * (1 - s) for s in (before[name], after[name])) / count)
            text += f", with a standard error of at most {error:.1f}"
        paragraphs.append(text + ".")
    paragraphs.append(weights_told(metrics))
    reasons = (metrics.get("diagnosis") or {}).get("reasons", [])
    paragraphs += [told for told in (diagnosis_told(metrics), *reasons) if told]
    if metrics.get("test_is_validation"):
        paragraphs.append("These examples also chose the checkpoint, so the second number is somewhat optimistic.")
    return paragraphs


def facts(run: TrainingRun) -> list[tuple[str, str]]:
    """Return the few numbers that matter most."""
    metrics = run.metrics
    if not metrics:
        last = run.rows[-1] if run.rows else {}
        return [("steps", f"{len(run.rows):,}"), ("last loss", f"{last.get('loss', math.nan):.4g}")]
    if not metrics["steps"]:
        return [("loss", f"{metrics['after']['loss']:.3f}"), ("examples", f"{metrics['num_test']:,}")]
    found = [
        ("parameters trained", f"{metrics['num_trained']:,}"),
        ("loss", f"{metrics['before']['loss']:.3f} → {metrics['after']['loss']:.3f}"),
        ("steps", f"{metrics['steps']:,}"),
        ("forward passes", f"{metrics['forwards']:,}"),
        ("training time", f"{metrics['train_seconds']:.0f} s"),
    ]
    if metrics.get("metric") == "reward":
        before, after = metrics["before"]["reward"], metrics["after"]["reward"]
        found.insert(0, ("reward", f"{before:.3f} → {after:.3f}"))
    if "accuracy" in metrics["after"]:
        before, after = metrics["before"]["accuracy"], metrics["after"]["accuracy"]
        found.insert(0, ("accuracy", f"{100 * before:.1f} → {100 * after:.1f}%"))
    inference, training = metrics.get("peak_memory_inference"), metrics.get("peak_memory_training")
    if inference and training:
        found.append(("memory over inference", f"{training / inference:.2f} ×"))
    return found


def _numbers(metrics: dict[str, Any]) -> Table:
    hidden = {"evaluations", "command", "versions", "before", "after", "diagnosis"}
    rows = [{"quantity": words(key), "value": value} for key, value in metrics.items() if key not in hidden]
    rows += [
        {"quantity": f"{words(name)} {when} training", "value": value}
        for when in ("before", "after")
        for name, value in metrics[when].items()
    ]
    return table_of_rows("Everything measured", rows)


def _steps(rows: list[dict[str, float]]) -> Table:
    every = math.ceil(len(rows) / SHOWN_STEPS)
    note = "" if every == 1 else f"Every {every}th step; all of them are in steps.jsonl."
    return table_of_rows("Steps", rows[::every], note)


def pictures(run: TrainingRun) -> list[Picture]:
    """Draw loss, accuracy and projected gradient, with what was predicted for them."""
    if not run.rows:
        return []
    forwards = "forwards" in run.rows[-1]
    axis = "forwards" if forwards else "step"
    x = np.array([row[axis] for row in run.rows if axis in row], dtype=float)
    rows = [row for row in run.rows if axis in row]
    loss = np.array([row["loss"] for row in rows], dtype=float)
    label = "forward passes" if forwards else "step"
    found = [_reward_picture(run, label, axis)] if run.rewards else []
    found.append(_loss_picture(run, x, loss, label, axis))
    if any("accuracy" in row and axis in row for row in run.evaluations):
        found.append(_accuracy_picture(run, label, axis))
    if any("projected_gradient" in row for row in rows):
        found.append(_gradient_picture(run, rows, x, label))
    return found


def _reward_picture(run: TrainingRun, label: str, axis: str) -> Picture:
    steps = [row for row in run.rows if axis in row and int(row["step"]) in run.rewards]
    last = run.rows[-1][axis]
    test = [(at, run.metrics[when]["reward"]) for at, when in ((0, "before"), (last, "after")) if run.metrics]
    return reward_picture(
        [row[axis] for row in steps],
        [run.rewards[int(row["step"])] for row in steps],
        label=label,
        validation=[(row[axis], row["reward"]) for row in run.evaluations if "reward" in row and axis in row],
        test=test,
    )


def _loss_picture(run: TrainingRun, x: np.ndarray, loss: np.ndarray, label: str, axis: str) -> Picture:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(x, loss, color=PALETTE[0], alpha=0.25, linewidth=0.8, label="training batches")
        axes.plot(x, smooth(loss), color=PALETTE[0], label="training, smoothed")
        known = [row for row in run.evaluations if "loss" in row and axis in row]
        axes.plot(
            [r[axis] for r in known], [r["loss"] for r in known], "o-", color=PALETTE[1], label="validation"
        ) if known else None
        if run.metrics:
            ends = [(0, run.metrics["before"]["loss"]), (x[-1], run.metrics["after"]["loss"])]
            axes.plot(*zip(*ends), "D", color=PALETTE[2], label="test, before and after")
        if run.prediction:
            scale = x[-1] / run.rows[-1]["step"] if run.rows[-1]["step"] else 1.0
            steps = np.array(run.prediction["step"], dtype=float)
            chosen = steps <= run.rows[-1]["step"]
            values = {
                key: np.array([math.nan if v is None else v for v in run.prediction[key]], dtype=float)[chosen]
                for key in ("expected_loss", "band_low", "band_high")
            }
            at = steps[chosen] * scale
            axes.fill_between(at, values["band_low"], values["band_high"], color=PALETTE[3], alpha=0.2, linewidth=0)
            axes.plot(at, values["expected_loss"], "--", color=PALETTE[3], label="predicted (zokernel evolve)")
        rewarded = is_rewarded(run.metrics, run.run)
        axes.set(xlabel=label, ylabel="loss (negative reward)" if rewarded else "loss (nats)")
        if np.nanmin(loss) < 0.5 * np.nanmax(loss):  # near enough to zero to show it
            axes.set_ylim(bottom=min(0.0, float(np.nanmin(loss))))
        axes.legend()

    start, end = _mean_loss(run.rows[:20]), _mean_loss(run.rows[-20:])
    alt = f"Training loss over {len(run.rows):,} steps, from {start:.3g} at the beginning to {end:.3g} at the end."
    return draw(
        paint,
        "loss",
        title="Loss",
        alt=alt,
        caption="Thin: each training batch; thick: its moving average; circles: validation; diamonds: test.",
    )


def _accuracy_picture(run: TrainingRun, label: str, axis: str) -> Picture:
    known = [row for row in run.evaluations if "accuracy" in row and axis in row]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(
            [r[axis] for r in known], [100 * r["accuracy"] for r in known], "o-", color=PALETTE[1], label="validation"
        )
        if run.metrics and "accuracy" in run.metrics["after"]:
            last = run.metrics["forwards"] if axis == "forwards" else run.metrics["steps"]
            ends = [(0, 100 * run.metrics["before"]["accuracy"]), (last, 100 * run.metrics["after"]["accuracy"])]
            axes.plot(*zip(*ends), "D", color=PALETTE[2], label="test, before and after")
        axes.set(xlabel=label, ylabel="accuracy (%)", ylim=(0, 100))
        axes.legend(loc="lower right")

    values = ", ".join(f"{100 * row['accuracy']:.1f}%" for row in known)
    return draw(paint, "accuracy", title="Accuracy", alt=f"Validation accuracy during training: {values}.")


def _gradient_picture(run: TrainingRun, rows: list[dict[str, float]], x: np.ndarray, label: str) -> Picture:
    values = np.array([row.get("projected_gradient", math.nan) for row in rows], dtype=float)
    smoothed = np.sqrt(smooth(values**2))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(x, values, ".", color=PALETTE[0], alpha=0.3, markersize=3, label="each step (rms over directions)")
        axes.plot(x, smoothed, color=PALETTE[0], label="moving rms")
        if run.gradient_norm is not None:
            value, error = run.gradient_norm
            if math.isfinite(error):
                axes.axhspan(value - 2 * error, value + 2 * error, color=PALETTE[1], alpha=0.15, linewidth=0)
            axes.axhline(value, color=PALETTE[1], linestyle="--", label="gradient norm, predicted by the plan")
        axes.set(xlabel=label, ylabel="projected gradient", yscale="log")
        axes.legend()

    alt = f"Projected gradient at each step: {np.nanmedian(values):.3g} at the median."
    caption = "The rms over many steps is the gradient's norm; a sudden rise is the first sign of divergence."
    return draw(paint, "gradient", title="Projected gradient", alt=alt, caption=caption)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average over a twentieth of the run, leaving out what is not a number."""
    ones = np.ones(max(1, len(values) // 20))
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), ones, mode="same")
    count = np.convolve(known.astype(float), ones, mode="same")
    return np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0)


def _mean_loss(rows: list[dict[str, float]]) -> float:
    losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    return sum(losses) / len(losses) if losses else math.nan
