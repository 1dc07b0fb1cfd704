"""Loading the model to train: memory first, then weights, then the adapter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from zokernel.data.hub_requests import bounded_requests
from zokernel.finetune.models.adapters import attach_adapter, trains_adapter
from zokernel.finetune.models.check import CheckedModel, check_model, loading_error
from zokernel.finetune.models.check_loaded import (
    check_complete,
    check_finite,
    reload_if_changed_,
    stop_rescaling_,
    warn_of_zeros,
)
from zokernel.finetune.models.estimate import bytes_held, check_memory
from zokernel.finetune.models.gguf import gguf_options
from zokernel.finetune.models.kind import auto_class
from zokernel.finetune.models.offload import load_offloaded
from zokernel.finetune.models.quantization import requested_quantization
from zokernel.finetune.models.quantization_config import loading_options
from zokernel.finetune.models.quantized_model import count_parameters, detach_from_files_, prevent_repacking_
from zokernel.finetune.models.same_base import other_base
from zokernel.finetune.models.scales import log_trained_scales, train_scales_
from zokernel.finetune.models.trainable import accept_quantized_
from zokernel.finetune.models.vocabulary import choose_pad_token
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.zo_arguments import is_first_order

logger = logging.getLogger(__name__)


def load_model(
    arguments: ModelArguments, config: ZOConfig, checked: CheckedModel | None = None
) -> tuple[nn.Module, Any]:
    """Load the language model and its tokenizer, and attach or load the adapter.

    Args:
        arguments: Which model and adapter.
        config: The run's settings (the memory estimate depends on the method).
        checked: What :func:`check_model` found, if it was called before.

    Returns:
        Model and tokenizer.

    Raises:
        UsageError: If there is no such model, or it cannot be trained this way.
        RunError: If it will not fit in memory.
    """
    checked = checked or check_model(arguments)
    arguments = checked.arguments
    name, kind, adapter = arguments.model_name_or_path, checked.kind, trains_adapter(arguments)
    streams = arguments.offload is not None
    if not streams:
        check_memory(
            checked.architecture,
            checked.dtype,
            config,
            adapter=adapter or arguments.train == "scales",
            kind=kind,
            stored=bytes_held(arguments, checked.path, checked.architecture, checked.dtype, kind),
            skip=arguments.skip_memory_check,
        )
    model = (
        load_offloaded(checked, arguments, config)
        if streams
        else load_pretrained(checked, arguments, device=config.device)
    )
    tokenizer = checked.tokenizer
    choose_pad_token(model, tokenizer)
    if adapter:
        model = attach_adapter(model, arguments, seed=config.seed, first_order=is_first_order(config.method))
    if arguments.train == "scales":
        model = train_scales_(model)
        if config.do_train:
            log_trained_scales(model)
    accept_quantized_(model, first_order=is_first_order(config.method))
    saved = arguments.adapter_name_or_path
    if saved and (difference := other_base(model, saved, name)):
        logger.warning("%s is not the model that the adapter %s was trained on: %s.", name, saved, difference)
    check_finite(model, name)
    warn_of_zeros(model, name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = count_parameters(model)
    share = f", {'all' if trained == total else f'{trained:,}'} trained" if config.do_train else ""
    logger.info("Model %s: %s parameters%s.", name, f"{total:,}", share)
    return model, tokenizer


@bounded_requests()
def load_pretrained(checked: CheckedModel, arguments: ModelArguments, *, device: Any = None) -> nn.Module:
    """Load a model whose weights are all in its files, in evaluation mode.

    Args:
        checked: Which model.
        arguments: How it is loaded.
        device: Where bitsandbytes quantizes it, and where it stays; the GPU if there is one.

    Raises:
        UsageError: If it cannot be loaded, or some of its weights are not in its files.
    """
    from transformers.utils import logging as library_logging

    options: dict[str, Any] = gguf_options(arguments)
    options |= loading_options(arguments, checked.architecture, checked.dtype, kind=checked.kind)
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    if device is not None and (arguments.load_in_4bit or arguments.load_in_8bit):
        options["device_map"] = {"": str(device)}
    name, verbosity = arguments.model_name_or_path, library_logging.get_verbosity()
    library_logging.set_verbosity_error()  # what it would report about names is said below, in a sentence
    try:
        model, loading_info = auto_class(checked.kind).from_pretrained(
            checked.path,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
            dtype=checked.dtype,
            use_safetensors=None if arguments.gguf_file else True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # files may be wrong in any way
        revision, file = arguments.model_revision, arguments.gguf_file
        raise loading_error(name, error, revision=revision, gguf_file=file) from error
    finally:
        library_logging.set_verbosity(verbosity)
    check_complete(model, loading_info, name)
    prevent_repacking_(model)
    if requested_quantization(arguments):
        detach_from_files_(model)
    if Path(checked.path).is_dir() and arguments.gguf_file is None:
        reload_if_changed_(model, Path(checked.path))
    stop_rescaling_(model)
    return model.eval()


def longest_input(model: nn.Module, tokenizer: Any, requested: int | None, *, reserved: int = 0) -> int:
    """Return how many tokens an example may have: as asked for, or 2048, and never more than the model takes.

    Args:
        model: The model, whose configuration may limit positions.
        tokenizer: Its tokenizer, which may know a limit too.
        requested: What was asked for, if anything.
        reserved: Positions that are not for the example: virtual tokens and what will be generated.

    Returns:
        A number of tokens.
    """
    architecture: Any = getattr(model, "config", None)
    limits = [requested or 2048]
    positions = getattr(architecture, "max_position_embeddings", None)
    if positions:
        # RoBERTa and its kin number positions from the padding token's id on.
        starts_at = 2 if "roberta" in architecture.model_type else 0
        limits.append(positions - starts_at - reserved)
    if tokenizer.model_max_length < 10**9:
        limits.append(tokenizer.model_max_length - reserved)
    if requested and min(limits) < requested:
        logger.info("max_length: %d tokens, the most that this model takes.", min(limits))
    return min(limits)
