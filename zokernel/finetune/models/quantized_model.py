"""A model whose weights are quantized: what it is called, and what keeps its weights as they were loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.finetune.models.quantization import stored_quantization
from zokernel.without_adapter import without_adapter


def describe_quantization(model: Any) -> str:
    """Return in words how a loaded model, or the model inside an adapter, is quantized; empty if it is not.

    Example:
        >>> describe_quantization(nn.Linear(2, 2))
        ''
    """
    bare = without_adapter(model)
    if not getattr(bare, "is_quantized", False):
        return ""
    settings = getattr(bare.config, "quantization_config", None)
    method = stored_quantization(bare.config)
    if method == "bitsandbytes":
        return f"bitsandbytes {4 if getattr(settings, 'load_in_4bit', False) else 8} bit"
    kind = getattr(settings, "quant_type", None)
    return f"{method} {type(kind).__name__}" if kind is not None and not isinstance(kind, str) else method


def prevent_repacking_(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for AVX-512 in the first forward.

    It would round the scales to bf16, so the weights would no longer be those that were loaded and hashed; and it fails
    on layers whose inputs are no multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no attribute of nn.Module)


@torch.no_grad()
def detach_from_files_(model: nn.Module) -> None:
    """Copy what was not quantized out of the files of a model that was quantized while it was loaded.

    Embeddings and norms would be views of the mapped files, so all pages of the full-precision weights would stay, and
    count as memory of the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        plain = type(tensor) in (nn.Parameter, Tensor) and not hasattr(tensor, "__tensor_flatten__")
        if plain and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers a model's parameters stand for: bitsandbytes packs two of 4 bits into a byte."""
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in model.parameters())
    return sum(parameter.numel() if state is None else math.prod(state.shape) for parameter, state in states)


def mark_trainable_(model: Any) -> None:
    """Let ``transformers.Trainer`` take a quantized model that it knows no gradients of: forwards need none."""
    bare = without_adapter(model)
    quantizer = getattr(bare, "hf_quantizer", None)
    if quantizer is not None and not (quantizer.is_trainable and getattr(quantizer, "is_qat_trainable", False)):
        kind = type(quantizer)
        quantizer.__class__ = type(kind.__name__, (kind,), {"is_trainable": True, "is_qat_trainable": True})
