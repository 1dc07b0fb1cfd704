"""Adapters of peft: LoRA and its variants, prefix and prompt tuning; new ones and saved ones."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from torch import nn

from zokernel.errors import MissingDependencyError, UsageError, first_line
from zokernel.finetune.models.kind import Kind, kind_of_model
from zokernel.finetune.models.lora import attach_lora
from zokernel.finetune.models.saved_adapter import adapter_config, load_saved, log_base, name_base_
from zokernel.finetune.models.virtual_tokens import attach_prefix, attach_prompt
from zokernel.finetune.settings.arguments import ModelArguments

__all__ = ["attach_adapter", "check_adapter", "log_base", "part_to_train", "trains_adapter", "virtual_tokens"]

logger = logging.getLogger(__name__)

KINDS = ("lora", "prefix_tuning", "prompt_tuning")
LORA_OPTIONS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "target_parameters",
    "modules_to_save",
    "use_dora",
    "use_rslora",
)


def trains_adapter(arguments: ModelArguments) -> bool:
    """Return whether only an adapter is trained."""
    return bool(arguments.lora or arguments.prefix_tuning or arguments.prompt_tuning or arguments.adapter_name_or_path)


def part_to_train(arguments: ModelArguments) -> str:
    """Return which part of a model will be trained, as a key of ``settings.resolve.LEARNING_RATES``.

    A saved adapter is trained as what it is.

    Raises:
        UsageError: If there is no such adapter.
    """
    if arguments.adapter_name_or_path:
        return "virtual tokens" if adapter_config(arguments.adapter_name_or_path).is_prompt_learning else "LoRA"
    if arguments.prefix_tuning or arguments.prompt_tuning:
        return "virtual tokens"
    if arguments.train == "scales":
        return "scales"
    return "LoRA" if arguments.lora else "full parameters"


def check_adapter(arguments: ModelArguments) -> None:
    """Refuse options that no adapter would use, and kinds that do not go together.

    Raises:
        UsageError: If there are any.

    Example:
        >>> check_adapter(ModelArguments(use_dora=True))
        Traceback (most recent call last):
        zokernel.errors.UsageError: --use_dora is an option of LoRA: add --lora true.
    """
    kinds = [name for name in KINDS if getattr(arguments, name)]
    if len(kinds) > 1:
        raise UsageError(f"One adapter is trained at a time: choose one of {', '.join(f'--{k}' for k in kinds)}.")
    options = {name: getattr(arguments, name) for name in LORA_OPTIONS}
    lora = [name for name, value in options.items() if value is not None and value is not False]
    tokens = ["num_virtual_tokens"] if arguments.num_virtual_tokens is not None else []
    if arguments.adapter_name_or_path:
        _check_saved(arguments, kinds, lora + tokens)
        return
    if lora and not arguments.lora:
        raise UsageError(f"--{lora[0]} is an option of LoRA: add --lora true.")
    if tokens and not (arguments.prefix_tuning or arguments.prompt_tuning):
        raise UsageError(
            "--num_virtual_tokens is an option of virtual tokens: add --prompt_tuning true or --prefix_tuning true."
        )
    if arguments.target_parameters:
        for name in ("use_dora", "lora_dropout"):
            if getattr(arguments, name):
                raise UsageError(f"--target_parameters does not go together with --{name} in peft: leave one out.")


def check_peft(what: str) -> None:
    """Refuse to go on without the library of adapters.

    Args:
        what: What needs it.

    Raises:
        MissingDependencyError: If peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("peft", "finetune", what)


def attach_adapter(model: nn.Module, arguments: ModelArguments, *, seed: int = 0, first_order: bool = False) -> Any:
    """Wrap a model with a new adapter, or with a saved one to continue.

    Args:
        model: A language model of transformers.
        arguments: Which adapter.
        seed: Seed of the virtual tokens' start.
        first_order: Whether gradients are taken, in which dropout is on.

    Returns:
        The peft model, in evaluation mode.

    Raises:
        UsageError: If the adapter or its target modules do not exist, or options do not go together.
        MissingDependencyError: If peft is not installed.
    """
    check_peft("An adapter")
    check_adapter(arguments)
    if arguments.adapter_name_or_path:
        adapted = load_saved(model, arguments.adapter_name_or_path)
    else:
        try:
            adapted = _new_adapter(model, arguments, kind_of_model(model), seed)
        except (ValueError, OSError) as error:
            name = "LoRA adapter" if arguments.lora else "adapter"
            raise UsageError(f"The {name} could not be attached: {first_line(error)}") from error
    name_base_(adapted, arguments.model_name_or_path, arguments.model_revision)
    dropout = max(getattr(c, "lora_dropout", 0.0) or 0.0 for c in adapted.peft_config.values())
    if dropout and not first_order:
        logger.info("lora_dropout %g is stored with the adapter, and is off: a zeroth-order step has none.", dropout)
    return adapted.eval()


def virtual_tokens(model: Any) -> int:
    """Return how many virtual tokens an adapter puts before the input."""
    if not hasattr(model, "peft_config"):
        return 0
    return sum(getattr(c, "num_virtual_tokens", 0) or 0 for c in model.peft_config.values())


def _new_adapter(model: nn.Module, arguments: ModelArguments, kind: Kind, seed: int) -> Any:
    # peft has no masked-LM task: virtual tokens need a class that prepends them, LoRA works inside any model.
    tasks: dict[Kind, Any] = {"causal": "CAUSAL_LM", "masked": None, "seq2seq": "SEQ_2_SEQ_LM"}
    if arguments.lora:
        return attach_lora(model, arguments, tasks[kind])
    count = arguments.num_virtual_tokens or 5
    if kind == "seq2seq":
        raise UsageError("Virtual tokens are for causal and masked models: train this one with --lora true.")
    if arguments.prompt_tuning:
        return attach_prompt(model, count, tasks[kind] or "FEATURE_EXTRACTION", seed=seed)
    if kind == "masked":
        raise UsageError("Masked language models take no prefix of keys and values: use --prompt_tuning or --lora.")
    return attach_prefix(model, count, tasks[kind], seed=seed)


def _check_saved(arguments: ModelArguments, kinds: list[str], options: list[str]) -> None:
    name = arguments.adapter_name_or_path
    if options:
        raise UsageError(f"The saved adapter {name} has its own {options[0]}: leave out --{options[0]}.")
    if kinds and (kinds[0] == "lora") != (part_to_train(arguments) == "LoRA"):
        raise UsageError(f"The saved adapter {name} is of another kind: leave out --{kinds[0]}.")
