"""Checks of a model that was just loaded: every weight came from its files, is a number, and stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zokernel.errors import UsageError
from zokernel.finetune.models.model_files import weight_files
from zokernel.finetune.models.weights import load_weights_
from zokernel.private_apis import converts_weights

logger = logging.getLogger(__name__)

# What old checkpoints hold, and models compute by themselves.
_COMPUTED = ("inv_freq", "position_ids", "masked_bias", ".attn.bias", ".attention.bias")
# Starts of adapters, and what is drawn or learned from zero on.
_MAY_BE_ZERO = ("lora_B", "lora_embedding_B", "lora_magnitude", "bias", "prompt_encoder", "cls_token", "pos_embed")


def check_complete(model: Any, loading_info: Mapping[str, Any], name: str) -> None:
    """Refuse a model some of whose weights are not in its files, and say what of the files was left out.

    Args:
        model: The model.
        loading_info: What ``from_pretrained(output_loading_info=True)`` returned with it.
        name: What the user calls the model.

    Raises:
        UsageError: If weights are missing or of other shapes, naming them.
    """
    kind = type(model).__name__
    for key, stored, expected in sorted(loading_info["mismatched_keys"]):
        raise UsageError(
            f"{name} stores {key!r} in shape {tuple(stored)}, and its configuration asks for {tuple(expected)}: the "
            "files are of different models, or config.json was changed."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    new = sorted(key for key in loading_info["missing_keys"] if key in parameters)
    if new:
        saved = " ".join(getattr(model.config, "architectures", None) or [])
        was = f", since it was saved as {saved}" if saved and saved != kind else ""
        raise UsageError(
            f"{name} lacks weights of {kind}, which would start at random ({_first_names(new)}){was}: choose a "
            "checkpoint that holds them, such as the language model it was made from."
        )
    unexpected = sorted(key for key in loading_info["unexpected_keys"] if not key.endswith(_COMPUTED))
    if unexpected:
        logger.warning(
            "%s holds weights that %s does not have, which are left out: %s.", name, kind, _first_names(unexpected)
        )


def warn_of_zeros(model: nn.Module, name: str) -> None:
    """Warn of weights that are all zero: a file that was never filled, or a layer that passes nothing on.

    Biases and other vectors may be, and one of LoRA's two matrices begins so.
    """
    zero = [
        key
        for key, parameter in model.named_parameters()
        if parameter.ndim > 1
        and parameter.is_floating_point()
        and not hasattr(parameter, "__tensor_flatten__")
        and not any(part in key for part in _MAY_BE_ZERO)
        and not parameter.detach().any()
    ]
    if zero:
        message = "Weights of %s are all zero (%s): if they should not be, its files are damaged."
        logger.warning(message, name, _first_names(zero))


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a model with weights that are not numbers: no loss of it would be one.

    Raises:
        UsageError: If a weight is NaN or infinite, naming the tensor.
    """
    for key, parameter in model.named_parameters():
        if parameter.numel() and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            if hasattr(parameter, "__tensor_flatten__"):  # quantized: its numbers are those of its scales
                continue
            low, high = parameter.detach().aminmax()
            if not (low.isfinite() and high.isfinite()):
                count = int((~parameter.detach().isfinite()).sum())
                raise UsageError(
                    f"The weight {key!r} of {name} is NaN or infinite in {count:,} of {parameter.numel():,} places, so "
                    "that no loss can be taken: the file is damaged, or the run that wrote it diverged."
                )


@torch.no_grad()
def reload_if_changed_(model: nn.Module, folder: Path) -> None:
    """Compare the first numbers of each tensor with the model's files, and read the files again where they differ.

    transformers 5.23 draws the embeddings of Funnel and Youtu anew after it loaded them, if they are tied to the head.

    Args:
        model: A model that was loaded without conversions.
        folder: Its folder.
    """
    from safetensors import safe_open

    if getattr(model, "is_quantized", False) or converts_weights(model):
        return
    targets, changed = model.state_dict(), []
    for file in weight_files(folder):
        with safe_open(file, "pt") as archive:
            for key in archive.keys():  # noqa: SIM118 (not a dictionary)
                part = archive.get_slice(key)
                if key in targets and len(part.get_shape()) > 0:
                    start = part[:1].to(targets[key].dtype)
                    if not torch.equal(start.nan_to_num(), targets[key][:1].nan_to_num()):
                        changed.append(key)
    if changed:
        logger.info("transformers did not keep %s as stored: read again, tensor by tensor.", _first_names(changed))
        load_weights_(model, folder)


def stop_rescaling_(model: Any) -> None:
    """Let RWKV keep its weights as they are.

    In evaluation mode it divides weights of its layers by powers of two, against overflow in fp16.  What is trained
    would be the divided weights; saved, they would be divided again by whoever loads them.
    """
    if getattr(model.config, "model_type", "") == "rwkv" and model.config.rescale_every > 0:
        model.config.rescale_every = 0
        logger.info("rescale_every: 0, so that the weights that are saved are those that were trained.")


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
