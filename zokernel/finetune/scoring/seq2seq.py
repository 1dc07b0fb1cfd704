"""The losses of texts that a sequence-to-sequence model is to write, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zokernel.finetune.data.collate import Collator
from zokernel.finetune.scoring.options import scored_logits


def seq2seq_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, start: int, pad_token_id: int | None
) -> dict[str, Any]:
    """Batch pairs of texts: what the encoder reads, and what the decoder is to write.

    Args:
        prompts: Tokens for the encoder, as the tokenizer frames them.
        completions: Labels, as ``tokenizer(text_target=...)`` gives them.
        start: The decoder's first input: that of :func:`zokernel.finetune.tasks.seq2seq.decoder_of`.
        pad_token_id: Padding token.

    Returns:
        What :class:`Collator` returns, for one option per example.

    Example:
        >>> batch = seq2seq_batch([[5, 1]], [[7, 8, 1]], start=0, pad_token_id=0)
        >>> batch["decoder_input_ids"].tolist(), batch["targets"].tolist()
        ([[0, 7, 8]], [[7, 8, 1]])
    """
    return Collator(pad_token_id)(
        [
            {"input_ids": list(prompt), "option_ids": [list(text)], "label": 0, "decoder_start": (start,), "forced": ()}
            for prompt, text in zip(prompts, completions)
        ]
    )


def seq2seq_token_losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the cross entropy of every token of the completions.

    Args:
        model: A sequence-to-sequence model of transformers, or a peft wrapper of one.
        batch: What :func:`seq2seq_batch` returns, on the model's device.

    Returns:
        (N,) losses in fp32, row after row; their mean is the loss of ``model(input_ids, labels=...)``.
    """
    real_RK = batch["targets"] >= 0
    logits_NV = scored_logits(model, batch)[real_RK]
    return F.cross_entropy(logits_NV.float(), batch["targets"][real_RK], reduction="none")
