"""Small networks and language models that the ZO-eNTK experiments share; all of them are built from a seed."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.kernels.model import FunctionalModel, wrap


def mlp(sizes: list[int], seed: int = 0) -> nn.Sequential:
    """Return a tanh network on flattened images.

    Example:
        >>> sum(p.numel() for p in mlp([4, 3, 2]).parameters())
        23
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for width, following in itertools.pairwise(sizes):
            layers += [nn.Linear(width, following), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).eval()


def group_norm_net(seed: int = 0) -> nn.Sequential:
    """Return a small convolutional network with GroupNorm on 28 x 28 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        ).eval()


def tiny_language_model(kind: str, seed: int = 0, vocab_size: int = 97, width: int = 16) -> nn.Module:
    """Return a random GPT-2 (tied embeddings) or Llama of a few thousand parameters.

    Args:
        kind: ``gpt2`` or ``llama``.
        seed: Seed of the weights.
        vocab_size: V.
        width: Hidden size of the Llama.

    Returns:
        The model, in eval mode.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shared: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, **shared)).eval()
        llama = LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            **shared,
        )
        return LlamaForCausalLM(llama).eval()


def random_prompt(seed: int, length: int = 8, vocab_size: int = 97) -> dict[str, Tensor]:
    """Return one row of random token ids."""
    ids = torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def flattened(model: Any, outputs: Any = None) -> FunctionalModel:
    """Return the same model as a function of one vector, so that thousands of directions are cheap to draw."""
    inner = wrap(model, outputs=outputs)
    sizes = [p.numel() for p in inner.params.values()]
    vector = torch.cat([p.flatten() for p in inner.params.values()])

    def forward(params: dict[str, Tensor], batch: Any) -> Tensor:
        parts = params["theta"].split(sizes)
        shaped = {name: part.view(p.shape) for (name, p), part in zip(inner.params.items(), parts, strict=True)}
        return inner(shaped, batch)

    return FunctionalModel(forward, params={"theta": vector})
