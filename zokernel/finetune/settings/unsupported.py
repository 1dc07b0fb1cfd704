"""Settings of ``TrainingArguments`` that a zeroth-order step cannot honour: refused by name, never ignored."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from zokernel.errors import UsageError
from zokernel.finetune.settings.zo_arguments import default_of, is_first_order

logger = logging.getLogger(__name__)

_OPTIMIZER = "the optimizer is chosen by method, and its options by method_args"
_BACKWARD = "there is no backward pass"
_ACTIVATIONS = "without a backward pass, no activation is kept"
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
_WHOLE = "every process holds the whole model; several processes share the losses of a step (zo_parallel)"

ALWAYS = {
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), _OPTIMIZER),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), _OPTIMIZER),
    "fp16": "use bf16",
    "bf16_full_eval": "it would convert the weights that are trained; bf16 alone runs evaluations under autocast",
    "fp16_full_eval": "it would convert the weights that are trained; use bf16",
    "ignore_data_skip": "a resumed run would see other examples than the run it continues",
}
"""Why each setting is refused, whatever the method."""

ZEROTH_ORDER = {
    "max_grad_norm": "there is no gradient to clip",
    "neftune_noise_alpha": "the losses of a step would see different noise",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _WHOLE),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), _BACKWARD),
    "ddp_static_graph": _BACKWARD,
    **dict.fromkeys((*_CHECKPOINTING, *(f"{name}_kwargs" for name in _CHECKPOINTING)), _ACTIVATIONS),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "its kernels replace what a forward perturbs"),
}
"""Why each setting is refused with a zeroth-order method."""

FIRST_ORDER = {"perturb": "gradients are taken at the weights themselves"}
"""Why each setting is refused with a method that takes gradients."""

SCORED = {
    "label_smoothing_factor": "the loss is the task's own",
    "prediction_loss_only": "the report needs predictions",
    "batch_eval_metrics": "metrics are taken over the whole split",
    "eval_do_concat_batches": "metrics are taken over the whole split",
    "include_for_metrics": "the metric is the task's own",
    "label_names": "batches are the task's own",
    "remove_unused_columns": "batches carry what scoring needs",
    "do_predict": "the test split is always evaluated; 'zokernel predict' answers other rows",
}
"""Why each setting is refused where zokernel scores the examples itself: in the job, and in ``ZOTrainer``."""


def keep_no_activations(args: Any) -> None:
    """Turn off in somebody's arguments for gradients what saves memory of a backward pass, and say so."""
    for name in (*_CHECKPOINTING, "activation_offloading"):
        if getattr(args, name, None):
            logger.info("%s is off: %s.", name, _ACTIVATIONS)
            setattr(args, name, False)
        if getattr(args, f"{name}_kwargs", None):
            setattr(args, f"{name}_kwargs", None)


def refuse_unsupported(args: Any, *, scored: bool = False, explicit: Collection[str] = ()) -> None:
    """Refuse settings that would be ignored.

    A setting that only a zeroth-order step ignores may be given at its default, so that the same flags serve a
    first-order baseline: that it has no effect is logged.

    Args:
        args: ``TrainingArguments`` with the fields of ``ZOArguments``.
        scored: Whether zokernel's own objective scores the examples.
        explicit: Settings that the user set, even if their values are the defaults.

    Raises:
        UsageError: If any is set; all of them are named.
    """
    refused = ALWAYS | (FIRST_ORDER if is_first_order(args.method) else ZEROTH_ORDER) | (SCORED if scored else {})
    reasons: dict[str, str] = {}
    for f in fields(args):
        if f.name not in refused:
            continue
        default, value = default_of(f), getattr(args, f.name)
        turned_off = default is True and f.name not in _CHECKPOINTING  # which is off in any case
        changed = value != default and (value or turned_off)
        if not changed and value and f.name in explicit and f.name in ZEROTH_ORDER:
            logger.info("%s %s has no effect on %s: %s.", f.name, value, args.method, refused[f.name])
        elif changed or (value and f.name in explicit):
            value = getattr(value, "value", value)  # of an enumeration
            reasons[f"{f.name}={value!r}"] = refused[f.name]
    if reasons:
        why, them = "; ".join(dict.fromkeys(reasons.values())), "it" if len(reasons) == 1 else "them"
        raise UsageError(f"{', '.join(reasons)} cannot be honoured here ({why}): leave {them} out.")
