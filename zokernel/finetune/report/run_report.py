"""What a finished run says about itself: a table, ``loss.png`` and a ``report.md`` in plain words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from zokernel.figures import PALETTE, figures
from zokernel.finetune.report.samples import samples_section
from zokernel.finetune.report.text import (
    describe_diagnosis,
    describe_examples,
    describe_forwards,
    describe_loss,
    describe_method,
    describe_rate,
    describe_start,
    describe_warning,
    describe_weights,
    is_macro_f1,
    reward_name,
)
from zokernel.finetune.report.uncertainty import change_error, share_error
from zokernel.readable import plural

PERPLEXITY, REWARD = "perplexity", "reward"  # the metrics that are no shares


def table(metrics: dict[str, Any]) -> str:
    """Return the summary of a run as an aligned two-column table.

    Args:
        metrics: What ``metrics.json`` holds.

    Returns:
        Text, one row per line.
    """
    rows = summary_rows(metrics)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def summary_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the summary: what was measured, with its uncertainty."""
    before, after, metric = metrics["before"], metrics["after"], metrics["metric"]
    examples = metrics["num_test"]
    shots = metrics["num_demonstrations"]
    start = describe_start(shots, trained=metrics.get("trained_before", False))
    model = ("model", f"{metrics['model']} ({metrics['num_parameters'] / 1e6:.1f}M parameters)")
    first, last = (_format_metric(metric, scores, examples) for scores in (before, after))
    zero_shot = (f"{start} {metric}", f"{first} on {describe_examples(metrics)}")
    if not metrics["steps"]:
        loss = [] if metric == REWARD else [("loss", f"{before['loss']:.4f}")]
        return [model, zero_shot, *loss, ("time", f"{metrics['total_seconds']:.0f} s")]
    return [
        model,
        ("trained", f"{plural(metrics['num_trained'], 'parameter')} with {describe_method(metrics)}"),
        zero_shot,
        (f"{metric} after training", f"{last} ({_format_change(metric, before, after)})"),
        (f"{reward_name(metrics) or 'loss'} before -> after", describe_loss(metrics)),
        ("steps, forwards", describe_forwards(metrics)),
        ("time", f"{metrics['train_seconds']:.0f} s training, {metrics['total_seconds']:.0f} s in all"),
        ("peak memory, training", f"{metrics['peak_memory_training'] / 2**20:,.0f} MiB"),
        ("peak memory, inference", f"{metrics['peak_memory_inference'] / 2**20:,.0f} MiB"),
        ("training / inference", f"{metrics['peak_memory_training'] / metrics['peak_memory_inference']:.2f} x"),
    ]


def _format_metric(metric: str, scores: dict[str, float], examples: int) -> str:
    """Format a metric: a perplexity and an F1 of classes as they are, the others with their standard error."""
    value = scores[metric]
    if metric == REWARD:
        passed = f", {100 * scores['pass_rate']:.1f} % pass" if "pass_rate" in scores else ""
        return f"{value:.3f} (± {scores.get('reward_error', math.nan):.3f}){passed}"
    if metric == PERPLEXITY:
        return f"{value:.3f}"
    if is_macro_f1(metric, scores):
        return f"{100 * value:.1f} %"
    return f"{100 * value:.1f} % (± {100 * share_error(value, examples):.1f})"


def _format_change(metric: str, before: dict[str, float], after: dict[str, float]) -> str:
    """Format how a metric changed: a perplexity by its ratio, a share in points."""
    if metric == PERPLEXITY:
        return f"{100 * (after[metric] / before[metric] - 1):+z.1f} %"
    if metric == REWARD:
        return f"{after[metric] - before[metric]:+z.3f}"
    return f"{100 * (after[metric] - before[metric]):+z.1f} points"


def draw_loss(
    rows: list[dict[str, float]],
    evaluations: list[dict[str, float]],
    test: list[dict[str, float]],
    path: Path,
    *,
    metric: str = "accuracy",
) -> None:
    """Draw loss and a metric against forward passes.

    Args:
        rows: Training, one per step, with ``forwards`` and ``loss``.
        evaluations: Validation results with ``forwards``, ``loss`` and the metric.
        test: Test results before and after training, likewise.
        path: The PNG to write.
        metric: Name of the metric.
    """
    forwards = np.array([row["forwards"] for row in rows])
    sign = -1 if metric == REWARD else 1
    loss = sign * np.array([row["loss"] for row in rows])
    with figures() as Figure:
        figure = Figure(figsize=(7.2, 6.0))  # without a layout that is drawn twice to be found
        figure.subplots_adjust(left=0.11, right=0.985, top=0.965, bottom=0.085, hspace=0.09)
        upper, lower = figure.subplots(2, sharex=True)
        upper.plot(forwards, loss, ".", color=PALETTE[5], markersize=3, label="training batches")
        upper.plot(forwards, smooth(loss), color=PALETTE[0], label="training, smoothed")
        for points, style, color, label in (
            (evaluations, "o--", PALETTE[1], "validation"),
            (test, "D", PALETTE[2], "test, before and after"),
        ):
            at = [row["forwards"] for row in points]
            upper.plot(at, [sign * row["loss"] for row in points], style, color=color, label=label)
            scale = 1 if metric in (PERPLEXITY, REWARD) else 100
            lower.plot(at, [scale * row[metric] for row in points], style, color=color, label=label)
        if metric == REWARD:
            upper.set(ylabel="reward, less any penalty")
        else:
            upper.set(ylabel="loss (nats)", ylim=(0, None))
        lower.set(xlabel="forward passes", ylabel=metric)
        if metric not in (PERPLEXITY, REWARD):
            lower.set(ylabel=f"{metric} (%)", ylim=(0, 100))
        upper.legend(loc="upper right")
        figure.savefig(path, dpi=130)


def smooth(values: np.ndarray, window: int | None = None) -> np.ndarray:
    """Return the centred moving average, with shorter windows at the ends.

    Args:
        values: (T,) numbers.
        window: Its length; a twentieth of T when not given.

    Returns:
        (T,) averages.

    Example:
        >>> smooth(np.array([0.0, 3.0, 0.0]), window=3)
        array([1.5, 1. , 1.5])
    """
    window = window or max(1, len(values) // 20)
    ones = np.ones(window)
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones(len(values)), ones, mode="same")


def write_report(metrics: dict[str, Any], path: Path) -> None:
    """Write ``report.md``: what was done, what came out, and how to read and repeat it.

    Args:
        metrics: What ``metrics.json`` holds.
        path: The file to write.
    """
    report = _training_report(metrics) if metrics["steps"] else _evaluation_report(metrics)
    path.write_text(report, encoding="utf-8")


def _training_report(metrics: dict[str, Any]) -> str:
    ratio = metrics["peak_memory_training"] / metrics["peak_memory_inference"]
    step, outcome, quantity = _describe_step(metrics), _describe_outcome(metrics), reward_name(metrics) or "loss"
    return f"""# Fine-tuning {metrics["model"]} with {describe_method(metrics)}

## In plain words

{_warning_paragraph(metrics)}{step} {outcome} Training needed {ratio:.2f} times the memory of plain inference.

{_describe_task(metrics)}
{_describe_start_row(metrics)} {describe_weights(metrics)}
{_diagnosis_section(metrics)}
## Numbers

| | |
|---|---|
{_table_lines(metrics)}
| learning rate | {describe_rate(metrics)} |
| precision | {metrics["precision"]} |

![loss](loss.png)

Dots: the {quantity} of each training batch; line: its moving average; circles: validation; diamonds: test.
{_describe_errors(metrics)}

{samples_section(metrics.get("samples", []), trained=True)}
## Repeat it

```
{metrics["command"]}
```

Files: `metrics.json` (these numbers), `steps.jsonl` (one line per step), and the trained {metrics["saved"]}, which
plain {"peft" if metrics["saved"] == "adapter" else "transformers"} loads from this folder.
"""


def _table_lines(metrics: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in summary_rows(metrics))


def _describe_step(metrics: dict[str, Any]) -> str:
    """Return how a step was taken."""
    if metrics["forwards_per_step"] is None:
        return "Each step computed the gradient by backpropagation (a first-order baseline)."
    return (
        f"Each step ran the model {metrics['forwards_per_step']} times on one batch with slightly different weights, "
        "compared the losses, and moved the weights along the random directions that had been tried. "
        "No gradient was computed and no activation was kept."
    )


def _describe_task(metrics: dict[str, Any]) -> str:
    """Return what the model was to do."""
    if metrics["metric"] == PERPLEXITY:
        return "The model predicted each token that counts from those before it; perplexity is e to the mean loss."
    if metrics["metric"] == REWARD:
        return "The model answered prompts, which reward functions judged; a loss is minus the reward."
    words = ", ".join(metrics["label_words"])
    options = f" with one of: {words}." if words else "."
    return f"The model was asked to complete `{metrics['template']!r}`{options}"


def _describe_errors(metrics: dict[str, Any]) -> str:
    """Return what the ± in the table is; empty where there is none."""
    examples, metric = metrics["num_test"], metrics["metric"]
    if metric == PERPLEXITY or is_macro_f1(metric, metrics["after"]):
        return ""
    if metric == REWARD:
        return f"The ± is the standard error of {plural(examples, 'prompt')}."
    bound = ", which is an upper bound for F1" if metric == "f1" else ""
    return f"The ± is the binomial standard error of {plural(examples, 'example')}{bound}."


def _warning_paragraph(metrics: dict[str, Any]) -> str:
    """Return a paragraph on what was wrong before training; empty if nothing was."""
    warning = describe_warning(metrics)
    return f"{warning}\n\n" if warning else ""


def _describe_start_row(metrics: dict[str, Any]) -> str:
    """Return what the first row of scores is."""
    start = describe_start(metrics["num_demonstrations"], trained=metrics.get("trained_before", False))
    if metrics.get("trained_before"):
        return f"It had been trained before this run; the {start} row is its score then."
    return f"Before training it answered from what it had read; that is the {start} row."


def _diagnosis_section(metrics: dict[str, Any]) -> str:
    """Return the section on a loss that did not fall; empty if it fell."""
    diagnosis, reasons = describe_diagnosis(metrics), metrics.get("diagnosis", {}).get("reasons", [])
    if not diagnosis:
        return ""
    reason_lines = "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))
    title = "Why the loss did not fall" if reasons else "Whether the loss fell"
    return f"\n## {title}\n\n{diagnosis}\n" + (f"\n{reason_lines}" if reason_lines else "")


def _describe_outcome(metrics: dict[str, Any]) -> str:
    """Return what the metric was before and after, and whether its examples chose the checkpoint."""
    if metrics["test_is_validation"]:
        warning = "These examples also chose the checkpoint, so the second number is somewhat optimistic."
        return f"{_describe_change(metrics)} {warning}"
    return _describe_change(metrics)


def _describe_change(metrics: dict[str, Any]) -> str:
    """Return one sentence on what the metric was before and after, and on which examples."""
    before, after, examples, metric = metrics["before"], metrics["after"], metrics["num_test"], metrics["metric"]
    shared = metrics.get("test_trained_on", 0)
    group = describe_examples(metrics) if shared else f"{plural(examples, 'example')} the run never trained on"
    subject = f"{metric.capitalize()} on {group} went from"
    if metric == PERPLEXITY:
        return (
            f"{subject} {before[metric]:.3f} to {after[metric]:.3f}, the loss from {before['loss']:.4f} to "
            f"{after['loss']:.4f}."
        )
    if metric == REWARD:
        return f"{subject} {_format_metric(metric, before, examples)} to {_format_metric(metric, after, examples)}."
    points = _format_change(metric, before, after)
    outcome = f"{subject} {100 * before[metric]:.1f} % to {100 * after[metric]:.1f} %: {points}"
    if is_macro_f1(metric, after):
        return f"{outcome}."
    error = 100 * change_error(before[metric], after[metric], examples)
    return f"{outcome}, with a standard error of at most {error:.1f}."


def _evaluation_report(metrics: dict[str, Any]) -> str:
    return f"""# Evaluation of {metrics["model"]}

{_warning_paragraph(metrics)}{_describe_evaluation(metrics)}

| | |
|---|---|
{_table_lines(metrics)}

{samples_section(metrics.get("samples", []), trained=False)}
```
{metrics["command"]}
```
"""


def _describe_evaluation(metrics: dict[str, Any]) -> str:
    template = f" The template was `{metrics['template']!r}`." if metrics["template"] else ""
    return f"Nothing was trained.{template}"
