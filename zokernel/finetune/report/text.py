"""Texts of a report: what was requested, what it became, and whether the run went well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zokernel.finetune.monitor.verdict import TOO_SHORT
from zokernel.readable import plural


def describe_method(metrics: dict[str, Any]) -> str:
    """Return the method as the user named it, and what that became.

    Example:
        >>> describe_method({"method": "forward_difference", "requested_method": "auto"})
        'auto (forward_difference)'
        >>> describe_method({"method": "mezo", "requested_method": "mezo"})
        'mezo'
    """
    requested, method = metrics.get("requested_method", metrics["method"]), metrics["method"]
    return str(method) if requested == method else f"{requested} ({method})"


def describe_examples(metrics: dict[str, Any]) -> str:
    """Return the examples of the scores before and after: of a test split, or those that chose the best step.

    Those that were also trained on are counted, if a step was taken.

    Example:
        >>> describe_examples({"num_test": 1000, "test_is_validation": False})
        '1,000 test examples'
        >>> describe_examples({"num_test": 24, "test_is_validation": False, "test_trained_on": 19})
        '24 test examples (19 of them also training examples)'
    """
    examples = plural(metrics["num_test"], f"{'validation' if metrics['test_is_validation'] else 'test'} example")
    shared = metrics.get("test_trained_on", 0) if metrics.get("steps", 1) else 0
    return f"{examples} ({shared:,} of them also training examples)" if shared else examples


def is_macro_f1(metric: str, metrics: Mapping[str, float]) -> bool:
    """Return whether a metric is the F1 of classes, which is no mean over examples; that of answers in words is.

    Example:
        >>> is_macro_f1("f1", {"accuracy": 0.9, "f1": 0.8}), is_macro_f1("f1", {"f1": 0.8, "em": 0.7})
        (True, False)
    """
    return metric == "f1" and "accuracy" in metrics


def describe_forwards(metrics: dict[str, Any]) -> str:
    """Return the steps of a run, their forward passes, and those that settings were chosen by.

    Example:
        >>> describe_forwards({"steps": 1000, "forwards": 2000, "measuring_forwards": 24})
        '1,000 steps, 2,000 forward passes (and 24 before them to choose settings)'
        >>> describe_forwards({"steps": 1000, "forwards": 2000, "measuring_forwards": 27, "rate_forwards": 24})
        '1,000 steps, 2,000 forward passes (and 27 before them: 24 for the learning rate, 3 for other settings)'
        >>> describe_forwards({"steps": 1000, "forwards": 2000})
        '1,000 steps, 2,000 forward passes'
        >>> describe_forwards({"steps": 1, "forwards": 1})
        '1 step, 1 forward pass'
    """
    more, rate = metrics.get("measuring_forwards", 0), metrics.get("rate_forwards", 0)
    steps = f"{plural(metrics['steps'], 'step')}, {plural(metrics['forwards'], 'forward pass')}"
    if rate and more > rate:
        return f"{steps} (and {more:,} before them: {rate:,} for the learning rate, {more - rate:,} for other settings)"
    return f"{steps} (and {more:,} before them to choose settings)" if more else steps


def describe_start(shots: int, *, trained: bool) -> str:
    """Return how a model answered before this run trained it.

    Args:
        shots: Solved examples before every prompt.
        trained: Whether it had been trained before.

    Example:
        >>> describe_start(0, trained=False), describe_start(4, trained=False), describe_start(0, trained=True)
        ('zero-shot', '4-shot in-context', 'already-trained')
    """
    return f"{shots}-shot in-context" if shots else "already-trained" if trained else "zero-shot"


def describe_rate(metrics: dict[str, Any]) -> str:
    """Return the learning rate and, where it is a number of its own, the effective one.

    Example:
        >>> describe_rate({"learning_rate": 0.1, "effective_lr": None})
        '0.1'
        >>> describe_rate({"learning_rate": 1e-5, "effective_lr": 4e-5})
        '1e-05 (effective 4e-05)'
    """
    rate, effective = metrics["learning_rate"], finite_or_none(metrics.get("effective_lr"))
    same = effective is None or math.isclose(rate, effective, rel_tol=1e-3)
    return f"{rate:.3g}" if same else f"{rate:.3g} (effective {effective:.3g})"


def finite_or_none(value: float | None) -> float | None:
    """Return a number as JSON can hold it: None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def describe_weights(metrics: dict[str, Any]) -> str:
    """Return which weights are reported, and whether the run went wrong.

    Example:
        >>> describe_weights({"best_step": 40, "steps": 100, "selected_by": "loss", "evaluations": [{}]})
        'The weights are those with the best validation loss, of step 40 of 100.'
    """
    best, steps, wrong = metrics["best_step"], metrics["steps"], metrics.get("went_wrong")
    score = reward_name(metrics) if metrics["selected_by"] == "loss" else ""
    score = score or metrics["selected_by"]
    if best == 0 and is_diverged(metrics):
        sentence = (
            f"No evaluation before that had a better validation {score} than the model had before "
            "training, so the weights are the untrained ones."
        )
    elif not metrics.get("evaluations"):
        sentence = f"The weights are those of the last step, {best:,}."
    elif best == 0:
        sentence = (
            f"No evaluation in {plural(steps, 'step')} had a better validation {score} than the "
            "model had before training, so the weights are the untrained ones."
        )
    elif best == steps:
        sentence = f"The weights are those of the last step, {best:,}."
    else:
        sentence = f"The weights are those with the best validation {score}, of step {best:,} of {steps:,}."
    return f"{wrong} {sentence}" if wrong else sentence


def reward_name(metrics: dict[str, Any]) -> str:
    """Return what a run of rewards raises, which is minus its loss; empty for every other run.

    Example:
        >>> reward_name({"metric": "reward", "after": {"loss": -0.8, "reward": 0.9, "kl": 2.5}})
        'reward less penalty'
    """
    if metrics.get("metric") != "reward":
        return ""
    return "reward less penalty" if "kl" in metrics["after"] else "reward"


def describe_loss(metrics: dict[str, Any]) -> str:
    """Return the loss before and after, or the reward, and whether the run diverged or got nowhere.

    Example:
        >>> describe_loss({"before": {"loss": 1.4}, "after": {"loss": 1.1}, "best_step": 9})
        '1.4000 -> 1.1000'
        >>> run = {"before": {"loss": -1}, "after": {"loss": -2, "reward": 2}, "best_step": 9, "metric": "reward"}
        >>> describe_loss(run)
        '1.000 -> 2.000'
    """
    first, last = (metrics[when]["loss"] for when in ("before", "after"))
    text = f"{-first:z.3f} -> {-last:z.3f}" if reward_name(metrics) else f"{first:.4f} -> {last:.4f}"
    if metrics["best_step"] == 0:
        text += " (the untrained weights were the best)"
    if metrics.get("went_wrong"):
        text += f" (the run {'diverged' if is_diverged(metrics) else 'came to a standstill'})"
    return text


def is_diverged(metrics: dict[str, Any]) -> bool:
    """Return whether a run diverged."""
    return str(metrics.get("went_wrong")).startswith("Training diverged")


def describe_diagnosis(metrics: dict[str, Any]) -> str:
    """Return that the loss did not fall, or that the run does not tell; empty if it fell, or the run went wrong anyway.

    Example:
        >>> describe_diagnosis({"diagnosis": {"outcome": "The loss did not fall.", "reasons": ["..."], "forwards": 17}})
        'The loss did not fall. The reasons below took 17 more forward passes.'
        >>> describe_diagnosis({})
        ''
    """
    diagnosis = metrics.get("diagnosis") or {}
    is_explained = metrics.get("went_wrong") and diagnosis.get("verdict") == TOO_SHORT
    parts = ["" if is_explained else diagnosis.get("outcome", ""), diagnosis.get("worse", "")]
    if diagnosis.get("forwards"):
        parts.append(f"The reasons below took {plural(diagnosis['forwards'], 'more forward pass')}.")
    return " ".join(part for part in parts if part)


def describe_warning(metrics: dict[str, Any]) -> str:
    """Return what was wrong before training, unless it is among the reasons why the loss did not fall.

    Example:
        >>> describe_warning({"warning": "3 of 3 were empty."})
        '3 of 3 were empty.'
        >>> describe_warning({"warning": "3 of 3 were empty.", "diagnosis": {"reasons": ["3 of 3 were empty."]}})
        ''
    """
    warning = str(metrics.get("warning") or "")
    return "" if warning in (metrics.get("diagnosis") or {}).get("reasons", ()) else warning
