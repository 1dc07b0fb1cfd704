"""Loading the model to train: memory first, then weights, then the adapter."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from zokernel.data import resolve_model_path
from zokernel.errors import RunError, UsageError, first_line
from zokernel.finetune.models.adapters import attach_adapter, wants_adapter
from zokernel.finetune.models.kind import Kind, auto_class, language_model_kind
from zokernel.finetune.models.pickles import refuse_pickles
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.config import ZOConfig

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(arguments: ModelArguments, config: ZOConfig) -> tuple[nn.Module, Any]:
    """Load the causal or masked language model and its tokenizer, and attach or load the adapter.

    Args:
        arguments: Which model and adapter.
        config: The run's settings (the memory estimate depends on the method).

    Returns:
        Model and tokenizer.

    Raises:
        UsageError: If there is no such model, or it cannot be trained this way.
        RunError: If it will not fit in memory.
    """
    from transformers import AutoConfig, AutoTokenizer

    if arguments.dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {arguments.dtype!r}.")
    path = resolve_model_path(arguments.model_name_or_path)
    refuse_pickles(path, what="model")
    if arguments.adapter_name_or_path:
        refuse_pickles(arguments.adapter_name_or_path, what="adapter")
    try:
        architecture = AutoConfig.from_pretrained(path, revision=arguments.model_revision)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=arguments.model_revision)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"Model {arguments.model_name_or_path!r} could not be loaded ({first_line(error)}): give 'smollm2', "
            "a folder written by save_pretrained, or a hub id that can be reached."
        ) from error
    if getattr(architecture, "quantization_config", None) is not None and not wants_adapter(arguments):
        raise UsageError(
            f"{arguments.model_name_or_path} is quantized, so its weights cannot be perturbed: dequantize it, "
            "or train an adapter with --lora true."
        )
    dtype = DTYPES[arguments.dtype]
    adapter = wants_adapter(arguments)
    kind = language_model_kind(architecture, arguments.lm_type)
    if kind == "seq2seq":
        raise UsageError(
            f"{arguments.model_name_or_path} is a sequence-to-sequence model ({architecture.model_type}), which prompt "
            "tasks cannot train yet: use a causal or masked model, or zokernel.finetune.zeroth_order(Seq2SeqTrainer)."
        )
    check_memory(architecture, dtype, config, adapter=adapter, kind=kind, skip=arguments.skip_memory_check)
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    try:
        model: nn.Module = auto_class(kind).from_pretrained(
            path, revision=arguments.model_revision, dtype=dtype, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"Model {arguments.model_name_or_path!r} could not be loaded ({first_line(error)})."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    if adapter:
        model = attach_adapter(model, arguments, masked=kind == "masked", seed=config.seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        "Model %s: %s parameters, %s trained.",
        arguments.model_name_or_path,
        f"{total:,}",
        "all" if trained == total else f"{trained:,}",
    )
    return model, tokenizer


def longest_input(model: nn.Module, tokenizer: Any, wanted: int | None, *, reserved: int = 0) -> int:
    """Return how many tokens an example may have: as asked for, or 2048, and never more than the model takes.

    Args:
        model: The model, whose configuration may limit positions.
        tokenizer: Its tokenizer, which may know a limit too.
        wanted: What was asked for, if anything.
        reserved: Positions that are not for the example: virtual tokens and what will be generated.

    Returns:
        A number of tokens.
    """
    architecture: Any = getattr(model, "config", None)
    limits = [wanted or 2048]
    positions = getattr(architecture, "max_position_embeddings", None)
    if positions:
        # RoBERTa and its kin number positions from the padding token's id on.
        starts_at = 2 if "roberta" in architecture.model_type else 0
        limits.append(positions - starts_at - reserved)
    if tokenizer.model_max_length < 10**9:
        limits.append(tokenizer.model_max_length - reserved)
    if wanted and min(limits) < wanted:
        logger.info("max_length: %d tokens, the most that this model takes.", min(limits))
    return min(limits)


def estimate_memory(
    architecture: Any, dtype: torch.dtype, config: ZOConfig, *, adapter: bool = False, kind: Kind = "causal"
) -> dict[str, int]:
    """Estimate the peak memory of training, in bytes, without allocating the model.

    Weights as stored; the copies that the method keeps (gradients and moments for first-order methods); and, under
    autocast, the largest weight in bf16 while its layer runs.  Activations are left out: they depend on the batch, and
    forward-only training keeps one layer's at a time.

    Args:
        architecture: The model's configuration.
        dtype: Storage type of the weights.
        config: The run's settings.
        adapter: Whether only an adapter is trained, whose own copies are too small to count.
        kind: Which kind of language model it is.

    Returns:
        Bytes by part, with their ``total``.
    """
    from zokernel.optim import get_method

    with torch.device("meta"):
        model = auto_class(kind).from_config(architecture)
    count = sum(p.numel() for p in model.parameters())
    copies = 0.0
    if not adapter:
        copies = getattr(get_method(config.method), "memory_copies", 0.0)
        copies += bool(config.momentum) + (config.perturb == "in_place:copy")
        copies += {"fp32": 1.0, "int8": 0.28}.get(config.method_options().get("averaging", "none"), 0.0)
    parts = {"weights": count * dtype.itemsize, "method": int(copies * count * 4)}
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
    skip: bool = False,
) -> None:
    """Log the memory estimate, and stop before loading a model that will not fit.

    Raises:
        RunError: If the estimate exceeds the memory that is free.
    """
    import psutil

    parts = estimate_memory(architecture, dtype, config, adapter=adapter, kind=kind)
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    listing = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if name != "total" and size)
    logger.info("Memory: %.2f GiB (%s) and activations; %.2f GiB free.", parts["total"] / 2**30, listing, free / 2**30)
    if parts["total"] > free and not skip:
        raise RunError(
            f"The run needs at least {parts['total'] / 2**30:.2f} GiB ({listing}) and {free / 2**30:.2f} GiB are free: "
            "use a smaller model, --dtype bfloat16 with --lora true, or --skip_memory_check true."
        )
