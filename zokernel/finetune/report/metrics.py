"""``metrics.json``: everything a finished run has to say, in numbers."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zokernel._version import __version__
from zokernel.finetune.data.datasets import task_name
from zokernel.finetune.models.kind import kind_of_model
from zokernel.finetune.models.quantized_model import count_parameters, describe_quantization
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.tasks import Task

MEASURED = {
    "classification": ("accuracy", "f1"),
    "choice": ("accuracy",),
    "generation": ("f1", "em"),
    "text": ("perplexity",),
    "reward": ("reward", "pass_rate", "reward_error", "kl", "empty_answers"),
}
"""What an evaluation measures beside the loss, by the kind of the task."""


def settings_of(config: ZOConfig, requested: ZOConfig) -> dict[str, Any]:
    """Return the settings of a run that its report shows: ``config`` is what became of ``requested``."""
    return {
        "method": config.method,
        "requested_method": requested.method,
        "objective": config.objective,
        "selected_by": config.metric_for_best_model or "loss",
        "learning_rate": config.learning_rate,
        "method_options": config.method_options(),
        "precision": config.precision,
        "seed": config.seed,
        "data_seed": config.data_seed,
    }


def model_facts(model: Any, arguments: ModelArguments, *, trained: bool = False) -> dict[str, Any]:
    """Return what a report shows about the model."""
    return {
        "model": arguments.model_name_or_path,
        "model_revision": arguments.model_revision,
        "trained_before": trained,
        "saved": "adapter" if hasattr(model, "peft_config") else "model",
        "num_parameters": count_parameters(model),
        "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "language_model": kind_of_model(model),
        "quantization": describe_quantization(model),
    }


def task_facts(task: Task, data: DataArguments, *, masked: bool) -> dict[str, Any]:
    """Return what a report shows about the task."""
    return {
        "task": task_name(data),
        "protocol": data.protocol,
        **wording(task, masked=masked),
        "metric": task.metric,
        "num_demonstrations": data.num_demonstrations,
    }


def wording(task: Task, *, masked: bool) -> dict[str, Any]:
    """Return the template and, where all examples share them, the words that were scored."""
    words = getattr(task, "masked_label_words", ()) if masked else ()
    template = task.masked_template if masked and task.masked_template else task.template
    return {"template": template, "label_words": list(words or getattr(task, "label_words", ()))}


def evaluations(history: Sequence[dict[str, Any]], forwards_at: Callable[[float], int]) -> list[dict[str, Any]]:
    """Return the evaluations during training, each with the forwards used until then.

    Args:
        history: What the Trainer logged.
        forwards_at: Returns the forwards that had been used after a number of steps.
    """
    return [
        {"step": row["step"], "forwards": forwards_at(row["step"]), **measures(row, "eval")}
        for row in history
        if "eval_loss" in row
    ]


def measures(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """Pick loss and metrics, as ``loss``, ``accuracy`` and so on, from what the Trainer reports."""
    names = dict.fromkeys(("loss", *(name for names in MEASURED.values() for name in names)))
    return {name: row[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in row}


def repeat_facts(command: Sequence[str]) -> dict[str, Any]:
    """Return what somebody needs to repeat the run."""
    return {
        "command": shlex.join(["zokernel", *command]),
        "versions": {"zokernel": __version__, "torch": torch.__version__},
    }
