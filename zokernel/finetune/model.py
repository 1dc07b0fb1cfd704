"""Loading the model to train: memory first, then weights, then the adapter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zokernel.data import resolve_model_path
from zokernel.errors import MissingDependencyError, RunError, UsageError
from zokernel.finetune.arguments import ModelArguments
from zokernel.finetune.config import ZOConfig

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(arguments: ModelArguments, config: ZOConfig) -> tuple[nn.Module, Any]:
    """Load the language model and its tokenizer, and attach or load the LoRA adapter.

    Args:
        arguments: Which model and adapter.
        config: The run's settings (the memory estimate depends on the method).

    Returns:
        Model and tokenizer.

    Raises:
        UsageError: If there is no such model, or it cannot be trained this way.
        RunError: If it will not fit in memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if arguments.dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {arguments.dtype!r}.")
    path = resolve_model_path(arguments.model_name_or_path)
    try:
        architecture = AutoConfig.from_pretrained(path, revision=arguments.model_revision)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=arguments.model_revision)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"Model {arguments.model_name_or_path!r} could not be loaded ({_first_line(error)}): give 'smollm2', "
            "a folder written by save_pretrained, or a hub id that can be reached."
        ) from error
    if getattr(architecture, "quantization_config", None) is not None and not arguments.lora:
        raise UsageError(
            f"{arguments.model_name_or_path} is quantized, so its weights cannot be perturbed: dequantize it, "
            "or train an adapter with --lora true."
        )
    dtype = DTYPES[arguments.dtype]
    adapter = bool(arguments.lora or arguments.adapter_name_or_path)
    check_memory(architecture, dtype, config, adapter=adapter, skip=arguments.skip_memory_check)
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            path, revision=arguments.model_revision, dtype=dtype, **options
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"Model {arguments.model_name_or_path!r} could not be loaded ({_first_line(error)})."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    if adapter:
        model = attach_lora(model, arguments)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        "Model %s: %s parameters, %s of them trained.", arguments.model_name_or_path, f"{total:,}", f"{trained:,}"
    )
    return model, tokenizer


def attach_lora(model: nn.Module, arguments: ModelArguments) -> nn.Module:
    """Wrap a model with a new LoRA adapter, or with a saved one to continue.

    Raises:
        UsageError: If the adapter or its target modules do not exist.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise MissingDependencyError("peft", "finetune", "LoRA") from error
    try:
        if arguments.adapter_name_or_path:
            return PeftModel.from_pretrained(model, arguments.adapter_name_or_path, is_trainable=True).eval()
        adapter = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            target_modules=arguments.lora_target_modules,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, adapter).eval()
    except (ValueError, OSError) as error:
        raise UsageError(f"The LoRA adapter could not be attached: {_first_line(error)}") from error


@torch.no_grad()
def load_weights_(model: nn.Module, folder: Path) -> None:
    """Copy saved weights into a model in place, holding one tensor at a time beside it.

    Args:
        model: The model (or peft model) that was saved.
        folder: A checkpoint folder with ``.safetensors`` files.

    Raises:
        RunError: If the folder holds no weights, or they are another model's.
    """
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RunError(f"{folder} holds no .safetensors weights: the checkpoint is incomplete.")
    targets = model.state_dict()
    if hasattr(model, "peft_config"):
        # peft leaves the adapter's name out of the saved names: "...lora_A.weight" is "...lora_A.default.weight".
        targets = {name.replace(f".{model.active_adapter}.", "."): tensor for name, tensor in targets.items()}
    for file in files:
        with safe_open(file, "pt") as archive:
            names = list(archive.keys())
        for name in names:
            # Opened anew for each tensor: pages of the file that were read count as memory until it is closed.
            with safe_open(file, "pt") as archive:
                if name not in targets:
                    raise RunError(
                        f"{file} holds {name!r}, which this model has not: it is another model's checkpoint."
                    )
                targets[name].copy_(archive.get_tensor(name))


def estimate_memory(
    architecture: Any, dtype: torch.dtype, config: ZOConfig, *, adapter: bool = False
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

    Returns:
        Bytes by part, with their ``total``.
    """
    from transformers import AutoModelForCausalLM

    from zokernel.optim import get_method

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    count = sum(p.numel() for p in model.parameters())
    copies = 0.0
    if not adapter:
        copies = getattr(get_method(config.method), "memory_copies", 0.0)
        copies += bool(config.momentum) + (config.restore == "copy")
        copies += {"fp32": 1.0, "int8": 0.28}.get(config.method_options().get("averaging", "none"), 0.0)
    parts = {"weights": count * dtype.itemsize, "method": int(copies * count * 4)}
    if config.bf16:
        parts["autocast"] = 2 * max(p.numel() for p in model.parameters())
    return {**parts, "total": sum(parts.values())}


def check_memory(
    architecture: Any, dtype: torch.dtype, config: ZOConfig, *, adapter: bool = False, skip: bool = False
) -> None:
    """Log the memory estimate, and stop before loading a model that will not fit.

    Raises:
        RunError: If the estimate exceeds the memory that is free.
    """
    import psutil

    parts = estimate_memory(architecture, dtype, config, adapter=adapter)
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    listing = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if name != "total" and size)
    logger.info("Memory: %.2f GiB (%s) and activations; %.2f GiB free.", parts["total"] / 2**30, listing, free / 2**30)
    if parts["total"] > free and not skip:
        raise RunError(
            f"The run needs at least {parts['total'] / 2**30:.2f} GiB ({listing}) and {free / 2**30:.2f} GiB are free: "
            "use a smaller model, --dtype bfloat16 with --lora true, or --skip_memory_check true."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
