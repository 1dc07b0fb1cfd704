"""What of a model is trained, and whether it can be."""

from __future__ import annotations

from typing import Any

from torch import nn

from zokernel.directions.weights.restore import LOW_PRECISION
from zokernel.errors import UsageError
from zokernel.finetune.models.quantization import NO_DORA
from zokernel.finetune.models.quantized_model import describe_quantization, mark_trainable_, prevent_repacking_
from zokernel.finetune.models.scales import trains_scales


def trained_part(model: Any) -> str:
    """Return which part of a model is trained: ``virtual tokens``, ``LoRA``, ``scales`` or ``full parameters``.

    Example:
        >>> trained_part(nn.Linear(2, 2))
        'full parameters'
    """
    adapters = getattr(model, "peft_config", None) or {}
    if any(config.is_prompt_learning for config in adapters.values()):
        return "virtual tokens"
    if trains_scales(model):
        return "scales"
    return "LoRA" if adapters else "full parameters"


def low_precision(model: nn.Module) -> str:
    """Return the types below fp32 in which trained parameters are stored, as text; empty if there are none.

    Example:
        >>> low_precision(nn.Linear(2, 2).bfloat16()), low_precision(nn.Linear(2, 2))
        ('torch.bfloat16', '')
    """
    return ", ".join(sorted({str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in LOW_PRECISION}))


def check_trainable(model: nn.Module) -> None:
    """Check before anything is built that the model can be trained.

    Raises:
        UsageError: If nothing is trainable, or the weights to be perturbed are quantized.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise UsageError(
            "The model has no trainable parameter: unfreeze some, or attach an adapter with is_trainable=True."
        )
    for name, parameter in trainable:
        if not parameter.is_floating_point():
            raise UsageError(
                f"{name} is quantized ({parameter.dtype}) and cannot be perturbed: load the model dequantized, "
                "or train a LoRA adapter on it."
            )
    if getattr(model, "is_quantized", False) and trained_part(model) == "full parameters":
        raise UsageError("The model is quantized, so its weights cannot be perturbed: train a LoRA adapter on it.")


def accept_quantized_(model: nn.Module, *, first_order: bool) -> None:
    """Prepare a quantized model for training; any other is left as it is.

    Args:
        model: The model.
        first_order: Whether gradients are taken.

    Raises:
        UsageError: If gradients are to be taken of scales, or through weights that let none pass; or DoRA would read
            weights of which peft loses the scales.
    """
    prevent_repacking_(model)
    adapters = (getattr(model, "peft_config", None) or {}).values()
    if describe_quantization(model) == "bitsandbytes 8 bit" and any(
        getattr(adapter, "use_dora", False) for adapter in adapters
    ):
        raise UsageError(NO_DORA)
    quantizer = getattr(model, "hf_quantizer", None)
    if not first_order:
        mark_trainable_(model)
    elif trains_scales(model) or (quantizer is not None and not quantizer.is_trainable):
        raise UsageError(
            "No gradients are taken through these quantized weights: choose a zeroth-order method, such as mezo."
        )
