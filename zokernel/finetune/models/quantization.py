"""How the weights of a model are quantized: what the flags ask for, and what its files hold already."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from zokernel.errors import MissingDependencyError, RunError, UsageError
from zokernel.finetune.models.kind import Kind
from zokernel.finetune.models.quantized_layers import quantized_layers
from zokernel.finetune.settings.arguments import ModelArguments

logger = logging.getLogger(__name__)

TORCHAO = ("torchao:int8", "torchao:int4")
# What reads each kind of quantized checkpoint, and what installs it; other kinds are left to transformers.
_EXTRA = "'zokernel[quantized]'"
LIBRARIES = {
    "bitsandbytes": (("bitsandbytes",), _EXTRA),
    "torchao": (("torchao",), _EXTRA),
    "compressed-tensors": (("compressed_tensors",), _EXTRA),
    "gguf": (("gguf",), "'zokernel[finetune]'"),
    "gptq": (("gptqmodel", "optimum"), "gptqmodel optimum"),
    "awq": (("gptqmodel",), "gptqmodel"),
}
# Read as plain weights: transformers unpacks them in the first forward at the latest.
DEQUANTIZED = ("compressed-tensors", "gguf")
NO_DORA = (
    "peft loses the scales of bitsandbytes' 8 bits when DoRA reads the weights: leave out --use_dora, or use "
    "--load_in_4bit true or --quantization torchao:int8."
)
NAMELESS = "unknown"  # quantized in a way that the configuration does not name, which transformers refuses
# How a model is held, which the record of its predictor repeats.
RECORDED_FLAGS = ("dtype", "load_in_4bit", "load_in_8bit", "quantization", "train", "attn_implementation")


def requested_quantization(arguments: ModelArguments) -> str:
    """Return how flags quantize a model while it is loaded: ``4bit``, ``8bit``, a name of :data:`TORCHAO`, or nothing.

    Raises:
        UsageError: If flags contradict each other, or there is no such quantization.

    Example:
        >>> requested_quantization(ModelArguments(load_in_4bit=True)), requested_quantization(ModelArguments())
        ('4bit', '')
        >>> requested_quantization(ModelArguments(load_in_4bit=True, load_in_8bit=True))
        Traceback (most recent call last):
        zokernel.errors.UsageError: --load_in_4bit and --load_in_8bit contradict each other: give one of them.
    """
    value = arguments.quantization
    if value is not None and value not in TORCHAO:
        raise UsageError(
            f"--quantization must be one of {', '.join(TORCHAO)}, not {value!r} (bitsandbytes: --load_in_4bit true or "
            "--load_in_8bit true)."
        )
    requested = {"4bit": arguments.load_in_4bit, "8bit": arguments.load_in_8bit, value or "": value is not None}
    chosen = [name for name, is_set in requested.items() if is_set]
    if len(chosen) > 1:
        flags = [_flag(name) for name in chosen]
        raise UsageError(f"{flags[0]} and {flags[1]} contradict each other: give one of them.")
    return chosen[0] if chosen else ""


def check_flags(arguments: ModelArguments) -> None:
    """Refuse flags that do not go together, and libraries that are missing, before the model is looked for.

    Raises:
        UsageError: If flags contradict each other.
        RunError: If a library is missing, with the command that installs it.
    """
    if arguments.train not in (None, "scales"):
        raise UsageError(f"--train must be scales, or left out, not {arguments.train!r}.")
    name = requested_quantization(arguments)
    if name and arguments.offload is not None:
        raise UsageError(f"Quantized weights are not streamed: leave out --offload or {_flag(name)}.")
    if name and arguments.gguf_file is not None:
        raise UsageError(
            f"A GGUF file is quantized already: leave out {_flag(name)}, or name a model in full precision."
        )
    if arguments.offload is not None and arguments.gguf_file is not None:
        raise UsageError(
            "The weights of a GGUF file are unpacked as it is read, and not streamed: leave out --offload, or save the "
            "unpacked model once with transformers, and name its folder."
        )
    if name and arguments.merge_adapter:
        raise UsageError(
            f"--merge_adapter would round the adapter away in a base that {_flag(name)} quantizes: leave it out, and "
            "'zokernel merge' adds the adapter to the base in full precision."
        )
    if name == "8bit" and arguments.use_dora:
        raise UsageError(NO_DORA)
    if name:
        check_library(library_of(name), _flag(name))
    if arguments.train == "scales":
        _check_scales(arguments, name)


def check_stored(arguments: ModelArguments, architecture: Any) -> None:
    """Refuse what cannot be done with a model whose files are quantized or, to train scales, are not.

    Args:
        arguments: Which model, and what of it is trained.
        architecture: Its configuration.

    Raises:
        UsageError: If it is to be quantized again, or has other scales than those that can be trained.
        RunError: If the library that reads it is missing, with the command that installs it.
    """
    method, requested = stored_quantization(architecture), requested_quantization(arguments)
    name = arguments.model_name_or_path
    if not method and (ignored := _named_method(architecture)):
        logger.warning(
            "%s names a quantization that transformers does not know (%s): its weights are read as they are.",
            name,
            ignored,
        )
    if method and requested:
        raise UsageError(f"{name} is quantized already ({method}): leave out {_flag(requested)}.")
    if method and arguments.offload is not None:
        raise UsageError(
            f"{name} is quantized ({method}), and quantized weights are not streamed: leave out --offload."
        )
    if method:
        check_library(method, f"{name}, which is quantized ({method}),")
    if arguments.train == "scales" and method != "torchao" and not requested:
        reason = f"those of {method} are not trained" if method else "it is not quantized"
        raise UsageError(
            f"{name} has no scales to train ({reason}): name a model in full precision and add --quantization "
            "torchao:int8 or torchao:int4."
        )


def check_layers(arguments: ModelArguments, architecture: Any, kind: Kind) -> None:
    """Refuse a quantization that would leave all of a model in full precision.

    Args:
        arguments: Which model, and how it is quantized.
        architecture: Its configuration.
        kind: Which kind of language model it is.

    Raises:
        UsageError: If no layer of the model would be quantized.
    """
    requested = requested_quantization(arguments)
    if not requested or quantized_layers(architecture, kind, requested).shapes:
        return
    others = "" if requested.endswith("bit") else ", or try --load_in_8bit true, which knows more kinds of layers"
    raise UsageError(
        f"{_flag(requested)} would quantize nothing: {arguments.model_name_or_path} has no linear layers besides its "
        f"head. Leave it out{others}."
    )


def stored_quantization(architecture: Any) -> str:
    """Return how the files of a model are quantized, by transformers' name; empty if they are not.

    A kind that transformers does not know is none: it reads such weights as they are.

    Example:
        >>> from transformers import LlamaConfig
        >>> gptq = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
        >>> stored_quantization(gptq), stored_quantization(LlamaConfig())
        ('gptq', '')
    """
    method = _named_method(architecture)
    return method if _is_known(method) else ""


def stays_quantized(arguments: ModelArguments, architecture: Any) -> bool:
    """Return whether a model's weights are quantized when it has been loaded."""
    method = stored_quantization(architecture)
    return bool(requested_quantization(arguments)) or (method != "" and method not in DEQUANTIZED)


def recorded_flags(arguments: ModelArguments) -> dict[str, Any]:
    """Return the flags that load what a run has saved as the run held it, for the record of its predictor.

    An adapter's base is quantized anew.  Trained scales are saved in a model that is quantized already.
    """
    flags = {name: getattr(arguments, name) for name in RECORDED_FLAGS}
    return flags | {"quantization": None} if arguments.train == "scales" else flags


def _check_scales(arguments: ModelArguments, quantization: str) -> None:
    if quantization.endswith("bit"):
        raise UsageError(
            f"--train scales trains the scales of torchao, and {_flag(quantization)} is bitsandbytes: use "
            "--quantization torchao:int8 or torchao:int4."
        )
    others = [
        name
        for name in ("lora", "prefix_tuning", "prompt_tuning", "adapter_name_or_path", "offload", "gguf_file")
        if getattr(arguments, name)
    ]
    if others:
        raise UsageError(f"--train scales trains nothing but scales, of a quantized model: leave out --{others[0]}.")


def check_library(method: str, what: str) -> None:
    """Refuse to go on without the library that a kind of quantization needs.

    Raises:
        RunError: If it is missing, with the command that installs it.
    """
    packages, command = LIBRARIES.get(method, ((), ""))
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return
    if command == _EXTRA:
        raise MissingDependencyError(missing[0], "quantized", what)
    raise RunError(f"{what} needs {' and '.join(missing)}, not installed here: pip install {command}.")


def library_of(quantization: str) -> str:
    """Return the library that quantizes a model while it is loaded, as :func:`requested_quantization` names how.

    Example:
        >>> library_of("4bit"), library_of("torchao:int8")
        ('bitsandbytes', 'torchao')
    """
    return "bitsandbytes" if quantization.endswith("bit") else "torchao"


def _named_method(architecture: Any) -> str:
    """Return the kind of quantization that a configuration names, whether there is such a kind or not."""
    settings = getattr(architecture, "quantization_config", None)
    if settings is None:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or NAMELESS)


def _is_known(method: str) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    methods = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    return method in {*methods, NAMELESS}


def _flag(name: str) -> str:
    return f"--load_in_{name}" if name.endswith("bit") else "--quantization"
