"""Adapters of peft: LoRA, prefix tuning and prompt tuning, for causal and masked language models."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from zokernel.errors import MissingDependencyError, UsageError, first_line
from zokernel.finetune.settings.arguments import ModelArguments

logger = logging.getLogger(__name__)


def wants_adapter(arguments: ModelArguments) -> bool:
    """Return whether only an adapter is trained."""
    return bool(arguments.lora or arguments.prefix_tuning or arguments.prompt_tuning or arguments.adapter_name_or_path)


def trained_by(arguments: ModelArguments) -> str:
    """Return what is trained: ``virtual tokens``, ``LoRA`` or ``full parameters``.

    A saved adapter counts as LoRA until it has been loaded.
    """
    if arguments.prefix_tuning or arguments.prompt_tuning:
        return "virtual tokens"
    return "LoRA" if wants_adapter(arguments) else "full parameters"


def attach_adapter(model: nn.Module, arguments: ModelArguments, *, masked: bool, seed: int = 0) -> nn.Module:
    """Wrap a model with a new adapter, or with a saved one to continue.

    Args:
        model: A language model of transformers.
        arguments: Which adapter.
        masked: Whether it is a masked language model.
        seed: Seed of the adapter's start.

    Returns:
        The peft model, in evaluation mode.

    Raises:
        UsageError: If the adapter or its target modules do not exist, or more than one kind is asked for.
        MissingDependencyError: If peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("peft", "finetune", "An adapter") from error
    kinds = [name for name in ("lora", "prefix_tuning", "prompt_tuning") if getattr(arguments, name)]
    if len(kinds) > 1:
        raise UsageError(f"One adapter is trained at a time: choose one of {', '.join(f'--{k}' for k in kinds)}.")
    if masked and arguments.prefix_tuning:
        raise UsageError("Masked language models take no prefix of keys and values: use --prompt_tuning or --lora.")
    # peft has no masked-LM task: virtual tokens need a class that prepends them, LoRA works inside any model.
    task_type: Any = "CAUSAL_LM" if not masked else "FEATURE_EXTRACTION" if arguments.prompt_tuning else None
    configuration: Any
    try:
        if arguments.adapter_name_or_path:
            return peft.PeftModel.from_pretrained(model, arguments.adapter_name_or_path, is_trainable=True).eval()
        if arguments.lora:
            configuration = peft.LoraConfig(
                r=arguments.lora_r,
                lora_alpha=arguments.lora_alpha,
                target_modules=arguments.lora_target_modules,
                task_type=task_type,
            )
        elif arguments.prefix_tuning:
            configuration = peft.PrefixTuningConfig(
                num_virtual_tokens=arguments.num_virtual_tokens, task_type=task_type, prefix_projection=False
            )
        else:
            configuration = peft.PromptTuningConfig(
                num_virtual_tokens=arguments.num_virtual_tokens, task_type=task_type
            )
        start = _activations(model, arguments.num_virtual_tokens, seed) if arguments.prefix_tuning else None
        adapted: Any = peft.get_peft_model(model, configuration).eval()
    except (ValueError, OSError) as error:
        name = "LoRA adapter" if arguments.lora or arguments.adapter_name_or_path else "adapter"
        raise UsageError(f"The {name} could not be attached: {first_line(error)}") from error
    if start is not None:
        _start_prefix(adapted, start)
    elif arguments.prompt_tuning:
        _start_prompt(adapted, model, arguments.num_virtual_tokens, seed)
    return adapted


def virtual_tokens(model: Any) -> int:
    """Return how many virtual tokens an adapter puts before the input."""
    if not hasattr(model, "peft_config"):
        return 0
    return sum(getattr(c, "num_virtual_tokens", 0) or 0 for c in model.peft_config.values())


def _random_tokens(model: nn.Module, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(vocabulary, (1, count), generator=generator)


@torch.no_grad()
def _activations(model: nn.Module, count: int, seed: int) -> torch.Tensor:
    """Return keys and values of ``count`` random tokens in peft's layout: (count, 2 * layers * width).

    Prefixes that start from real activations train far better than random ones (MeZO, appendix E.5).
    """
    tokens = _random_tokens(model, count, seed).to(next(model.parameters()).device)
    cache = model(input_ids=tokens, use_cache=True).past_key_values
    # One layer after the other, keys before values; each (1, heads, count, head width).
    pairs = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return torch.stack(pairs)[:, 0].permute(2, 0, 1, 3).reshape(count, -1)


@torch.no_grad()
def _start_prefix(adapted: Any, start: torch.Tensor) -> None:
    weight = adapted.prompt_encoder[adapted.active_adapter].embedding.weight
    if weight.shape != start.shape:
        logger.warning(
            "The prefix starts at random: peft holds %s numbers for it where the model's activations are %s.",
            tuple(weight.shape),
            tuple(start.shape),
        )
        return
    weight.copy_(start)


@torch.no_grad()
def _start_prompt(adapted: Any, model: nn.Module, count: int, seed: int) -> None:
    """Start virtual tokens from the embeddings of random real ones."""
    tokens = _random_tokens(model, count, seed)
    embeddings = model.get_input_embeddings().weight[tokens[0]]  # type: ignore[operator]
    adapted.prompt_encoder[adapted.active_adapter].embedding.weight.copy_(embeddings)
