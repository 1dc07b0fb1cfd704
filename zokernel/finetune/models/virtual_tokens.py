"""New virtual tokens: prefix tuning and prompt tuning, started from real tokens."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def attach_prefix(model: nn.Module, count: int, task_type: Any, *, seed: int) -> Any:
    """Put trained keys and values before those of every layer.

    They start as the keys and values of random tokens, which trains far better than random numbers do (Malladi
    et al. (2023), arXiv:2305.17333, appendix E.5).

    Args:
        model: A causal language model.
        count: How many virtual tokens.
        task_type: peft's name for the kind of model.
        seed: Seed of the random tokens.

    Returns:
        The peft model.
    """
    import peft

    start = _activations(model, count, seed)
    configuration = peft.PrefixTuningConfig(num_virtual_tokens=count, task_type=task_type, prefix_projection=False)
    adapted: Any = peft.get_peft_model(model, configuration)
    weight = adapted.prompt_encoder[adapted.active_adapter].embedding.weight
    if weight.shape != start.shape:
        logger.warning(
            "The prefix starts from random values: peft stores it with shape %s, but the model's activations have "
            "shape %s.",
            tuple(weight.shape),
            tuple(start.shape),
        )
        return adapted
    with torch.no_grad():
        weight.copy_(start)
    return adapted


def attach_prompt(model: nn.Module, count: int, task_type: Any, *, seed: int) -> Any:
    """Put trained embeddings before the input; they start as those of random tokens.

    Args:
        model: A language model.
        count: How many virtual tokens.
        task_type: peft's name for the kind of model.
        seed: Seed of the random tokens.

    Returns:
        The peft model.
    """
    import peft

    configuration = peft.PromptTuningConfig(num_virtual_tokens=count, task_type=task_type)
    adapted: Any = peft.get_peft_model(model, configuration)
    tokens = _random_tokens(model, count, seed)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight[tokens[0]]  # type: ignore[operator]
        adapted.prompt_encoder[adapted.active_adapter].embedding.weight.copy_(embeddings)
    return adapted


def _random_tokens(model: nn.Module, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(vocabulary, (1, count), generator=generator)


@torch.no_grad()
def _activations(model: nn.Module, count: int, seed: int) -> torch.Tensor:
    """Return keys and values of ``count`` random tokens in peft's layout: (count, 2 * layers * width)."""
    tokens = _random_tokens(model, count, seed).to(next(model.parameters()).device)
    cache = model(input_ids=tokens, use_cache=True).past_key_values
    # One layer after the other, keys before values; each (1, heads, count, head width).
    pairs = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return torch.stack(pairs)[:, 0].permute(2, 0, 1, 3).reshape(count, -1)
