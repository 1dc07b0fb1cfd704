"""Any trainer's arguments, with the settings of zeroth-order training added to them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from transformers import TrainingArguments

from zokernel.errors import UsageError
from zokernel.finetune.settings.check import check_output, check_rule
from zokernel.finetune.settings.saving import refuse_lost_best, refuse_unknown_best
from zokernel.finetune.settings.unsupported import keep_no_activations, refuse_unsupported
from zokernel.finetune.settings.zo_arguments import AUTO, ZOArguments, default_of, is_first_order
from zokernel.values import plain_fields

logger = logging.getLogger(__name__)

# Settings of TrainingArguments that may be given here, too: a rate for zeroth-order steps, and a strategy of our own.
OWN = ("learning_rate", "save_strategy")
# What the constructor of TrainingArguments fills in by itself.
FILLED_IN = (
    *("accelerator_config", "activation_checkpointing", "gradient_checkpointing", "debug", "disable_tqdm", "report_to"),
    *("logging_dir", "use_cpu"),
)


def add_zeroth_order(args: TrainingArguments, settings: Mapping[str, Any]) -> Any:
    """Return a copy of a trainer's arguments that has the fields of :class:`ZOArguments`, too.

    The copy is of a class derived from that of ``args``, so that a trainer finds what it expects.

    Args:
        args: The arguments of a trainer, such as ``SFTConfig``.
        settings: Settings of ``ZOArguments`` by name, and those in :data:`OWN`.

    Returns:
        The copy, with the names of all settings that are not defaults in ``given``.

    Raises:
        UsageError: If there is no such setting, or one cannot be honoured by a zeroth-order step.

    Example:
        >>> args = add_zeroth_order(TrainingArguments("runs/mine", learning_rate=1e-4), {"method": "kerzoo"})
        >>> args.method, args.learning_rate, isinstance(args, TrainingArguments), sorted(args.given)
        ('kerzoo', 0.0001, True, ['learning_rate', 'method', 'output_dir'])
    """
    if isinstance(args, ZOArguments):
        if settings:
            raise UsageError(f"{type(args).__name__} holds {', '.join(settings)} itself: set it there, not twice.")
        return args
    names = [*(f.name for f in fields(ZOArguments)), *OWN]
    for name in settings:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise UsageError(
                f"zeroth_order has no setting {name!r}"
                + (f" (did you mean {close[0]}?)." if close else f": it has {', '.join(names)}.")
            )
    kind: Any = type(args)
    combined: Any = object.__new__(_combined_class(kind))
    vars(combined).update(vars(args))
    vars(combined).update({f.name: f.default for f in fields(ZOArguments)} | dict(settings))
    plain_fields(combined)
    combined.check_method(by_example=False)
    check_output(combined.output_dir)
    for name in OWN:
        check_rule(name, getattr(combined, name))
    refuse_unknown_best(combined)
    refuse_lost_best(combined)
    own_fields = [f for f in fields(args) if f.init and f.name not in FILLED_IN]
    changed = {f.name for f in own_fields if getattr(args, f.name, None) != default_of(f)}
    combined.given = frozenset(changed | settings.keys())
    _check_rate(combined, type(args).__name__)
    if not is_first_order(combined.method):
        keep_no_activations(combined)
        if combined.max_grad_norm == 1.0:
            combined.max_grad_norm = 0.0
    refuse_unsupported(combined)
    return combined


def _check_rate(combined: Any, name: str) -> None:
    """Leave the rate of ``auto`` open, and warn of a rate that was made for gradients."""
    if "learning_rate" in combined.given:
        return
    if combined.method == AUTO:
        combined.learning_rate = None
    elif not is_first_order(combined.method):
        logger.warning(
            "learning_rate is %g, the default of %s, which is meant for gradients: zeroth-order methods usually need "
            "about 1e-5 for all weights and 1e-3 for LoRA.",
            combined.learning_rate,
            name,
        )


@cache
def _combined_class(kind: type) -> type:
    """Return a dataclass with the fields of ``ZOArguments`` and of ``kind``."""
    return dataclass(type(f"ZO{kind.__name__}", (ZOArguments, kind), {"__doc__": kind.__doc__, "given": frozenset()}))
