"""Merging a trained adapter into its base: afterwards it is a plain model of transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from zokernel.directions.weights.restore import LOW_PRECISION
from zokernel.errors import RunError, UsageError
from zokernel.finetune.models.model_files import ADAPTER, ADAPTER_CONFIG
from zokernel.finetune.models.quantization import DEQUANTIZED, stored_quantization

logger = logging.getLogger(__name__)


def check_mergeable(trained: str, architecture: Any) -> None:
    """Refuse what cannot be merged, before anything is loaded.

    Args:
        trained: What is trained: ``full parameters``, ``LoRA``, ``scales`` or ``virtual tokens``.
        architecture: The configuration of the base.

    Raises:
        UsageError: If there is no adapter, it is no change of weights, or the base is quantized.

    Example:
        >>> check_mergeable("virtual tokens", None)
        Traceback (most recent call last):
        zokernel.errors.UsageError: Virtual tokens are inputs, not weights, and cannot be merged: keep the adapter.
    """
    if trained in ("full parameters", "scales"):
        what = "all weights" if trained == "full parameters" else "scales"
        raise UsageError(f"There is no adapter to merge: {what} are trained, so leave out --merge_adapter.")
    if trained == "virtual tokens":
        raise UsageError("Virtual tokens are inputs, not weights, and cannot be merged: keep the adapter.")
    if stored_quantization(architecture) not in ("", *DEQUANTIZED):
        raise UsageError(
            "The base is quantized, and an adapter merged into it would be rounded away: keep the adapter, or name "
            "the base in full precision."
        )


def merge(adapted: Any) -> Any:
    """Add an adapter to the weights of its base; the peft model is used up.

    Args:
        adapted: The peft model.

    Returns:
        The base, a plain model of transformers.

    Raises:
        RunError: If a merged weight is not a number.
    """
    _separate_head(adapted.get_base_model())
    try:
        model: Any = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RunError(f"The adapter could not be merged: {' '.join(str(error).split()).rstrip('.')}.") from error
    _untie(model)
    dtype = next(model.parameters()).dtype
    if dtype in LOW_PRECISION:
        logger.info("The merged weights are rounded to %s.", str(dtype).removeprefix("torch."))
    return model


def save_merged(adapted: Any, folder: Path) -> Any:
    """Write the merged model in place of the adapter that a run saved in ``folder``.

    Args:
        adapted: The peft model, which is used up.
        folder: Where its adapter was saved.

    Returns:
        The merged model.
    """
    model = merge(adapted)
    model.save_pretrained(folder)
    # transformers would take the folder for that of an adapter.
    for name in (ADAPTER_CONFIG, ADAPTER):
        (folder / name).unlink(missing_ok=True)
    logger.info("The adapter is merged: plain transformers loads %s.", folder)
    return model


def _separate_head(model: Any) -> None:
    """Give the head a copy of the embeddings that it shares, if LoRA changes one of them: merging would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    shared = [model.get_output_embeddings(), model.get_input_embeddings()]
    if None in shared or not any(isinstance(module, BaseTunerLayer) for module in shared):
        return
    bare: list[Any] = [m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in shared]
    head, embeddings = bare
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(embeddings.weight.clone(), requires_grad=False)


def _untie(model: Any) -> None:
    """Let the configuration say that head and embeddings differ, if the adapter changed only one of them."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None or head.weight.shape != embeddings.weight.shape:
        return
    tied = [config for config in (model.config, model.config.get_text_config()) if config.tie_word_embeddings]
    if tied and head.weight is not embeddings.weight:
        for config in tied:
            config.tie_word_embeddings = False
        logger.info("tie_word_embeddings: false, since the adapter changed the head or the embeddings alone.")
