"""What a model writes after a prompt, greedily: for a reader, not for a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zokernel.finetune.data.collate_text import TextDataset
from zokernel.finetune.models.greedy import end_tokens, greedy_settings


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, and the answer in its row."""

    prompt_ids: list[int]
    prompt: str
    answer: str


def shown_prompt(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return a prompt as text, without what the tokenizer puts around every text; the marks of turns stay."""
    around = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "pad")}
    inner = list(ids)
    while inner and inner[0] in around:
        inner.pop(0)
    while inner and inner[-1] in around:
        inner.pop()
    return str(tokenizer.decode(inner))


def learned_ends(dataset: TextDataset, tokenizer: Any) -> list[int]:
    """Return the control tokens that end the learned part of a row, such as the end of a turn."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(special & {example.input_ids[example.scored[-1]] for example in dataset.examples})


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int] = (),
    decoder_prompt: Sequence[int] = (),
) -> list[str]:
    """Return what a model writes after each prompt, until the text or the turn ends.

    Args:
        model: A causal or sequence-to-sequence language model of transformers, or a peft wrapper of one.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Length of the longest continuation.
        ends: Tokens that end a turn, besides those of the tokenizer and the model.
        decoder_prompt: What the decoder of a sequence-to-sequence model begins with; its encoder reads the prompt.

    Returns:
        One text per prompt, without control tokens.
    """
    bare: Any = getattr(model, "module", model)
    settings = greedy_settings(max_new_tokens, end_tokens(bare, tokenizer).union(ends), tokenizer.pad_token_id)
    decoded: dict[str, Any] = {}
    device = next(bare.parameters()).device
    if decoder_prompt:
        settings.decoder_start_token_id = decoder_prompt[0]
        decoded["decoder_input_ids"] = torch.tensor([list(decoder_prompt)], device=device)
    texts = []
    for prompt in prompts:  # one by one: padding would move a prompt away from virtual tokens
        ids = torch.tensor([list(prompt)], device=device)
        output = bare.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, **decoded
        )
        begin = len(decoder_prompt) or len(prompt)
        texts.append(tokenizer.decode(output[0, begin:], skip_special_tokens=True).strip())
    return texts
