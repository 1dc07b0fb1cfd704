"""A head stored in fp32 runs in fp32 under autocast, too.

bf16 logits near 16 are 0.06 apart, which is more than a perturbation changes them by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WideHead:
    """Context in which the LM head of a model computes in fp32 if its weights are fp32.

    Args:
        model: A language model of transformers, with an adapter or without; one without a head is left as it is.

    Example:
        >>> import transformers
        >>> sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 5, "bos_token_id": 0, "eos_token_id": 0}
        >>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        >>> with torch.autocast("cpu", torch.bfloat16), WideHead(model):
        ...     model(torch.tensor([[1]])).logits.dtype
        torch.float32
    """

    def __init__(self, model: nn.Module):
        finder = getattr(model, "get_output_embeddings", None)
        self._head: Any = finder() if callable(finder) else None
        self._autocast: torch.autocast | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        weight = getattr(self._head, "weight", None)
        if weight is not None and weight.dtype == torch.float32:
            self._handles = [
                self._head.register_forward_pre_hook(self._widen),
                self._head.register_forward_hook(self._leave, always_call=True),
            ]

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _widen(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = args[0]
        self._autocast = torch.autocast(hidden.device.type, enabled=False)
        self._autocast.__enter__()
        return (hidden.float(), *args[1:])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._autocast is not None:
            self._autocast.__exit__(None, None, None)
            self._autocast = None


def is_plain_matrix(head: nn.Module) -> bool:
    """Whether a head does nothing but multiply by one unsharded matrix."""
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return False
    return head.weight.dtype.is_floating_point and not hasattr(head.weight, "device_mesh")
