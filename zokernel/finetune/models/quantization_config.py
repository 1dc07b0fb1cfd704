"""What ``from_pretrained`` is told about quantization, and what is logged of it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from zokernel.finetune.models.kind import Kind
from zokernel.finetune.models.quantization import requested_quantization, stored_quantization
from zokernel.finetune.models.quantized_layers import Layers, group_size, quantized_layers
from zokernel.finetune.settings.arguments import ModelArguments

logger = logging.getLogger(__name__)


def loading_options(
    arguments: ModelArguments, architecture: Any, dtype: torch.dtype, *, kind: Kind = "causal"
) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told about quantization, and log what was decided.

    Args:
        arguments: Which model, and how it is quantized.
        architecture: Its configuration.
        dtype: Type of the weights that are not quantized, and of what is computed.
        kind: Which kind of language model it is.

    Returns:
        Keyword arguments.
    """
    quantization = requested_quantization(arguments)
    if quantization:
        layers = quantized_layers(architecture, kind, quantization)
        if experts := layers.describe_experts():
            logger.info("%s, are not linear layers and stay in %s.", experts, str(dtype).removeprefix("torch."))
        return {"quantization_config": _quantizing_config(quantization, layers, dtype)}
    if stored_quantization(architecture) == "compressed-tensors":
        return {"quantization_config": _unpacking_config(arguments.model_name_or_path, dtype)}
    return {}


def _quantizing_config(quantization: str, layers: Layers, dtype: torch.dtype) -> Any:
    """Return the configuration by which a library quantizes a model while it is loaded.

    Args:
        quantization: How it is quantized, as :func:`requested_quantization` names it.
        layers: The layers that are quantized.
        dtype: Type of what is computed.
    """
    if quantization == "4bit":
        return _bitsandbytes_4bit(dtype)
    if quantization == "8bit":
        return _bitsandbytes_8bit()
    return _torchao_int8() if quantization == "torchao:int8" else _torchao_int4(layers)


def _bitsandbytes_4bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    logger.info("Quantization: bitsandbytes nf4, 4 bits, in blocks of 64 with one scale each.")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _bitsandbytes_8bit() -> Any:
    from transformers import BitsAndBytesConfig

    logger.info("Quantization: bitsandbytes, 8 bits, one scale per row; inputs of layers are rounded to 8 bits too.")
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    logger.info("Quantization: torchao, 8 bits, one scale per row.")
    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4(layers: Layers) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import TorchAoConfig

    group = group_size(layers.shapes)
    logger.info(
        "Quantization: torchao, 4 bits, one scale per %s; torchao holds each number in a byte, so the memory is that "
        "of 8 bits (--load_in_4bit true packs two into one).",
        f"{group} numbers" if group else "row",
    )
    four: Any = torch.int4  # type: ignore[attr-defined]
    granularity = PerGroup(group) if group else PerAxis(0)
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four, granularity=granularity))


def _unpacking_config(name: str, dtype: torch.dtype) -> Any:
    """Return the configuration by which compressed tensors are unpacked while they are loaded."""
    from transformers import CompressedTensorsConfig

    logger.info(
        "%s is unpacked to %s as it is loaded: transformers would do so in the first forward.",
        name,
        str(dtype).removeprefix("torch."),
    )
    return CompressedTensorsConfig(dequantize=True)
