"""What happened in a training run, in words and in its few most telling numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from zokernel.finetune.report.text import (
    describe_diagnosis,
    describe_examples,
    describe_method,
    describe_warning,
    describe_weights,
    is_diverged,
    reward_name,
)
from zokernel.finetune.report.uncertainty import change_error
from zokernel.readable import plural, readable_bytes, readable_seconds
from zokernel.reporting.page import words
from zokernel.reporting.progress import Progress, progress_of
from zokernel.reporting.rewards import describe_rewards, is_rewarded
from zokernel.reporting.training import TrainingRun

SHARES = ("accuracy", "f1", "em", "pass_rate", "empty_answers")  # scores that are shares of examples


def title(run: TrainingRun) -> str:
    """Return the heading of a run's page."""
    if not run.metrics:
        progress = progress_of(run)
        step = progress.steps_done if progress.total else f"{progress.steps:,}"
        return f"Training with {run.method or 'zokernel'}, step {step}"
    model = run.metrics["model"]
    model = Path(model).name if Path(model).is_absolute() else model
    return f"Fine-tuning {model} with {describe_method(run.metrics)}" if run.metrics["steps"] else f"{model} as it is"


def alert(run: TrainingRun) -> str:
    """Return that a run diverged, stood still, did not learn or died, in a sentence or two; empty if it did not."""
    if not run.metrics:
        progress = progress_of(run)
        return progress.description if progress.state in ("stopped", "died") and run.rows else ""
    if run.metrics.get("went_wrong"):
        return describe_weights(run.metrics)
    return describe_diagnosis(run.metrics) if has_reasons(run.metrics) else ""


def has_reasons(metrics: dict[str, Any]) -> bool:
    """Return whether a run says why it did not learn."""
    return bool((metrics.get("diagnosis") or {}).get("reasons"))


def summary(run: TrainingRun) -> list[str]:
    """Return what happened, in plain words."""
    return [*_unread(run), *(_finished(run) if run.metrics else _so_far(run))]


def _unread(run: TrainingRun) -> list[str]:
    """Return which files of a run that no process writes are damaged."""
    return [] if progress_of(run).state == "running" else run.unread


def _finished(run: TrainingRun) -> list[str]:
    """Return what a finished run has come to."""
    metrics = run.metrics
    if not metrics["steps"]:
        return [paragraph for paragraph in (describe_warning(metrics), _untrained(metrics)) if paragraph]
    paragraphs = [describe_warning(metrics), _how(metrics)]
    if metrics.get("metric") == "reward":
        paragraphs.append(describe_rewards(metrics, describe_examples(metrics)))
    else:
        paragraphs += _scores(metrics)
    paragraphs += [_continued(run)]
    if not metrics.get("went_wrong"):
        paragraphs.append(describe_weights(metrics))
    if not has_reasons(metrics):
        paragraphs.append(describe_diagnosis(metrics))
    paragraphs.append(_not_finite(run))
    if metrics.get("test_is_validation"):
        paragraphs.append("These examples also chose the checkpoint, so the second number is somewhat optimistic.")
    return [paragraph for paragraph in paragraphs if paragraph]


def _so_far(run: TrainingRun) -> list[str]:
    """Return what an unfinished run has come to."""
    progress = progress_of(run)
    if not run.rows:
        return [
            "The run has begun and not finished a step yet." if progress.state == "running" else progress.description
        ]
    paragraphs = [] if alert(run) else [progress.description]
    paragraphs += [
        f"{plural(len(run.rows), 'step')} so far. {_loss_moved(run)}",
        _continued(run),
        _not_finite(run),
    ]
    return [paragraph for paragraph in paragraphs if paragraph]


def _loss_moved(run: TrainingRun) -> str:
    first, last = loss_ends(run.rows)
    name = "loss"
    if is_rewarded(run.metrics, run.run):
        name, first, last = "reward", -first, -last
    return "" if len(run.rows) < 2 else f"The {name} went from {first:z.4g} (first steps) to {last:z.4g} (last steps)."


def _untrained(metrics: dict[str, Any]) -> str:
    scores = {name: value for name, value in metrics["after"].items() if name != "loss"}
    listed_scores = ", ".join(f"{score_name(name)} {_score(name, value)}" for name, value in scores.items())
    listed_scores += "" if reward_name(metrics) else f", loss {metrics['after']['loss']:.4g}"
    return f"No step was taken. On {describe_examples(metrics)}: {listed_scores}."


def _how(metrics: dict[str, Any]) -> str:
    if not metrics.get("forwards_per_step"):
        return "Each step computed the gradient by backpropagation (a first-order baseline)."
    return (
        f"Each step ran the model {plural(metrics['forwards_per_step'], 'time')} on one batch with slightly different "
        "weights, compared the losses, and moved the weights along the random directions that had been tried. No "
        "gradient was computed and no activation was kept."
    )


def _scores(metrics: dict[str, Any]) -> list[str]:
    """Return a sentence on each score: a perplexity by its ratio, a share in points."""
    before, after, count = metrics["before"], metrics["after"], metrics["num_test"]
    sentences = []
    for name in (name for name in after if name != "loss" and name in before):
        label = score_name(name)
        sentence = f"{label[0].upper()}{label[1:]} on {describe_examples(metrics)} went from "
        sentence += f"{_score(name, before[name])} to {_score(name, after[name])}"
        if name in SHARES:
            sentence += f": {100 * (after[name] - before[name]):+z.1f} points"
        elif before[name]:
            sentence += f": {100 * (after[name] / before[name] - 1):+z.1f} %"
        if name == "perplexity":
            sentence += f"; the loss from {before['loss']:.4f} to {after['loss']:.4f} nats per token"
        if name == "accuracy":
            error = 100 * change_error(before[name], after[name], count)
            sentence += f", with a standard error of at most {error:.1f}"
        sentences.append(f"{sentence}.")
    return sentences


def _score(name: str, value: float) -> str:
    return f"{100 * value:.1f}%" if name in SHARES else f"{value:.4g}" if name == "perplexity" else f"{value:.3f}"


def score_name(name: str) -> str:
    """Return what a score is called.

    Example:
        >>> score_name("f1"), score_name("pass_rate")
        ('F1', 'pass rate')
    """
    return {"f1": "F1", "em": "exact match"}.get(name, words(name))


def _continued(run: TrainingRun) -> str:
    """Return where other processes took over; empty if one did it all."""
    breaks = run.run.get("continued_at") or []
    if not breaks:
        return ""
    steps = " and ".join(f"{step:,}" for step in breaks)
    return f"The run was cut off after step {steps} and continued from there; the steps before were not taken again."


def _not_finite(run: TrainingRun) -> str:
    count = sum(not math.isfinite(row["loss"]) for row in run.rows)
    return f"In {count:,} of {plural(len(run.rows), 'step')} the loss was no finite number." if count else ""


def facts(run: TrainingRun) -> list[tuple[str, str]]:
    """Return the few numbers that matter most."""
    metrics = run.metrics
    if not metrics:
        return facts_so_far(run, progress_of(run))
    if not metrics["steps"]:
        return [*_changes(metrics, trained=False), ("examples", f"{metrics['num_test']:,}")]
    entries = [
        *_outcome(metrics),
        *_changes(metrics, trained=True),
        ("parameters trained", f"{metrics['num_trained']:,}"),
        ("steps", f"{metrics['steps']:,}"),
        ("forward passes", f"{metrics['forwards']:,}"),
        ("training time", readable_seconds(metrics["train_seconds"])),
    ]
    if run.run.get("continued_at"):
        entries.append(("continued after step", ", ".join(f"{step:,}" for step in run.run["continued_at"])))
    if offload := metrics.get("offload"):
        entries += _offload_facts(offload)
    inference, training = metrics.get("peak_memory_inference"), metrics.get("peak_memory_training")
    if inference and training:
        entries.append(("memory over inference", f"{training / inference:.2f} ×"))
    return entries


def _offload_facts(offload: dict[str, Any]) -> list[tuple[str, str]]:
    entries = [
        ("read", readable_bytes(offload["bytes_read"])),
        ("written", readable_bytes(offload["bytes_written"])),
    ]
    if offload["seconds_per_pass"] is not None:
        entries.append(("time per pass", readable_seconds(offload["seconds_per_pass"])))
    return entries


def facts_so_far(run: TrainingRun, progress: Progress) -> list[tuple[str, str]]:
    """Return the few numbers of a run that has not finished.

    Args:
        run: What its folder tells.
        progress: How far it is.
    """
    last = run.rows[-1] if run.rows else {}
    entries = [("steps done", progress.steps_done), ("time left", progress.time_left)]
    if progress.seconds is not None:
        entries.append(("time so far", readable_seconds(progress.seconds)))
    entries += [("method", run.method)] if run.method else []
    if "loss" in last and is_rewarded(run.metrics, run.run):
        entries.append(("last reward", f"{-last['loss']:z.4g}"))
    elif "loss" in last:
        entries.append(("last loss", f"{last['loss']:.4g}"))
    entries += [("forward passes", f"{last['forwards']:,}")] if last.get("forwards") else []
    return entries


def _outcome(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    if metrics.get("went_wrong"):
        return [("outcome", "diverged" if is_diverged(metrics) else "came to a standstill")]
    return [("outcome", "did not learn")] if has_reasons(metrics) else []


def _changes(metrics: dict[str, Any], *, trained: bool) -> list[tuple[str, str]]:
    """Return the scores before and after, the one that the task is judged by first."""
    before, after = metrics["before"], metrics["after"]
    names = [metrics.get("metric"), *(("pass_rate",) if reward_name(metrics) else ("accuracy", "loss"))]
    entries = []
    for name in dict.fromkeys(name for name in names if name and name in after and name in before):
        first, last = _score(name, before[name]).rstrip("%"), _score(name, after[name])
        entries.append((score_name(name), f"{first} → {last}" if trained else last))
    return entries


def loss_ends(rows: list[dict[str, float]]) -> tuple[float, float]:
    """Return the mean losses of the first and of the last steps: a quarter of them, 20 at most.

    Args:
        rows: One per step; losses that are not finite are left out.

    Example:
        >>> loss_ends([{"loss": value} for value in (3.0, 2.0, 2.0, 1.0)])
        (3.0, 1.0)
    """
    count = max(1, min(20, len(rows) // 4))
    return _mean_loss(rows[:count]), _mean_loss(rows[-count:])


def _mean_loss(rows: list[dict[str, float]]) -> float:
    losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    return sum(losses) / len(losses) if losses else math.nan
