"""How a report says what was asked for, what it became, and whether the run went well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zokernel.finetune.monitor.diagnosis import TOO_SHORT
from zokernel.readable import counted


def method_told(metrics: dict[str, Any]) -> str:
    """Return the method as the user asked for it, and what that became.

    Example:
        >>> method_told({"method": "forward_difference", "requested_method": "auto"})
        'auto (forward_difference)'
        >>> method_told({"method": "mezo", "requested_method": "mezo"})
        'mezo'
    """
    asked, method = metrics.get("requested_method", metrics["method"]), metrics["method"]
    return str(method) if asked == method else f"{asked} ({method})"


def examples_told(metrics: dict[str, Any]) -> str:
    """Return the examples of the scores before and after: of a test split, or those that chose the best step.

    Those that were also trained on are counted, if a step was taken.

    Example:
        >>> examples_told({"num_test": 1000, "test_is_validation": False})
        '1,000 test examples'
        >>> examples_told({"num_test": 24, "test_is_validation": False, "test_trained_on": 19})
        '24 test examples (19 of them also training examples)'
    """
    told = counted(metrics["num_test"], f"{'validation' if metrics['test_is_validation'] else 'test'} example")
    shared = metrics.get("test_trained_on", 0) if metrics.get("steps", 1) else 0
    return f"{told} ({shared:,} of them also training examples)" if shared else told


def is_macro_f1(metric: str, found: Mapping[str, float]) -> bool:
    """Return whether a metric is the F1 of classes, which is no mean over examples; that of answers in words is.

    Example:
        >>> is_macro_f1("f1", {"accuracy": 0.9, "f1": 0.8}), is_macro_f1("f1", {"f1": 0.8, "em": 0.7})
        (True, False)
    """
    return metric == "f1" and "accuracy" in found


def share_error(share: float, examples: int) -> float:
    r"""Return the standard error of a share of examples, which is not zero at 0 and 1.

    Half a success and half a failure are added, the centre of Wilson's interval (1927) of one standard error:

    .. math:: p = \frac{N s + 1/2}{N + 1}, \qquad SE = \sqrt{\frac{p\,(1 - p)}{N}} .

    For the mean of numbers between 0 and 1, it is an upper bound.

    Args:
        share: The share s, between 0 and 1.
        examples: Their number N.

    Example:
        >>> round(share_error(0.5, 100), 3), round(share_error(1.0, 24), 3)
        (0.05, 0.029)
    """
    moved = _towards_half(share, examples)
    return math.sqrt(moved * (1 - moved) / examples)


def change_error(before: float, after: float, examples: int) -> float:
    r"""Return the largest standard error that the change of a share may have, measured twice on the same examples.

    At most :math:`q = \min(p + p', 2 - p - p')` of the examples change their answer, with the shares of
    :func:`share_error`, so

    .. math:: SE \le \sqrt{\frac{q - (p' - p)^2}{N}} .

    Args:
        before: The share before.
        after: The share after.
        examples: Their number N.

    Example:
        >>> round(change_error(0.5, 0.5, 100), 3), round(change_error(1.0, 1.0, 24), 3)
        (0.1, 0.041)
    """
    first, last = _towards_half(before, examples), _towards_half(after, examples)
    return math.sqrt((min(first + last, 2 - first - last) - (last - first) ** 2) / examples)


def _towards_half(share: float, examples: int) -> float:
    return (examples * share + 0.5) / (examples + 1)


def forwards_told(metrics: dict[str, Any]) -> str:
    """Return the steps of a run, their forward passes, and those that settings were chosen by.

    Example:
        >>> forwards_told({"steps": 1000, "forwards": 2000, "measuring_forwards": 24})
        '1,000 steps, 2,000 forward passes (and 24 before them to choose settings)'
        >>> forwards_told({"steps": 1000, "forwards": 2000, "measuring_forwards": 27, "rate_forwards": 24})
        '1,000 steps, 2,000 forward passes (and 27 before them: 24 for the learning rate, 3 for other settings)'
        >>> forwards_told({"steps": 1000, "forwards": 2000})
        '1,000 steps, 2,000 forward passes'
        >>> forwards_told({"steps": 1, "forwards": 1})
        '1 step, 1 forward pass'
    """
    more, rate = metrics.get("measuring_forwards", 0), metrics.get("rate_forwards", 0)
    told = f"{counted(metrics['steps'], 'step')}, {counted(metrics['forwards'], 'forward pass')}"
    if rate and more > rate:
        return f"{told} (and {more:,} before them: {rate:,} for the learning rate, {more - rate:,} for other settings)"
    return f"{told} (and {more:,} before them to choose settings)" if more else told


def start_told(shots: int, *, trained: bool) -> str:
    """Return how a model answered before this run trained it.

    Args:
        shots: Solved examples before every prompt.
        trained: Whether it had been trained before.

    Example:
        >>> start_told(0, trained=False), start_told(4, trained=False), start_told(0, trained=True)
        ('zero-shot', '4-shot in-context', 'already-trained')
    """
    return f"{shots}-shot in-context" if shots else "already-trained" if trained else "zero-shot"


def rate_told(metrics: dict[str, Any]) -> str:
    """Return the learning rate and, where it is a number of its own, the effective one.

    Example:
        >>> rate_told({"learning_rate": 0.1, "effective_lr": None})
        '0.1'
        >>> rate_told({"learning_rate": 1e-5, "effective_lr": 4e-5})
        '1e-05 (effective 4e-05)'
    """
    rate, effective = metrics["learning_rate"], number(metrics.get("effective_lr"))
    same = effective is None or math.isclose(rate, effective, rel_tol=1e-3)
    return f"{rate:.3g}" if same else f"{rate:.3g} (effective {effective:.3g})"


def number(value: float | None) -> float | None:
    """Return a number that JSON has: None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def weights_told(metrics: dict[str, Any]) -> str:
    """Return which weights are reported, and whether the run went wrong.

    Example:
        >>> weights_told({"best_step": 40, "steps": 100, "selected_by": "loss", "evaluations": [{}]})
        'The weights are those with the best validation loss, of step 40 of 100.'
    """
    best, steps, wrong = metrics["best_step"], metrics["steps"], metrics.get("went_wrong")
    score = raised(metrics) if metrics["selected_by"] == "loss" else ""
    score = score or metrics["selected_by"]
    if best == 0 and is_diverged(metrics):
        told = (
            f"No evaluation before that had a better validation {score} than the model had before "
            "training, so the weights are the untrained ones."
        )
    elif not metrics.get("evaluations"):
        told = f"The weights are those of the last step, {best:,}."
    elif best == 0:
        told = (
            f"No evaluation in {counted(steps, 'step')} had a better validation {score} than the "
            "model had before training, so the weights are the untrained ones."
        )
    elif best == steps:
        told = f"The weights are those of the last step, {best:,}."
    else:
        told = f"The weights are those with the best validation {score}, of step {best:,} of {steps:,}."
    return f"{wrong} {told}" if wrong else told


def raised(metrics: dict[str, Any]) -> str:
    """Return what a run of rewards raises, which is minus its loss; empty for every other run.

    Example:
        >>> raised({"metric": "reward", "after": {"loss": -0.8, "reward": 0.9, "kl": 2.5}})
        'reward less penalty'
    """
    if metrics.get("metric") != "reward":
        return ""
    return "reward less penalty" if "kl" in metrics["after"] else "reward"


def loss_told(metrics: dict[str, Any]) -> str:
    """Return the loss before and after, or the reward; of a run that diverged or got nowhere it is said.

    Example:
        >>> loss_told({"before": {"loss": 1.4}, "after": {"loss": 1.1}, "best_step": 9})
        '1.4000 -> 1.1000'
        >>> loss_told({"before": {"loss": -1}, "after": {"loss": -2, "reward": 2}, "best_step": 9, "metric": "reward"})
        '1.000 -> 2.000'
    """
    first, last = (metrics[when]["loss"] for when in ("before", "after"))
    text = f"{-first:z.3f} -> {-last:z.3f}" if raised(metrics) else f"{first:.4f} -> {last:.4f}"
    if metrics["best_step"] == 0:
        text += " (the untrained weights were the best)"
    if metrics.get("went_wrong"):
        text += f" (the run {'diverged' if is_diverged(metrics) else 'came to a standstill'})"
    return text


def is_diverged(metrics: dict[str, Any]) -> bool:
    """Return whether a run diverged."""
    return str(metrics.get("went_wrong")).startswith("Training diverged")


def diagnosis_told(metrics: dict[str, Any]) -> str:
    """Return that the loss did not fall, or that the run does not tell; empty if it fell, or the run went wrong anyway.

    Example:
        >>> diagnosis_told({"diagnosis": {"outcome": "The loss did not fall.", "reasons": ["..."], "forwards": 17}})
        'The loss did not fall. The reasons below took 17 more forward passes.'
        >>> diagnosis_told({})
        ''
    """
    found = metrics.get("diagnosis") or {}
    answered = metrics.get("went_wrong") and found.get("verdict") == TOO_SHORT
    parts = ["" if answered else found.get("outcome", ""), found.get("worse", "")]
    if found.get("forwards"):
        parts.append(f"The reasons below took {counted(found['forwards'], 'more forward pass')}.")
    return " ".join(part for part in parts if part)


def warning_told(metrics: dict[str, Any]) -> str:
    """Return what was wrong before training, unless it is among the reasons why the loss did not fall.

    Example:
        >>> warning_told({"warning": "3 of 3 were empty."})
        '3 of 3 were empty.'
        >>> warning_told({"warning": "3 of 3 were empty.", "diagnosis": {"reasons": ["3 of 3 were empty."]}})
        ''
    """
    found = str(metrics.get("warning") or "")
    return "" if found in (metrics.get("diagnosis") or {}).get("reasons", ()) else found
