"""Greedy decoding of short answers, a batch at a time, until the mark of their end or the end of the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zokernel.finetune.models.greedy import end_tokens, greedy_settings


class _AtEnding:
    """Stopping criterion: the last tokens of a row, of those after the prompt, hold the ending.

    A token is at least one byte, so as many tokens as the ending has bytes hold all of it.  One more holds the space
    before it, which some tokenizers drop from a first token.
    """

    def __init__(self, tokenizer: Any, ending: str, start: int):
        self._tokenizer, self._ending, self._start = tokenizer, ending, start
        self._most = len(ending.encode()) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = input_ids[:, self._start :][:, -self._most :]
        texts = self._tokenizer.batch_decode(last)
        return torch.tensor([self._ending in text for text in texts], device=input_ids.device)


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Tensor,
    prompts_mask: Tensor,
    *,
    decoder_prompt: Tensor | None = None,
    max_new_tokens: int = 50,
    ending: str = "\n",
) -> list[str]:
    """Return what the model writes after each prompt, up to what marks the end of an answer.

    Args:
        model: A causal or sequence-to-sequence language model of transformers, or a peft wrapper of one.
        tokenizer: Its tokenizer.
        prompts: (B, T) token ids, padded on the left (on the right for an encoder).
        prompts_mask: (B, T) ones where there is a token.
        decoder_prompt: (B, D) what the decoder of a sequence-to-sequence model begins with.
        max_new_tokens: Length of the longest answer.
        ending: What marks the end of an answer, besides the tokens that end a text; empty if nothing does.

    Returns:
        One text per prompt, without surrounding spaces.
    """
    from transformers import StoppingCriteriaList

    base: Any = getattr(model, "module", model)
    settings = greedy_settings(max_new_tokens, end_tokens(base, tokenizer), tokenizer.pad_token_id)

    def stop(start: int) -> Any:
        return StoppingCriteriaList([_AtEnding(tokenizer, ending, start)] if ending else [])

    if decoder_prompt is not None:
        settings.decoder_start_token_id = int(decoder_prompt[0, 0])
        output = base.generate(
            input_ids=prompts,
            attention_mask=prompts_mask,
            decoder_input_ids=decoder_prompt,
            generation_config=settings,
            stopping_criteria=stop(decoder_prompt.shape[1]),
        )
        return _texts(tokenizer, output[:, decoder_prompt.shape[1] :], ending)
    answers = [""] * len(prompts)
    for rows, length in _batches(base, prompts_mask):
        start = prompts.shape[1] - length
        output = base.generate(
            input_ids=prompts[rows, start:],
            attention_mask=prompts_mask[rows, start:],
            generation_config=settings,
            stopping_criteria=stop(length),
        )
        for row, text in zip(rows, _texts(tokenizer, output[:, length:], ending)):
            answers[row] = text
    return answers


def _texts(tokenizer: Any, tokens: Tensor, ending: str) -> list[str]:
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [(text.split(ending, 1)[0] if ending else text).strip() for text in texts]


def _batches(model: Any, prompts_mask: Tensor) -> list[tuple[list[int], int]]:
    """Return which rows are decoded together, and the length of their longest prompt.

    All of them, unless virtual tokens stand before the padding: padding would then move the prompt away from them, so
    only prompts of one length, which need none, go together.
    """
    lengths = prompts_mask.sum(1).tolist()
    adapters = getattr(model, "peft_config", None) or {}
    in_front = any(c.is_prompt_learning and c.peft_type != "PREFIX_TUNING" for c in adapters.values())
    if not in_front:
        return [(list(range(len(lengths))), max(lengths))]
    return [([row for row, n in enumerate(lengths) if n == length], length) for length in sorted(set(lengths))]
