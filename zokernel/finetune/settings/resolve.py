"""What a run is going to do, settled once and before it begins.

``ZOConfig`` is what the user asked for.  :func:`resolve` fills in what was left open, from the method's defaults, from
rules about model and data, and from the hardware, and keeps for every setting who decided it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError
from zokernel.finetune.settings import auto
from zokernel.finetune.settings.check import exact_perturb, try_method
from zokernel.finetune.settings.config import faster_in_bf16
from zokernel.finetune.settings.flag_files import keys_of
from zokernel.finetune.settings.record import RunSettings, Setting, as_json
from zokernel.finetune.settings.saving import default_eval_steps
from zokernel.finetune.settings.zo_arguments import AUTO, SHARED_OPTIONS, read_pairs
from zokernel.flags import given_flags
from zokernel.optim import method_options

logger = logging.getLogger(__name__)

BATCH, SCHEDULE = 16, "constant"
# One of the two matrices of LoRA starts at zero: 1e-2 is published for it (Malladi et al., 2023, arXiv:2305.17333).
PLAIN_EPS, LORA_EPS = 1e-3, 1e-2
LEARNING_RATES = {
    "full parameters": {"adamw": 1e-5, "sgd": 1e-3, "grzo": 1e-6, "": 1e-5},
    "LoRA": {"adamw": 1e-4, "sgd": 1e-2, "grzo": 1e-5, "": 1e-3},
    "scales": {"qzo": 1e-3, "": 1e-5},
    "virtual tokens": {"adamw": 1e-2, "sgd": 1e-2, "grzo": 1e-5, "": 1e-2},
}
# Beginnings of the names of settings that change nothing about the weights a run ends with.
COSMETIC = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_", "log_", "disable_tqdm", "report_to"),
    *("run_name", "profile", "project", "trackio_", "hub_", "push_to_hub", "dataloader_num_workers", "dataloader_p"),
    *("dataloader_multiprocessing", "skip_memory", "local_rank", "ddp_"),
)
# What keeps weights in bf16 or fp16 exact.
_EXACT = ("in_place:grid", "in_place:copy", "in_forward", "stacked")


def resolve(
    config: Any,
    *,
    trained: str,
    num_examples: int | None,
    by_example: bool = False,
    low_precision: str = "",
    command: Sequence[str] = (),
) -> RunSettings:
    """Decide everything that the user left open, but for what only the loaded model can tell.

    ``perturb="auto"`` stays until the optimizer has been made.

    Args:
        config: What the user asked for: a ``ZOConfig``, or other arguments with the fields of ``ZOArguments``.
        trained: What is trained: ``full parameters``, ``LoRA``, ``scales`` or ``virtual tokens``.
        num_examples: Training examples; None if their number is not known.
        by_example: Whether the loss of every example is known, and adapters are plain LoRA, so that ``auto`` may draw
            directions for every example.
        low_precision: Types below fp32 in which trained weights are stored, for the message; empty if none are.
        command: The command line, which tells flags from the settings of a recipe.

    Returns:
        The record of all settings.

    Raises:
        UsageError: If the settings do not fit each other or the model.

    Example:
        >>> from zokernel.finetune import ZOConfig
        >>> settings = resolve(ZOConfig(output_dir="runs/mine"), trained="LoRA", num_examples=100)
        >>> settings["learning_rate"], settings.setting("learning_rate").source
        (0.001, 'auto')
        >>> settings["eps"], settings.setting("eps").source
        (0.01, 'default')
    """
    requested, sources = config.to_dict(), setting_sources(config, command)
    choices = _Choices(requested, sources, [f.name for f in dataclasses.fields(config) if f.init])
    if config.method == AUTO:
        _choose_method(choices, config, trained, by_example=by_example)
    choices.fill("default", per_device_train_batch_size=BATCH, lr_scheduler_type=SCHEDULE)
    choices.fill("default", eval_steps=default_eval_steps(config.max_steps))
    if "precision" in choices.values:
        source = sources.get("bf16", "hardware") if config.precision == "auto" else None
        choices.decide(source, precision="bf16" if config.bf16 else "fp32")
    if choices["learning_rate"] is None:
        choices.fill("auto", learning_rate=_learning_rate(choices, trained, num_examples, config.world_size))
    _choose_options(choices, requested, trained, source=sources.get("method_args", "auto"))
    if low_precision and choices["perturb"] == AUTO:
        choices.decide("auto", perturb=exact_perturb(RunSettings(config, choices.settings()).arguments()))
    elif low_precision:
        refuse_low_precision(low_precision, choices["perturb"])
    batch = choices["per_device_train_batch_size"]
    if config.dataloader_drop_last and num_examples is not None and num_examples < batch:
        raise UsageError(
            f"dataloader_drop_last leaves no batch to train on: {num_examples} training examples are fewer than a "
            f"batch of {batch}."
        )
    settings = RunSettings(config, choices.settings())
    try_method(settings.arguments())
    if "precision" in choices.values and config.precision == "auto" and not (config.bf16 and "bf16" in sources):
        _log_precision(config.use_cpu)
    return settings


def _choose_method(choices: _Choices, config: Any, trained: str, *, by_example: bool) -> None:
    """Decide what ``--method auto`` stands for: method and options, batch, schedule, directions and radius."""
    choices.decide("auto", method=auto.METHOD)
    pairs, rate = config.method_args or [], config.learning_rate
    per_example = by_example and trained == "LoRA" and not auto.chooses_directions(pairs)
    choices.decide("auto", method_args=auto.method_args(pairs, learning_rate=rate, per_example=per_example))
    choices.fill("auto", per_device_train_batch_size=auto.BATCH, lr_scheduler_type=auto.SCHEDULE)
    batch = choices["per_device_train_batch_size"]
    choices.fill("auto", num_perturbations=1 if per_example else auto.num_perturbations(batch))
    if trained == "LoRA":
        choices.fill("auto", eps=auto.LORA_EPS)


def _choose_options(choices: _Choices, requested: Mapping[str, Any], trained: str, *, source: str) -> None:
    """Decide the options that have flags of their own: by ``method_args``, else by the defaults of the method.

    Args:
        choices: The choices, with the method.
        requested: What the user asked for.
        trained: What is trained.
        source: Who gave ``method_args``.

    Raises:
        UsageError: If an option is given by its flag and in ``method_args``.
    """
    options = method_options(choices["method"])
    pairs = read_pairs(choices["method_args"] or [], choices["method"])
    names_in_args = set(pairs) & set(SHARED_OPTIONS)
    for name in sorted(names_in_args):
        if requested[name] is not None:
            raise UsageError(f"{name} is given twice, by itself and in method_args: give it once.")
    choices.decide(source, **{name: pairs[name] for name in names_in_args})
    if trained == "LoRA" and options.get("eps") == PLAIN_EPS and choices["eps"] is None:
        choices.fill("default", eps=LORA_EPS)
        logger.info("eps: %g, the default for LoRA.", LORA_EPS)
    for name in SHARED_OPTIONS:
        if options.get(name) is not None and name not in names_in_args:
            choices.fill("default", **{name: options[name]})


def _log_precision(use_cpu: bool) -> None:
    """Log which precision the hardware decided."""
    faster, why = faster_in_bf16(use_cpu=use_cpu)
    precision = "forwards under bf16 autocast" if faster else "fp32"
    logger.info("Precision: %s (%s; override with precision).", precision, why)


def setting_sources(config: Any, command: Sequence[str] = ()) -> dict[str, str]:
    """Return where each explicit setting comes from: from the user, or from a recipe.

    Args:
        config: What the user asked for.
        command: The command line, if it came from there.

    Returns:
        ``user`` or ``recipe`` by name.

    Example:
        >>> command = ["finetune", "--config", "mezo-opt-sst2", "--max-steps=10"]
        >>> from zokernel.finetune import ZOConfig
        >>> sources = setting_sources(ZOConfig(output_dir="runs/mine"), command)
        >>> sources["max_steps"], sources["eps"]
        ('user', 'recipe')
    """
    if not command:
        return _with_perturb(dict.fromkeys(config.given, "user"))
    recipes = [
        word.partition("=")[2] or following
        for word, following in zip(command, [*command[1:], ""])
        if word.partition("=")[0] == "--config"
    ]
    recipe_keys = {key for recipe in recipes for key in keys_of(Path(recipe))}
    return _with_perturb(dict.fromkeys(recipe_keys, "recipe") | dict.fromkeys(given_flags(command), "user"))


def _with_perturb(sources: dict[str, str]) -> dict[str, str]:
    return sources | ({"perturb": sources["restore"]} if "restore" in sources else {})


def count_steps(max_steps: int, epochs: float, batch: int, examples: int | None) -> int:
    """Return the steps of a run: ``max_steps``, or what its epochs over so many training examples come to.

    Args:
        max_steps: Steps; -1 counts epochs.
        epochs: Epochs.
        batch: Examples per step.
        examples: Training examples.

    Raises:
        UsageError: If neither number is known.

    Example:
        >>> count_steps(-1, 3, 8, 100)
        38
    """
    if max_steps > 0:
        return max_steps
    if examples is None:
        raise UsageError("The number of training examples is not known, so epochs cannot be counted: set max_steps.")
    return max(1, math.ceil(epochs * examples / batch))


def refuse_low_precision(stored: str, perturb: str) -> None:
    """Refuse a way of perturbing that would not restore weights in bf16 or fp16.

    Raises:
        UsageError: If it would not.
    """
    if perturb not in _EXACT:
        raise UsageError(
            f"Trainable weights are stored in {stored}, where perturbing in place does not restore them exactly: "
            "set perturb to in_forward (no copy) or in_place:copy (one copy), or load them with dtype float32 "
            "(forwards may still run in bf16)."
        )


def _learning_rate(choices: _Choices, trained: str, num_examples: int | None, world_size: int) -> float:
    if choices.sources.get("method") != "auto":
        rates, name = LEARNING_RATES[trained], choices["method"]
        if name == "grzo" and "whiten=false" in (choices["method_args"] or []):
            return rates[""]
        # Rates of methods that divide slopes by their size are distances (GRZO's: times 1 / 2 eps), not for slopes.
        return rates.get(name, max(rates[""], method_options(name).get("lr") or 0.0))
    batch = choices["per_device_train_batch_size"] * choices["gradient_accumulation_steps"] * world_size
    steps = count_steps(choices["max_steps"], choices["num_train_epochs"], batch, num_examples)
    per_example = "per_example=true" in (choices["method_args"] or [])
    return auto.learning_rate(
        trained,
        num_perturbations=choices["num_perturbations"] * (batch if per_example else 1),
        steps=steps,
        schedule=str(choices["lr_scheduler_type"]),
    )


class _Choices:
    """Values and their sources while they are being decided."""

    def __init__(self, requested: Mapping[str, Any], sources: Mapping[str, str], names: Sequence[str]):
        names = [name for name in names if not name.startswith(COSMETIC) and name != "restore"]
        self.values = as_json({name: requested[name] for name in names})
        self.sources = {name: sources.get(name, "default") for name in self.values}

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def decide(self, source: str | None, **values: Any) -> None:
        self.values |= values
        self.sources |= {} if source is None else dict.fromkeys(values, source)

    def fill(self, source: str, **values: Any) -> None:
        self.decide(source, **{name: value for name, value in values.items() if self.values[name] is None})

    def settings(self) -> tuple[Setting, ...]:
        return tuple(Setting(name, value, self.sources[name]) for name, value in self.values.items())
