"""How much memory a run will take at least, told before the model is loaded."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zokernel.data.hub_requests import request_errors
from zokernel.errors import RunError, UsageError, first_line
from zokernel.finetune.models.kind import Kind, empty_model
from zokernel.finetune.models.memory_setups import FACTOR
from zokernel.finetune.models.model_files import stored_bytes, tensor_types, weight_files
from zokernel.finetune.models.quantization import DEQUANTIZED, requested_quantization, stored_quantization
from zokernel.finetune.models.quantized_layers import bytes_once_quantized, number_of_scales, quantized_layers
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.readable import readable_bytes

logger = logging.getLogger(__name__)

UNKNOWN = 0  # bytes of weights whose files say nothing yet
SCALE = "_weight_scale"  # how the names of torchao's scales end in files


def estimate_memory(
    architecture: Any,
    dtype: torch.dtype,
    config: ZOConfig,
    *,
    adapter: bool = False,
    kind: Kind = "causal",
    stored: int | None = None,
) -> dict[str, int]:
    """Estimate the peak memory of training, in bytes, without allocating the model.

    Weights as they will be held; the copies that the method keeps (gradients and moments for first-order methods); and
    under autocast, the largest weight in bf16 while its layer runs.  Activations are left out: they depend on the
    batch, and forward-only training keeps one layer's at a time.

    Args:
        architecture: The model's configuration.
        dtype: Type in which the weights are held.
        config: The run's settings.
        adapter: Whether only an adapter is trained, whose own copies are too small to count.
        kind: Which kind of language model it is.
        stored: Bytes of a quantized model's weights, which stay as they are stored; :data:`UNKNOWN` ones are left out.

    Returns:
        Bytes by part, with their ``total``.

    Raises:
        UsageError: If the configuration describes no model that can be built.
    """
    from zokernel.optim import get_method

    model = empty_model(architecture, kind)
    count = sum(p.numel() for p in model.parameters())
    copies = 0.0
    if not adapter:
        copies = getattr(get_method(config.method), "memory_copies", 0.0)
        copies += bool(config.momentum) + (config.perturb == "in_place:copy")
        copies += {"fp32": 1.0, "int8": 0.28}.get(config.method_options().get("averaging", "none"), 0.0)
    weights = count * dtype.itemsize if stored is None else stored
    parts = {"weights": weights, "method": int(copies * count * 4)}
    if config.bf16:
        parts["autocast"] = 2 * max(p.numel() for p in model.parameters())
    return {**parts, "total": sum(parts.values())}


def check_memory(
    architecture: Any,
    dtype: torch.dtype,
    config: ZOConfig,
    *,
    adapter: bool = False,
    kind: Kind = "causal",
    stored: int | None = None,
    skip: bool = False,
) -> None:
    """Log the memory estimate, and stop before loading a model that will not fit.

    Raises:
        RunError: If the estimate exceeds the memory that is free.
    """
    import psutil

    parts = estimate_memory(architecture, dtype, config, adapter=adapter, kind=kind, stored=stored)
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    listing = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items() if name != "total" and size)
    # Counted in the peak of a report, too, unless that is of a GPU's memory.
    overhead = (
        "" if on_gpu else f", plus about {readable_bytes(psutil.Process().memory_info().rss)} of libraries and data"
    )
    if stored == UNKNOWN:
        listing = ", ".join(["weights of unknown size", *filter(None, [listing])])
    logger.info(
        "Memory: %s%s (%s) and activations%s; %s free.",
        "at least " if stored == UNKNOWN else "",
        readable_bytes(parts["total"]),
        listing,
        overhead,
        readable_bytes(free),
    )
    if parts["total"] > free and not skip:
        raise RunError(
            f"The run needs at least {readable_bytes(parts['total'])} ({listing}) and {readable_bytes(free)} are free: "
            "use a smaller model, --dtype bfloat16 with --lora true, --offload disk (which leaves the weights in their "
            "files), or --skip_memory_check true."
        )


@dataclass(frozen=True)
class QuantizedBytes:
    """What the weights of a quantized model take, in bytes.

    Attributes:
        weights: The weights as their files hold them; :data:`UNKNOWN` if those cannot be read yet.
        factors: A trained factor on each scale of torchao.
    """

    weights: int = UNKNOWN
    factors: int = 0

    @property
    def is_known(self) -> bool:
        """Whether the files told what they hold."""
        return self.weights != UNKNOWN


def quantized_bytes(
    path: str, architecture: Any, dtype: torch.dtype, *, revision: str = "main"
) -> QuantizedBytes | None:
    """Return the bytes of a quantized model's weights, from the headers of its files, which are read once.

    Args:
        path: The model's folder or hub id.
        architecture: Its configuration.
        dtype: Type of the weights that are not quantized.
        revision: Branch, tag or commit on the hub.

    Returns:
        Bytes; None if the model is not quantized, or unpacked as it is loaded.  A warning says why they are unknown.
    """
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
    from safetensors import SafetensorError

    if stored_quantization(architecture) in ("", *DEQUANTIZED):
        return None
    broken = (NotASafetensorsRepoError, SafetensorsParsingError, SafetensorError, UsageError)
    unreadable: tuple[type[Exception], ...] = (*broken, *request_errors())
    try:
        tensors = _tensor_types(path, revision)
    except unreadable as error:  # the hub may be out of reach while its files are cached
        logger.warning(
            "The size of the quantized weights is unknown (%s), and estimates of memory leave them out.",
            first_line(error).rstrip("."),
        )
        return QuantizedBytes()
    scales = sum(math.prod(shape) for name, (_, shape) in tensors.items() if name.endswith(SCALE))
    return QuantizedBytes(stored_bytes(tensors.values(), dtype.itemsize), FACTOR * scales)


def _tensor_types(path: str, revision: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of every tensor by name, from the headers of files in a folder or on the hub."""
    if Path(path).is_dir():
        return tensor_types(weight_files(Path(path)))
    from huggingface_hub import HfApi

    files = HfApi().get_safetensors_metadata(path, revision=revision).files_metadata.values()
    return {name: (str(t.dtype), tuple(t.shape)) for file in files for name, t in file.tensors.items()}


def bytes_held(arguments: ModelArguments, path: str, architecture: Any, dtype: torch.dtype, kind: Kind) -> int | None:
    """Return the bytes of the weights of a model that is quantized, in its files or while it is loaded.

    Args:
        arguments: Which model, and how it is quantized.
        path: Its folder or hub id.
        architecture: Its configuration.
        dtype: Type of the weights that are not quantized.
        kind: Which kind of language model it is.

    Returns:
        Bytes; :data:`UNKNOWN` if the files do not say, and None if all weights are held in ``dtype``.
    """
    quantization, trains_factors = requested_quantization(arguments), arguments.train == "scales"
    if not quantization:
        stored = quantized_bytes(path, architecture, dtype, revision=arguments.model_revision)
        return None if stored is None else stored.weights + trains_factors * stored.factors
    layers = quantized_layers(architecture, kind, quantization)
    factors = FACTOR * number_of_scales(quantization, layers.shapes) if trains_factors else 0
    quantized = bytes_once_quantized(quantization, layers.shapes, dtype.itemsize)
    return (layers.count - layers.quantized) * dtype.itemsize + quantized + factors
