"""LoRA and its variants: which modules are adapted, said and checked before peft sees them."""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn

from zokernel.errors import UsageError
from zokernel.finetune.models.quantized_model import count_parameters
from zokernel.finetune.models.stacked import ADAPTABLE, short_names, stacked_parameters
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.readable import plural

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
DEFAULT_RANK = 8
# peft refuses to adapt the last projection of these mixers, whose weight their fused kernels read directly.
_FUSED = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def attach_lora(model: nn.Module, arguments: ModelArguments, task_type: Any) -> Any:
    """Attach a new LoRA adapter, and say to which modules.

    Args:
        model: A language model of transformers.
        arguments: Rank, modules and variant.
        task_type: peft's name for the kind of model, or None.

    Returns:
        The peft model.

    Raises:
        UsageError: If a module or parameter that was named does not exist.
        ValueError: If peft cannot adapt one.
    """
    import peft

    targets = target_modules(model, arguments.lora_target_modules)
    fused = targets == ALL_LINEAR and _model_type(model) in _FUSED
    _check_saved(model, arguments.modules_to_save or [])
    _check_parameters(model, arguments.target_parameters or [])
    configuration = peft.LoraConfig(
        r=arguments.lora_r or DEFAULT_RANK,
        lora_alpha=arguments.lora_alpha or 16,
        lora_dropout=arguments.lora_dropout or 0.0,
        target_modules=targets,
        exclude_modules=["out_proj"] if fused else None,
        target_parameters=arguments.target_parameters,
        modules_to_save=arguments.modules_to_save,
        use_dora=arguments.use_dora,
        use_rslora=arguments.use_rslora,
        task_type=task_type,
    )
    stacked = {name: parameter.numel() for name, parameter in stacked_parameters(model).items()}
    total = count_parameters(model)
    adapted = peft.get_peft_model(model, configuration)
    names = adapted_modules(adapted)
    _log_adapted(names, arguments, fused=fused)
    if not arguments.target_parameters and (not arguments.lora_target_modules or targets == ALL_LINEAR):
        _log_stacked({name: count for name, count in stacked.items() if name not in names}, total)
    if arguments.modules_to_save:
        logger.info("Trained in full and saved with the adapter: %s.", ", ".join(arguments.modules_to_save))
    return adapted


def _log_adapted(names: list[str], arguments: ModelArguments, *, fused: bool) -> None:
    """Log to which modules an adapter was attached."""
    logger.info(
        "%s of rank %d on %s: %s%s.",
        "DoRA" if arguments.use_dora else "LoRA",
        arguments.lora_r or DEFAULT_RANK,
        plural(len(names), "module"),
        ", ".join(short_names(names)),
        " (not out_proj, whose weight the fused kernels read)" if fused else "",
    )


def _log_stacked(counts: dict[str, int], total: int) -> None:
    """Log which stacked parameters LoRA leaves out, if it leaves out any.

    Args:
        counts: Numbers in each, by name.
        total: Numbers in the model.
    """
    if not counts:
        return
    names = short_names(counts, parts=3)
    logger.info(
        "%s: not modules but stacked parameters, %.0f %% of the model, so LoRA leaves them out; "
        "--target_parameters %s adapts them.",
        ", ".join(names),
        100 * sum(counts.values()) / total,
        " ".join(names),
    )


def target_modules(model: nn.Module, requested: list[str] | None) -> str | list[str]:
    """Return the modules to adapt as peft takes them: names, a pattern, or ``all-linear``.

    Args:
        model: The model.
        requested: What the user named: nothing, ``all-linear``, names of modules or their ends, or one pattern that
            matches whole names.

    Returns:
        peft's ``target_modules``.

    Raises:
        UsageError: If something that was named matches no module.

    Example:
        >>> net = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)})
        >>> target_modules(net, ["q_proj"]), target_modules(net, ["[qv]_proj"]), target_modules(net, None)
        (['q_proj'], '[qv]_proj', 'all-linear')
        >>> target_modules(net, ["q_proj", "o_proj"])
        Traceback (most recent call last):
        zokernel.errors.UsageError: The model has no module 'o_proj' to adapt: its modules are q_proj, v_proj.
    """
    names = [name for name, _ in model.named_modules() if name]
    if requested is None:
        return _default_modules(model, names)
    if [word.lower() for word in requested] == [ALL_LINEAR]:
        return ALL_LINEAR
    unknown = [word for word in requested if not any(_ends_with(name, word) for name in names)]
    if len(requested) == 1 and unknown and _matches(unknown[0], names):
        return unknown[0]
    if unknown:
        adaptable = (name for name, module in model.named_modules() if type(module).__name__.startswith(ADAPTABLE))
        own = short_names(adaptable)
        pattern = len(requested) == 1 and not unknown[0].isidentifier()
        raise UsageError(
            f"The model has no module {'that matches ' if pattern else ''}{unknown[0]!r} to adapt: its modules are "
            f"{', '.join(own)}."
        )
    return list(requested)


def adapted_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that LoRA adapts, as the base model calls them; parameters by their own name."""
    from peft.tuners.lora import LoraLayer

    adapted = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            adapted.append(f"{own}.{parameter}" if parameter else own)
    return adapted


def _default_modules(model: nn.Module, names: list[str]) -> str | list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    model_type = _model_type(model)
    chosen: Any = DEFAULTS.get(model_type)
    if isinstance(chosen, str) and (chosen == ALL_LINEAR or _matches(chosen, names)):
        return chosen
    if chosen and not isinstance(chosen, str) and any(_ends_with(name, word) for name in names for word in chosen):
        return list(chosen)
    if model_type:
        logger.info("lora_target_modules: all linear layers but the head; peft has no choice for %s.", model_type)
    return ALL_LINEAR


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def _check_saved(model: nn.Module, requested: list[str]) -> None:
    modules = [(name, module) for name, module in model.named_modules() if name]
    for word in requested:
        if not any(_ends_with(name, word) for name, _ in modules):
            names = short_names(name for name, module in modules if any(True for _ in module.parameters(recurse=False)))
            raise UsageError(
                f"The model has no module {word!r} to train in full (modules_to_save): its modules are "
                f"{', '.join(names)}."
            )


def _check_parameters(model: nn.Module, requested: list[str]) -> None:
    parameters = dict(model.named_parameters())
    for word in requested:
        if not any(_ends_with(name, word) for name in parameters):
            stacked = short_names((name for name, p in parameters.items() if p.ndim == 3), parts=3)
            available = f"its stacked parameters are {', '.join(stacked)}" if stacked else "it has no stacked experts"
            raise UsageError(f"The model has no parameter {word!r} to adapt (target_parameters): {available}.")


def _ends_with(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _matches(pattern: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a valid pattern ({error}): name modules, or give all-linear.") from error
