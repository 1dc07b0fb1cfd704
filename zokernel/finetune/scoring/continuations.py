"""What a model writes after a prompt, greedily: for a reader, not for a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zokernel.finetune.data.collate_text import TextDataset


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, and the answer in its row."""

    prompt_ids: list[int]
    prompt: str
    answer: str


def turn_ends(dataset: TextDataset, tokenizer: Any) -> list[int]:
    """Return the control tokens with which the learned part of a row ends, such as the end of a turn."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(special & {example.input_ids[example.scored[-1]] for example in dataset.examples})


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, ends: Sequence[int] = ()
) -> list[str]:
    """Return what a model writes after each prompt until the text or the turn ends.

    Args:
        model: A causal language model of transformers, or a peft wrapper of one.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Longest continuation.
        ends: Tokens that end a turn, beside those that the model says.

    Returns:
        One text per prompt, without control tokens.
    """
    from transformers import GenerationConfig

    bare: Any = getattr(model, "module", model)
    own = bare.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own]), *ends} - {None}
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    device = next(bare.parameters()).device
    written = []
    for prompt in prompts:  # one by one: padding would move a prompt away from virtual tokens
        ids = torch.tensor([list(prompt)], device=device)
        found = bare.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        written.append(tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True).strip())
    return written
