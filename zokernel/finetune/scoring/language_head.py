"""The losses of tokens, with no more logits in memory than those of a few hundred of them.

Logits are the largest activation of a language model: those of 4,096 tokens of SmolLM2 take 805 MB, more than all its
weights.  So the backbone runs once, and what follows it (the head, and scaling or soft-capping, as each model has it)
runs on the hidden states of one block of scored positions after the other.  It is the model's own code that runs: it is
called once per block, with a backbone that answers from what it found in the first call.  For sequence-to-sequence
models that is the decoder, and the encoder answers from its first call, too.

Shapes: R rows, T tokens of a row, C copies of the rows, N scored tokens of a copy, H hidden, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.finetune.models.memory_setups import BLOCK
from zokernel.finetune.scoring.options import model_inputs, scored_logits
from zokernel.finetune.scoring.shared_encoder import with_hidden
from zokernel.finetune.scoring.trial import score_tolerance, try_outputs
from zokernel.finetune.scoring.wide_head import WideHead
from zokernel.without_adapter import without_adapter


def token_losses(
    model: nn.Module, batch: dict[str, Any], *, copies: int = 1, block: int = BLOCK, whole: bool = False
) -> Tensor:
    """Return the cross entropy of every scored token.

    Args:
        model: A causal or sequence-to-sequence language model of transformers, or a wrapper with the same call.
        batch: What ``TextCollator`` returns.
        copies: How many times the batch holds the same rows, copy after copy.
        block: Scored positions whose logits are computed at a time.
        whole: Compute the logits of all scored positions at once, where the backbone is not known.

    Returns:
        (C, N) losses in fp32, row after row.

    Raises:
        UsageError: If the model has no backbone that can be told from its head, and ``whole`` is false.
    """
    real_RK = batch["targets"] >= 0
    if whole:
        targets_X = batch["targets"][real_RK]
        logits_XV = _whole_logits(model, batch)[real_RK]
        return F.cross_entropy(logits_XV.float(), targets_X, reduction="none").view(copies, -1)
    rows_X = real_RK.nonzero()[:, 0]
    if "rows" in batch:
        rows_X = batch["rows"][rows_X]
    places = rows_X, batch["positions"][real_RK]
    return _by_blocks(model, batch, batch["targets"][real_RK].view(copies, -1), places, block)


def row_losses(model: nn.Module, batch: dict[str, Any], *, block: int = BLOCK, whole: bool = False) -> Tensor:
    """Return the cross entropy of every row, summed over its scored tokens.

    Every layer sees as many positions of one row as of another, so that each row may have weights of its own; those of
    the padding are computed and left out.

    Args:
        model: As for :func:`token_losses`.
        batch: As for :func:`token_losses`.
        block: Positions whose logits are computed at a time.
        whole: As for :func:`token_losses`.

    Returns:
        (R,) sums in fp32.

    Raises:
        UsageError: As for :func:`token_losses`.
    """
    targets_RK = batch["targets"]
    if whole:
        logits_XV = _whole_logits(model, batch).flatten(0, 1).float()
        losses_X = F.cross_entropy(logits_XV, targets_RK.flatten(), reduction="none", ignore_index=-100)
        return losses_X.view(targets_RK.shape).sum(1)
    R, K = targets_RK.shape
    rows_X = torch.arange(R, device=targets_RK.device).repeat_interleave(K)
    return _by_blocks(model, batch, targets_RK, (rows_X, batch["positions"].flatten()), block).sum(1)


def _by_blocks(
    model: nn.Module, batch: dict[str, Any], targets_CN: Tensor, places: tuple[Tensor, Tensor], block: int
) -> Tensor:
    """Return the cross entropy at N positions of each of C copies, or rows: (C, N)."""
    copies = len(targets_CN)
    bare = getattr(model, "module", model)
    inputs = model_inputs(bare, batch)
    encoder: AbstractContextManager[Any] = nullcontext()
    if "decoder_input_ids" in batch:
        inputs["decoder_input_ids"] = batch["decoder_input_ids"]
        encoder = _RunsOnce([without_adapter(bare).get_encoder()])
    losses, step = [], max(1, block // copies)
    length = batch.get("decoder_input_ids", batch["input_ids"]).shape[1]
    with WideHead(bare), encoder, _AnswersBlocks(_backbones(bare), *places, copies, length=length) as backbone:
        for begin in range(0, targets_CN.shape[1], step):
            backbone.block = slice(begin, begin + step)
            targets_CB = targets_CN[:, backbone.block]
            logits_XV = model(**inputs, use_cache=False).logits.flatten(0, 1).float()
            losses_X = F.cross_entropy(logits_XV, targets_CB.flatten(), reduction="none", ignore_index=-100)
            losses.append(losses_X.view(copies, -1))
    return torch.cat(losses, 1)


def _whole_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the logits at the scored positions (R, K, V); a decoder's are all of them, as the model gives them."""
    if "decoder_input_ids" not in batch:
        return scored_logits(model, batch)
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    with WideHead(getattr(model, "module", model)):
        return model(**{name: batch[name] for name in names}, use_cache=False).logits


def blocks_agree(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Return whether the losses of a batch are the same block by block as with all logits at once."""
    half = max(1, int((batch["targets"] >= 0).sum()) // 2)
    by_block, _ = try_outputs(lambda: token_losses(model, batch, block=half))
    if by_block is None:
        return False
    expected = token_losses(model, batch, whole=True)
    tolerance = score_tolerance(model)
    return torch.allclose(by_block, expected, rtol=tolerance, atol=tolerance)


def _backbones(model: nn.Module) -> list[nn.Module]:
    """Return the modules of which one computes the hidden states that the head sees, with an adapter or without.

    Most models call the module of their ``base_model_prefix``; some, such as OPT, the decoder within it.
    """
    inner = without_adapter(model)
    candidates = [getattr(inner, getattr(inner, "base_model_prefix", "") or "model", None)]
    if hasattr(inner, "get_decoder"):
        candidates.append(inner.get_decoder())
    modules = {id(module): module for module in candidates if isinstance(module, nn.Module) and module is not inner}
    if not modules:
        raise UsageError(f"{type(inner).__name__} has no backbone that can be told from its head.")
    return list(modules.values())


class _RunsOnce:
    """Context in which a module runs in the first call, and later answers with what it returned.

    Args:
        candidates: Modules of which the model calls one; the first to return is meant.
    """

    def __init__(self, candidates: list[nn.Module]):
        self._candidates = candidates
        self._module: Any = None
        self._output: Any = None

    def __enter__(self) -> Self:
        self._handles = [module.register_forward_hook(self._keep) for module in self._candidates]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._remove_hooks()
        if self._module is not None:
            self._module.forward = self._forward
            if not self._patched:
                del self._module.forward

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._remove_hooks()
        self.take(output)
        self._module, self._patched, self._forward = module, "forward" in vars(module), module.forward
        self._module.forward = self.answer
        return self.answer()

    def take(self, output: Any) -> None:
        """Keep what the module returned."""
        self._output = output

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returned in its first call."""
        return self._output


class _AnswersBlocks(_RunsOnce):
    """The same for a backbone, of whose hidden states it returns those of a block of scored positions.

    Args:
        candidates: As for :class:`_RunsOnce`.
        rows: The row of each scored position: (C * N,).
        positions: Where in its row it is: (C * N,).
        copies: C.
        length: T; virtual tokens that prompt tuning puts in front are counted off.

    Attributes:
        block: Which of the N scored positions of each copy the next answer is for.
    """

    def __init__(self, candidates: list[nn.Module], rows: Tensor, positions: Tensor, copies: int, *, length: int):
        super().__init__(candidates)
        self._rows, self._positions, self._copies, self._length = rows, positions, copies, length
        self._hidden_CNH: Tensor | None = None
        self.block = slice(0, 0)

    def take(self, output: Any) -> None:
        """Keep the hidden states of the scored positions."""
        hidden_RTH = output[0]
        in_front = hidden_RTH.shape[1] - self._length
        picked = hidden_RTH[self._rows, self._positions + in_front]
        self._hidden_CNH = picked.view(self._copies, -1, picked.shape[-1])
        self._output = with_hidden(output, picked)

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """Return those of the block: rows of one token, copy after copy, as the layers of stacked losses expect."""
        assert self._hidden_CNH is not None
        block = self._hidden_CNH[:, self.block]
        return with_hidden(self._output, block.reshape(-1, 1, block.shape[-1]))
