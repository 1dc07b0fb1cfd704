"""The methods that make up a step of the trainer, and the part of the step to which each belongs."""

from __future__ import annotations

from typing import Any

from zokernel.finetune.monitor.profile import DATA, EVALUATION, FORWARDS, JOURNAL, LOGGING, PERTURBATION, UPDATE
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.trainer.choose_perturb import innermost


def describe_step(args: ZOConfig, forwards: int) -> str:
    """Return in words how a run takes a step."""
    return (
        f"{args.method}, {forwards} losses per step, perturb {args.perturb}; "
        f"{args.precision}; batch {args.train_batch_size} x {args.gradient_accumulation_steps}"
    )


def step_parts(loop: Any, optimizer: Any, journal: Any, callbacks: Any) -> list[tuple[str, Any, str]]:
    """Return (part, object, name of its method); methods that an object lacks are left out.

    Args:
        loop: The trainer.
        optimizer: Its optimizer.
        journal: Its journal, if any.
        callbacks: What calls its callbacks.
    """
    perturb = innermost(optimizer.perturb)
    parts: list[tuple[str, Any, str]] = [
        (FORWARDS, loop, "compute_loss"),
        (FORWARDS, perturb, "batched_losses"),
        (PERTURBATION, optimizer.perturb, "losses"),
        (PERTURBATION, getattr(perturb, "schedule", None), "copy"),
        (PERTURBATION, getattr(perturb, "schedule", None), "copy_rows"),
        (UPDATE, optimizer, "step"),
        (DATA, loop, "get_batch_samples"),
        (DATA, loop, "_prepare_inputs"),
        (JOURNAL, journal, "step"),
        (LOGGING, loop, "log"),
        (LOGGING, callbacks, "on_step_begin"),
        (LOGGING, callbacks, "on_step_end"),
        (EVALUATION, loop, "evaluate"),
        (EVALUATION, loop, "_save_checkpoint"),
    ]
    return [(part, owner, name) for part, owner, name in parts if hasattr(owner, name)]
