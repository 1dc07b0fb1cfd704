"""Greedy decoding of short answers, a batch at a time, until a line break or the end of the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _AtLineBreak:
    """Stopping criterion: the last token of a row holds a line break."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1].tolist()
        for token in last:
            if token not in self._known:
                self._known[token] = "\n" in self._tokenizer.decode([token])
        return torch.tensor([self._known[token] for token in last], device=input_ids.device)


@torch.no_grad()
def greedy_answers(
    model: nn.Module, tokenizer: Any, prompts: Tensor, prompts_mask: Tensor, *, max_new_tokens: int = 50
) -> list[str]:
    """Return what the model writes after each prompt, up to the first line break.

    Args:
        model: A causal language model of transformers, or a peft wrapper of one.
        tokenizer: Its tokenizer.
        prompts: (B, T) token ids, padded on the left.
        prompts_mask: (B, T) ones where there is a token.
        max_new_tokens: Longest answer in tokens.

    Returns:
        One text a prompt, without surrounding spaces.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    base: Any = getattr(model, "module", model)
    ends = base.generation_config.eos_token_id
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends if ends is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    written = base.generate(
        input_ids=prompts,
        attention_mask=prompts_mask,
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([_AtLineBreak(tokenizer)]),
    )
    texts = tokenizer.batch_decode(written[:, prompts.shape[1] :], skip_special_tokens=True)
    return [text.lstrip().split("\n", 1)[0].strip() for text in texts]
