"""Models in GGUF files, which transformers unpacks as it reads them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError
from zokernel.finetune.models.quantization import check_library
from zokernel.finetune.settings.arguments import ModelArguments

logger = logging.getLogger(__name__)


def with_gguf(arguments: ModelArguments) -> ModelArguments:
    """Return arguments that name folder and GGUF file, where ``model_name_or_path`` is the file.

    Raises:
        UsageError: If two files are named, or there is no such file.

    Example:
        >>> with_gguf(ModelArguments()).gguf_file is None
        True
    """
    place = Path(arguments.model_name_or_path).expanduser()
    if place.suffix.lower() == ".gguf":
        if arguments.gguf_file is not None:
            raise UsageError(f"{place} is a GGUF file, and --gguf_file names another: give one of them.")
        if not place.is_file():
            raise UsageError(f"There is no GGUF file {place}: correct --model_name_or_path.")
        arguments = replace(arguments, model_name_or_path=str(place.parent), gguf_file=place.name)
    elif arguments.gguf_file is not None and place.is_dir() and not (place / arguments.gguf_file).is_file():
        raise UsageError(f"There is no GGUF file {place / arguments.gguf_file}: correct --gguf_file.")
    if arguments.gguf_file is not None:
        check_library("gguf", f"{arguments.gguf_file}")
    return arguments


def gguf_options(arguments: ModelArguments) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told of a GGUF file, and log it; nothing if there is none."""
    from transformers import GgufConfig

    if arguments.gguf_file is None:
        return {}
    logger.info("%s is unpacked as it is read: the model is held, trained and saved in full.", arguments.gguf_file)
    return {"gguf_file": arguments.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
