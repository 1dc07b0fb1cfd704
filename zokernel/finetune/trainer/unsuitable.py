"""Trainers whose steps cannot be taken with forward passes only, and why."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from zokernel.errors import UsageError
from zokernel.finetune.settings.zo_arguments import ZOArguments

# Trainers of trl that sample within a step; experimental ones have the names only.
_SAMPLING_METHODS = (
    *("_generate_and_score_completions", "_generate_single_turn", "_generate_student_completions", "sample_rollouts"),
)
_SAMPLING = (
    *("PPOTrainer", "OnlineDPOTrainer", "NashMDTrainer", "XPOTrainer", "GKDTrainer", "GOLDTrainer", "A2POTrainer"),
    *("AsyncGRPOTrainer", "AsyncDistillationTrainer"),
)


def refuse_unsuitable(trainer: Any) -> None:
    """Refuse a trainer whose losses at several weights would not compare.

    Raises:
        UsageError: If it is one.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise UsageError(f"zeroth_order takes a class, transformers' Trainer or one derived from it, not {trainer!r}.")
    names = [kind.__name__ for kind in trainer.__mro__]
    samples = any(hasattr(trainer, name) for name in _SAMPLING_METHODS) or any(name in names for name in _SAMPLING)
    if samples:
        raise UsageError(
            f"{trainer.__name__} samples new completions within a step, so losses at perturbed weights would differ by "
            "the samples, not by the weights: use a trainer whose loss is a function of weights and batch, or train on "
            "rewards with 'zokernel finetune --objective reward --reward_function file.py:name'."
        )


def refuse_other_arguments(trainer: type[Trainer], args: Any) -> None:
    """Refuse a ``ZOConfig`` where a trainer needs arguments of its own, such as ``SFTConfig``.

    Args:
        trainer: The class that ``zeroth_order`` was given.
        args: Its arguments.

    Raises:
        UsageError: If they are not of the class that its constructor names.
    """
    if not isinstance(args, ZOArguments):
        return
    parameter = inspect.signature(trainer.__init__).parameters.get("args")
    names = re.findall(r"\w+", str(parameter and parameter.annotation))
    classes: dict[str, Any] = {name: getattr(sys.modules[trainer.__init__.__module__], name, None) for name in names}
    if issubclass(trainer, Seq2SeqTrainer):  # which names TrainingArguments, and needs more
        classes["Seq2SeqTrainingArguments"] = Seq2SeqTrainingArguments
    for name, kind in classes.items():
        is_own = isinstance(kind, type) and issubclass(kind, TrainingArguments) and kind is not TrainingArguments
        if is_own and not isinstance(args, kind):
            raise UsageError(
                f"{trainer.__name__} takes a {name}, not a {type(args).__name__}: give it {name}(...), and "
                f"zeroth_order({trainer.__name__}, method=...) the settings of zeroth-order training."
            )


def refuse_skipped_step(trainer: Any, steps: int, optimizer_steps: int) -> None:
    """Refuse a ``training_step`` that does not call that of its base class.

    Args:
        trainer: The trainer.
        steps: Steps of the loop.
        optimizer_steps: Steps of the optimizer.

    Raises:
        UsageError: If the optimizer took fewer steps.
    """
    if optimizer_steps < steps:
        raise UsageError(
            f"{type(trainer).__name__}.training_step took no zeroth-order step: let it call super().training_step."
        )
