r"""The forward pass that a loss over options needs, and nothing more.

When every option is one token, a single forward over the prompts scores all of them; otherwise every option is scored
by the mean log-probability of its tokens, with the prompt computed once for all options where the model allows it.
Either way the LM head runs only on the scored positions (and, if one token decides, only for the options' tokens),
without a KV cache, and the loss is taken in fp32.

Shapes: B examples, C options, R rows of the batch, T tokens, K scored positions per row, V vocabulary, H hidden.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.finetune.data.collate import Collator, EncodedDataset
from zokernel.finetune.scoring.shared_encoder import SharedEncoder
from zokernel.finetune.scoring.wide_head import WideHead, is_plain_matrix
from zokernel.private_apis import attention_implementation
from zokernel.without_adapter import without_adapter

logger = logging.getLogger(__name__)

_ALL_TOKENS: WeakSet[nn.Module] = WeakSet()  # models whose logits are not those of their head alone
_AHEAD = "predicts several tokens at once, not options: train it with zokernel.finetune.zeroth_order(Trainer)."


class ScoredPositions:
    """Context in which a model's LM head sees only the hidden states of the scored positions.

    A forward pre-hook on the output embedding replaces its input (R, T, H) by (R, K, H); everything the model does to
    its logits afterwards (scaling, soft-capping) still happens.  Virtual tokens that prompt tuning puts in front shift
    the positions; the hook counts them off.

    With ``tokens_RC`` a head that is a plain matrix yields the logits of those tokens only, (R, K, C), from their rows
    of the matrix; another kind of head yields all, of which those are taken.

    A head stored in fp32 runs in fp32 under autocast too, see :class:`WideHead`.  At so few positions it costs one read
    of its weights, in either type.

    Args:
        model: A language model of transformers, or a peft wrapper of one.
        positions_RK: Positions whose logits are wanted.
        length: Tokens in a row; not needed where nothing is put in front of them.
        tokens_RC: Tokens whose logits are wanted; all of the vocabulary if not given.
        rows_R: The row of the model's input that holds each row of positions; one of its own if not given.

    Raises:
        UsageError: If the model has no output embedding.
    """

    def __init__(
        self,
        model: nn.Module,
        positions_RK: Tensor,
        length: int | None = None,
        tokens_RC: Tensor | None = None,
        rows_R: Tensor | None = None,
    ):
        finder = getattr(model, "get_output_embeddings", None)
        head = finder() if callable(finder) else None
        if head is None:
            raise UsageError(f"{type(model).__name__} has no LM head to score label words with: use a language model.")
        self._head, self._positions, self._length, self._tokens = head, positions_RK, length, tokens_RC
        self._rows = torch.arange(len(positions_RK), device=positions_RK.device) if rows_R is None else rows_R
        self._name = type(without_adapter(model)).__name__
        self._wide = WideHead(model)

    def __enter__(self) -> None:
        def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_RTH = args[0]
            if hidden_RTH.ndim != 3:
                raise UsageError(f"{self._name} {_AHEAD}")
            in_front = 0 if self._length is None else hidden_RTH.shape[1] - self._length
            return (hidden_RTH[self._rows[:, None], self._positions + in_front], *args[1:])

        def pick(module: nn.Module, args: tuple[Any, ...], logits_RKV: Tensor) -> Tensor:
            return _of_tokens(logits_RKV, self._tokens)

        self._by_rows = self._tokens is not None and is_plain_matrix(self._head)
        if self._by_rows:
            self._head.forward = self._rows_only
        self._handles = [self._head.register_forward_pre_hook(select)]
        if self._tokens is not None and not self._by_rows:
            self._handles.append(self._head.register_forward_hook(pick))
        self._wide.__enter__()  # after select, whose hidden states it widens

    def _rows_only(self, hidden_RKH: Tensor) -> Tensor:
        assert self._tokens is not None
        rows_RCH = F.embedding(self._tokens, self._head.weight)
        # Not a matrix product, which autocast would round; there are only a few rows.
        dtype = torch.promote_types(rows_RCH.dtype, torch.float32)
        return (hidden_RKH.to(dtype)[:, :, None] * rows_RCH.to(dtype)[:, None]).sum(-1)

    def __exit__(self, *exc_info: object) -> None:
        self._wide.__exit__(*exc_info)
        for handle in self._handles:
            handle.remove()
        if self._by_rows:
            del self._head.forward


def scored_logits(model: nn.Module, batch: dict[str, Any], tokens_RC: Tensor | None = None) -> Tensor:
    """Run the model once and return the logits at the scored positions: (R, K, V), or (R, K, C) of some tokens."""
    base = getattr(model, "module", model)
    if "decoder_input_ids" in batch:
        return decoder_logits(model, batch, tokens_RC)
    inputs = model_inputs(base, batch)
    if not batch.get("masked"):
        inputs["use_cache"] = False
    by_rows = None if base in _ALL_TOKENS else tokens_RC
    try:
        with ScoredPositions(base, batch["positions"], batch["input_ids"].shape[1], by_rows, batch.get("rows")):
            logits_RKV = model(**inputs).logits
    except RuntimeError as error:
        if by_rows is None or "must match the size of tensor" not in str(error):
            raise
        _ALL_TOKENS.add(base)  # it adds something of all tokens to what its head returns, as ESM does
        return scored_logits(model, batch, tokens_RC)
    return logits_RKV if tokens_RC is by_rows else _of_tokens(logits_RKV, tokens_RC)


def _of_tokens(logits_RKV: Tensor, tokens_RC: Tensor | None) -> Tensor:
    return (
        logits_RKV if tokens_RC is None else logits_RKV.gather(-1, tokens_RC[:, None].expand(*logits_RKV.shape[:2], -1))
    )


def decoder_logits(model: nn.Module, batch: dict[str, Any], tokens_RC: Tensor | None = None) -> Tensor:
    """Return the logits at the scored positions of a decoder: (R, K, V), or (R, K, C) of some tokens.

    The encoder runs once per example, however many rows of options the decoder has for it.
    """
    base = getattr(model, "module", model)
    examples: Any = slice(None)
    encoder: AbstractContextManager[None] = nullcontext()
    if "cells" in batch:
        examples = batch["cells"][:, 0] // batch["option_mask"].shape[1]
        if len(examples) > len(batch["input_ids"]):
            encoder = SharedEncoder(base, examples)
    decoded = batch["decoder_input_ids"]
    with encoder, ScoredPositions(base, batch["positions"], decoded.shape[1]):
        logits_RKV = model(
            input_ids=batch["input_ids"][examples],
            attention_mask=batch["attention_mask"][examples],
            decoder_input_ids=decoded,
            use_cache=False,
        ).logits
    return _of_tokens(logits_RKV, tokens_RC)  # not from their rows of the head: BART adds a bias to its logits


def model_inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Return what the model's forward takes of a batch: tokens, mask and, where a row holds several parts, places."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "segments" in batch:
        mask = packed_mask(model, batch["segments"], batch.get("owners"))
        inputs |= {"position_ids": batch["position_ids"], "attention_mask": mask}
    return inputs


def packed_mask(model: nn.Module, segments_RT: Tensor, owners_RT: Tensor | None = None) -> Tensor:
    """Return the (R, 1, T, T) attention mask under which options see the prompt and themselves, but not each other.

    Boolean for SDPA, additive for eager attention, as each takes it.

    Args:
        model: The model that takes the mask.
        segments_RT: 0 for the prompt, which all others see; -1 for padding.
        owners_RT: The row of the padded batch that each token comes from, where several share one.  Tokens of
            different rows do not see each other.
    """
    query, key = segments_RT[:, :, None], segments_RT[:, None, :]
    length = segments_RT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments_RT.device).tril()
    seen = causal & (key != -1) & ((key == 0) | (key == query))
    if owners_RT is not None:
        seen = seen & (owners_RT[:, :, None] == owners_RT[:, None, :])
    # A padded position sees itself, so that no softmax is over nothing.
    seen = (seen | torch.eye(length, dtype=torch.bool, device=segments_RT.device))[:, None]
    if attention_implementation(model) == "sdpa":
        return seen
    dtype = next(model.parameters()).dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def option_logprobs(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return summed log-probabilities and token counts of every option.

    Returns:
        (B, C) sums in fp32 and (B, C) counts; both zero where an example has fewer options.
    """
    logits_RKV, targets_RK = scored_logits(model, batch), batch["targets"]
    if "cells" not in batch:
        logprobs_BC = logits_RKV[:, 0].float().log_softmax(-1).gather(1, targets_RK)
        return logprobs_BC, torch.ones_like(targets_RK)
    cells_RK = batch["cells"]
    # Row by row: a softmax across strides loses two digits at 32,128 words.
    logits_NV, targets_N = logits_RKV.flatten(0, 1).float(), targets_RK.flatten()
    logprobs_RK = -F.cross_entropy(logits_NV, targets_N, ignore_index=-100, reduction="none").view_as(targets_RK)
    shape = batch["option_mask"].shape
    real = cells_RK >= 0
    sums = logprobs_RK.new_zeros(shape.numel()).index_add_(0, cells_RK[real], logprobs_RK[real])
    counts = torch.bincount(cells_RK[real], minlength=shape.numel())
    return sums.view(shape), counts.view(shape)


def mean_scores(sums_BC: Tensor, counts_BC: Tensor, option_mask_BC: Tensor) -> Tensor:
    """Return the mean log-probability of every option's tokens; minus infinity where there is no option."""
    return (sums_BC / counts_BC.clamp(min=1)).masked_fill(~option_mask_BC, -torch.inf)


def option_scores(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the score of every option.

    Args:
        model: A causal or masked language model of transformers (or a wrapper with the same call).
        batch: What :class:`Collator` returns.

    Returns:
        Mean log-probability of each option's tokens, up to a constant of the example: (B, C), fp32; minus infinity
        where an example has fewer than C options.
    """
    if "cells" not in batch:
        # One token per option: the normaliser of the softmax is common to all of them and cancels in the loss.
        return scored_logits(model, batch, batch["targets"])[:, 0].float()
    return mean_scores(*option_logprobs(model, batch), batch["option_mask"])


def classification_loss(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross entropy of the softmax over the options' scores, in fp32."""
    return F.cross_entropy(scores_BC.float(), labels_B)


__all__ = [
    "Collator",
    "EncodedDataset",
    "ScoredPositions",
    "classification_loss",
    "mean_scores",
    "option_logprobs",
    "option_scores",
    "packed_mask",
    "scored_logits",
]
