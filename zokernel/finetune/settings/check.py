"""Values that no run can work with, named before data are read and before a model is loaded."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from zokernel.errors import RunError, UsageError
from zokernel.finetune.settings.zo_arguments import AUTO, default_of
from zokernel.optim import get_method, method_options
from zokernel.perturb.parallel import MODES
from zokernel.readable import plural
from zokernel.values import is_number, is_whole, plain_fields

OBJECTIVES = ("cross_entropy", "accuracy", "f1", "reward")
MAX_SEED = 2**32 - 1  # numpy's
_CONSTANT = (None, SchedulerType.CONSTANT)


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        holds: Whether a value is one.
        must_be: What it must be, for the message.
        whole: Whether it must be a whole number besides.
    """

    holds: Callable[[Any], bool]
    must_be: str
    whole: bool = False


def _one_of(names: Sequence[Any]) -> Rule:
    words = [str(getattr(name, "value", name)) for name in names]
    return Rule(lambda value: str(getattr(value, "value", value)) in words, f"one of {', '.join(words)}")


POSITIVE = Rule(lambda value: is_number(value) and value > 0, "positive")
NOT_NEGATIVE = Rule(lambda value: is_number(value) and value >= 0, "at least 0")
COUNT = Rule(lambda value: value >= 1, "at least 1", whole=True)
COUNT_OR_NONE = Rule(lambda value: value >= 0, "at least 0", whole=True)
COUNT_OR_ALL = Rule(lambda value: value >= 1 or value == -1, "at least 1, or -1 for all", whole=True)
SHARE = Rule(lambda value: is_number(value) and 0 <= value < 1, "at least 0 and below 1")
INTERVAL = Rule(
    lambda value: is_number(value) and value > 0 and (value < 1 or value == int(value)),
    "a number of steps from 1 on, or a share of the run below 1",
)
SEED = Rule(lambda value: is_whole(value, 0) and value <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}")

RULES: dict[str, Rule] = {
    "eps": POSITIVE,
    "learning_rate": NOT_NEGATIVE,
    "num_perturbations": COUNT,
    "momentum": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "max_steps": Rule(lambda value: value >= 1 or value == -1, "at least 1, or -1 for whole epochs", whole=True),
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "warmup_steps": NOT_NEGATIVE,
    "lr_scheduler_type": _one_of(list(SchedulerType)),
    "seed": SEED,
    "data_seed": SEED,
    "freeze_layers": SHARE,
    "zo_parallel": _one_of(MODES),
    "zo_point_ranks": COUNT,
    "objective": _one_of(OBJECTIVES),
    "logging_strategy": _one_of(list(IntervalStrategy)),
    "eval_strategy": _one_of(list(IntervalStrategy)),
    "save_strategy": _one_of([*SaveStrategy, "journal"]),
    "save_total_limit": COUNT,
    "early_stopping_patience": COUNT,
    "eval_delay": NOT_NEGATIVE,
    "eval_accumulation_steps": COUNT,
    "torch_empty_cache_steps": COUNT,
    "dataloader_num_workers": COUNT_OR_NONE,
    "dataloader_prefetch_factor": COUNT,
    "ddp_timeout": POSITIVE,
    "train_sampling_strategy": _one_of(("random", "sequential", "group_by_length")),
    # Of ModelArguments and DataArguments.
    "lora_r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    "num_virtual_tokens": COUNT,
    "lm_type": _one_of(("auto", "causal", "masked", "seq2seq")),
    "max_train_samples": COUNT_OR_ALL,
    "max_eval_samples": COUNT_OR_ALL,
    "max_test_samples": COUNT_OR_ALL,
    "max_length": COUNT,
    "k_shot": COUNT,
    "num_demonstrations": COUNT_OR_NONE,
    "max_new_tokens": COUNT,
    "num_generations": COUNT,
    "temperature": NOT_NEGATIVE,
    "beta": NOT_NEGATIVE,
}
"""What settings must be, by name; a setting without a value is not looked at."""

INTERVALS = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}
"""Steps that count only under the strategy ``steps``."""


def check_rule(name: str, value: Any, rules: Mapping[str, Rule] = RULES) -> None:
    """Refuse a value that its setting cannot have; None stands for a default.

    Raises:
        UsageError: If there is a rule for the setting, and the value does not hold to it.
    """
    rule = rules.get(name)
    if rule is None or value is None:
        return
    if rule.whole and not is_whole(value, least=-math.inf):
        hint = f": write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise UsageError(f"{name} must be a whole number, not {value!r}{hint}.")
    if not rule.holds(value):
        raise UsageError(f"{name} must be {rule.must_be}, not {getattr(value, 'value', value)!r}.")


def check_output(folder: str | None, what: str = "The output folder") -> None:
    """Refuse a folder to write to that is a file, or would be in one.

    Args:
        folder: The folder; None if there is none.
        what: What it is, for the message.

    Raises:
        RunError: If it is.
    """
    for path in (Path(folder), *Path(folder).parents) if folder else ():
        if path.is_file():
            raise RunError(f"{what} {folder} cannot be written: {path} is a file, so choose another.")


def check_values(settings: Any) -> None:
    """Refuse values that no run can work with; numbers of other libraries become Python's own.

    Args:
        settings: A dataclass of settings: ``ZOConfig``, ``ModelArguments`` or ``DataArguments``.

    Raises:
        UsageError: If there is one.

    Example:
        >>> from zokernel.finetune.settings.arguments import DataArguments
        >>> check_values(DataArguments(max_length=0))
        Traceback (most recent call last):
        zokernel.errors.UsageError: max_length must be at least 1, not 0.
    """
    plain_fields(settings)
    declared = {f.name: f for f in fields(settings)}
    values = {name: getattr(settings, name, None) for name in declared}
    kinds = _declared_kinds(type(settings))
    rules = dict(RULES)
    rules |= {name: INTERVAL for name, strategy in INTERVALS.items() if values.get(strategy) == "steps"}
    for name, value in values.items():
        if value in ("", []) and value != default_of(declared[name]) and name != "output_dir":
            raise UsageError(f"{name} is empty: give it a value, or leave it out.")
        check_rule(name, value, rules)
        if name in kinds and value != default_of(declared[name]):
            _check_kind(name, value, kinds[name])
        if name.endswith(("_kwargs", "_config")) and isinstance(value, str) and value.startswith("{"):
            _check_json(name, value)
    check_output(values.get("output_dir"))
    if "warmup_steps" in values:
        _check_warmup(values)
    if values.get("dataloader_prefetch_factor") is not None and not values["dataloader_num_workers"]:
        raise UsageError(
            "dataloader_prefetch_factor is for data that other processes load: set dataloader_num_workers."
        )
    check_login(values.get("report_to"))
    if values.get("method", AUTO) != AUTO:
        try_method(settings)


def _declared_kinds(settings: type) -> dict[str, set[str]]:
    """Return the types that this package declares for settings; HfArgumentParser overwrites those of the fields."""
    own = [cls for cls in reversed(settings.__mro__) if cls.__module__.startswith("zokernel.")]
    annotations = {name: kind for cls in own for name, kind in inspect.get_annotations(cls).items()}
    return {name: set(str(kind).split(" | ")) for name, kind in annotations.items()}


def _check_kind(name: str, value: Any, kinds: set[str]) -> None:
    """Refuse a value that is missing, or is no switch or text where the setting is declared as one.

    Raises:
        UsageError: If it is.
    """
    if value is None and "None" not in kinds:
        raise UsageError(f"{name} is empty: give it a value, or leave it out.")
    if kinds == {"bool"} and not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {value!r}.")
    if "str" in kinds and kinds <= {"str", "None"} and not (value is None or isinstance(value, str | os.PathLike)):
        raise UsageError(f"{name} must be text, not {value!r}.")


def try_method(arguments: Any) -> None:
    """Make the method's optimizer on a few numbers, so that wrong options are refused before a model is loaded.

    Raises:
        UsageError: If an option is unknown or out of range, or options do not go together.
    """
    if draws_by_example(arguments) and getattr(arguments, "objective", "cross_entropy") in ("accuracy", "f1"):
        raise UsageError(
            f"Method {arguments.method} gives every example directions of its own, and objective {arguments.objective} "
            "is not a mean over losses of examples: choose objective cross_entropy, or another method."
        )


def draws_by_example(arguments: Any) -> bool:
    """Return whether the method gives every example of a batch directions of its own."""
    return getattr(getattr(_small_optimizer(arguments), "perturb", None), "name", None) == "per_example"


def losses_per_step(arguments: Any) -> int:
    """Return the number of losses per step of the method; 1 if it takes gradients."""
    return int(getattr(_small_optimizer(arguments), "forwards_per_step", 1))


def exact_perturb(arguments: Any) -> str:
    """Return how weights below fp32 are perturbed unless told otherwise: exactly, without a copy of them if possible.

    A method that leaves them in place by itself does so, which ``auto`` says.
    """
    optimizer = _small_optimizer(arguments)
    if optimizer.perturb.name != "in_place":
        return AUTO
    return "in_place:copy" if arguments.torch_compile or optimizer.directions.couples_tensors else "in_forward"


def _small_optimizer(arguments: Any) -> Any:
    """Return the method's optimizer on a few numbers."""
    options, perturb, rate = arguments.method_options(), arguments.perturb, arguments.learning_rate
    if perturb.startswith("in_") and "perturb" in method_options(arguments.method):
        options["perturb"] = perturb
    small = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float32))
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # a method logs about itself when the run makes it
    try:
        make: Any = get_method(arguments.method)
        return make([("small", small)], lr=1e-5 if rate is None else rate, **options)
    finally:
        logging.disable(disabled)


def _check_json(name: str, value: str) -> None:
    try:
        json.loads(value)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name} is not valid JSON ({error}): write it as '{{\"key\": 1}}'.") from error


def _check_warmup(values: dict[str, Any]) -> None:
    warmup, steps = values["warmup_steps"] or 0, values["max_steps"] or -1
    if warmup >= 1 and 0 < steps < warmup:
        raise UsageError(
            f"warmup_steps {warmup:g} is longer than the run of {plural(steps, 'step')}: lower it, or give a share "
            "below 1."
        )
    if warmup and values.get("method") != AUTO and values["lr_scheduler_type"] in _CONSTANT:
        raise UsageError(
            "warmup_steps has no effect with a constant learning rate: set lr_scheduler_type constant_with_warmup, "
            "linear or cosine."
        )


def check_metric(name: str | None, metrics: Sequence[str]) -> None:
    """Refuse to choose the best step by a measure that the evaluations do not have.

    Args:
        name: ``metric_for_best_model``.
        metrics: What the evaluations measure beside the loss.

    Raises:
        UsageError: If it is none of them.

    Example:
        >>> check_metric("eval_accuracy", ["accuracy", "f1"])
        >>> check_metric("bleu", ["accuracy", "f1"])
        Traceback (most recent call last):
        zokernel.errors.UsageError: metric_for_best_model must be one of loss, accuracy, f1, not 'bleu'.
    """
    names = list(dict.fromkeys(["loss", *metrics]))
    if name is not None and name.removeprefix("eval_") not in names:
        raise UsageError(f"metric_for_best_model must be one of {', '.join(names)}, not {name!r}.")


def check_login(report_to: str | Sequence[str] | None) -> None:
    """Refuse to report to Weights & Biases without a login: it would ask for one in the middle of the run.

    Raises:
        UsageError: If nobody is logged in, or it names nothing.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if not isinstance(names, Sequence):
        raise UsageError(f"report_to is a name or a list of names, not {report_to!r}.")
    is_offline = os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun")
    reports_to_wandb = "wandb" in names or ("all" in names and "wandb" in get_available_reporting_integrations())
    if not reports_to_wandb or is_offline or os.environ.get("WANDB_API_KEY") or _has_login():
        return
    raise UsageError(
        "report_to wandb needs a login: run 'wandb login' or set WANDB_API_KEY (WANDB_MODE=offline keeps the log "
        "on this machine)."
    )


def _has_login() -> bool:
    """Return whether ``wandb login`` has left a key in the netrc file."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    netrc_file = os.environ.get("NETRC")
    for path in [Path(netrc_file)] if netrc_file else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def lower_is_better(config: Any) -> Any:
    """Return the settings for a run whose best step has the lowest perplexity, which transformers takes for a score."""
    if str(config.metric_for_best_model).removeprefix("eval_") != "perplexity":
        return config
    config = copy.copy(config)
    config.greater_is_better = False
    return config
