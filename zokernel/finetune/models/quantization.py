"""How the weights of a model are quantized: what the flags ask for, and what its files hold already."""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.errors import MissingDependencyError, RunError, UsageError
from zokernel.finetune.models.kind import Kind
from zokernel.finetune.models.quantized_layers import group_size, quantized_layers
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.without_adapter import without_adapter

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
LOADING = ("dtype", "load_in_4bit", "load_in_8bit", "quantization", "train", "attn_implementation")  # how it is held


def asked_for(arguments: ModelArguments) -> str:
    """Return how flags quantize a model while it is loaded: ``4bit``, ``8bit``, a name of :data:`TORCHAO`, or nothing.

    Raises:
        UsageError: If flags contradict each other, or there is no such quantization.

    Example:
        >>> asked_for(ModelArguments(load_in_4bit=True)), asked_for(ModelArguments())
        ('4bit', '')
        >>> asked_for(ModelArguments(load_in_4bit=True, load_in_8bit=True))
        Traceback (most recent call last):
        zokernel.errors.UsageError: --load_in_4bit and --load_in_8bit contradict each other: give one of them.
    """
    named = arguments.quantization
    if named is not None and named not in TORCHAO:
        raise UsageError(
            f"--quantization must be one of {', '.join(TORCHAO)}, not {named!r} (bitsandbytes: --load_in_4bit true or "
            "--load_in_8bit true)."
        )
    given = {"4bit": arguments.load_in_4bit, "8bit": arguments.load_in_8bit, named or "": named is not None}
    found = [name for name, wanted in given.items() if wanted]
    if len(found) > 1:
        flags = [_flag(name) for name in found]
        raise UsageError(f"{flags[0]} and {flags[1]} contradict each other: give one of them.")
    return found[0] if found else ""


def check_flags(arguments: ModelArguments) -> None:
    """Refuse flags that do not go together, and libraries that are missing, before the model is looked for.

    Raises:
        UsageError: If flags contradict each other.
        RunError: If a library is missing, with the command that installs it.
    """
    if arguments.train not in (None, "scales"):
        raise UsageError(f"--train must be scales, or left out, not {arguments.train!r}.")
    name = asked_for(arguments)
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
    method, name, asked = stored_as(architecture), arguments.model_name_or_path, asked_for(arguments)
    if not method and (ignored := _named(architecture)):
        logger.warning(
            "%s names a quantization that transformers does not know (%s): its weights are read as they are.",
            name,
            ignored,
        )
    if method and asked:
        raise UsageError(f"{name} is quantized already ({method}): leave out {_flag(asked)}.")
    if method and arguments.offload is not None:
        raise UsageError(
            f"{name} is quantized ({method}), and quantized weights are not streamed: leave out --offload."
        )
    if method:
        check_library(method, f"{name}, which is quantized ({method}),")
    if arguments.train == "scales" and method != "torchao" and not asked:
        told = f"those of {method} are not trained" if method else "it is not quantized"
        raise UsageError(
            f"{name} has no scales to train ({told}): name a model in full precision and add --quantization "
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
    asked = asked_for(arguments)
    if not asked or quantized_layers(architecture, kind, asked).shapes:
        return
    others = "" if asked.endswith("bit") else ", or try --load_in_8bit true, which knows more kinds of layers"
    raise UsageError(
        f"{_flag(asked)} would quantize nothing: {arguments.model_name_or_path} has no linear layers besides its head. "
        f"Leave it out{others}."
    )


def stored_as(architecture: Any) -> str:
    """Return how the files of a model are quantized, by transformers' name; empty if they are not.

    A kind that transformers does not know is none: it reads such weights as they are.

    Example:
        >>> from transformers import LlamaConfig
        >>> stored_as(LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})), stored_as(LlamaConfig())
        ('gptq', '')
    """
    method = _named(architecture)
    return method if _is_known(method) else ""


def stays_quantized(arguments: ModelArguments, architecture: Any) -> bool:
    """Return whether a model's weights are quantized when it has been loaded."""
    method = stored_as(architecture)
    return bool(asked_for(arguments)) or (method != "" and method not in DEQUANTIZED)


def told(model: Any) -> str:
    """Return in words how a loaded model, or the model inside an adapter, is quantized; empty if it is not.

    Example:
        >>> told(nn.Linear(2, 2))
        ''
    """
    bare = without_adapter(model)
    if not getattr(bare, "is_quantized", False):
        return ""
    settings = getattr(bare.config, "quantization_config", None)
    method = stored_as(bare.config)
    if method == "bitsandbytes":
        return f"bitsandbytes {4 if getattr(settings, 'load_in_4bit', False) else 8} bit"
    kind = getattr(settings, "quant_type", None)
    return f"{method} {type(kind).__name__}" if kind is not None and not isinstance(kind, str) else method


def loading_flags(arguments: ModelArguments) -> dict[str, Any]:
    """Return the flags that load what a run has saved as the run held it, for the record of its predictor.

    An adapter's base is quantized anew.  Trained scales are saved in a model that is quantized already.
    """
    flags = {name: getattr(arguments, name) for name in LOADING}
    return flags | {"quantization": None} if arguments.train == "scales" else flags


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
    from transformers import BitsAndBytesConfig, CompressedTensorsConfig, TorchAoConfig

    asked, method = asked_for(arguments), stored_as(architecture)
    left = quantized_layers(architecture, kind, asked).left() if asked else ""
    if left:
        logger.info("%s, are not linear layers and stay in %s.", left, str(dtype).removeprefix("torch."))
    if asked == "4bit":
        logger.info("Quantization: bitsandbytes nf4, 4 bits, in blocks of 64 with one scale each.")
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        }
    if asked == "8bit":
        logger.info(
            "Quantization: bitsandbytes, 8 bits, one scale per row; inputs of layers are rounded to 8 bits too."
        )
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if asked == "torchao:int8":
        from torchao.quantization import Int8WeightOnlyConfig

        logger.info("Quantization: torchao, 8 bits, one scale per row.")
        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    if asked == "torchao:int4":
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis, PerGroup

        group = group_size(quantized_layers(architecture, kind, asked).shapes)
        logger.info(
            "Quantization: torchao, 4 bits, one scale per %s; torchao holds each number in a byte, so the memory is "
            "that of 8 bits (--load_in_4bit true packs two into one).",
            f"{group} numbers" if group else "row",
        )
        granularity = PerGroup(group) if group else PerAxis(0)
        four: Any = torch.int4  # type: ignore[attr-defined]
        return {"quantization_config": TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four, granularity=granularity))}
    if method == "compressed-tensors":
        logger.info(
            "%s is unpacked to %s as it is loaded: transformers would do so in the first forward.",
            arguments.model_name_or_path,
            str(dtype).removeprefix("torch."),
        )
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return {}


def keep_as_stored_(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for AVX-512 in the first forward.

    It would round the scales to bf16, so the weights would no longer be those that were loaded and hashed; and it fails
    on layers whose inputs are no multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no attribute of nn.Module)


@torch.no_grad()
def leave_files_(model: nn.Module) -> None:
    """Copy what was not quantized out of the files of a model that was quantized while it was loaded.

    Embeddings and norms would be views of the mapped files, so all pages of the full-precision weights would stay, and
    count as memory of the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        plain = type(tensor) in (nn.Parameter, Tensor) and not hasattr(tensor, "__tensor_flatten__")
        if plain and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers a model's parameters stand for: bitsandbytes packs two of 4 bits into a byte."""
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in model.parameters())
    return sum(parameter.numel() if state is None else math.prod(state.shape) for parameter, state in states)


def needs_no_gradients_(model: Any) -> None:
    """Let ``transformers.Trainer`` take a quantized model that it knows no gradients of: forwards need none."""
    bare = without_adapter(model)
    quantizer = getattr(bare, "hf_quantizer", None)
    if quantizer is not None and not (quantizer.is_trainable and getattr(quantizer, "is_qat_trainable", False)):
        kind = type(quantizer)
        quantizer.__class__ = type(kind.__name__, (kind,), {"is_trainable": True, "is_qat_trainable": True})


def _check_scales(arguments: ModelArguments, asked: str) -> None:
    if asked.endswith("bit"):
        raise UsageError(
            f"--train scales trains the scales of torchao, and {_flag(asked)} is bitsandbytes: use --quantization "
            "torchao:int8 or torchao:int4."
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


def library_of(asked: str) -> str:
    """Return the library that quantizes a model while it is loaded, as :func:`asked_for` names how.

    Example:
        >>> library_of("4bit"), library_of("torchao:int8")
        ('bitsandbytes', 'torchao')
    """
    return "bitsandbytes" if asked.endswith("bit") else "torchao"


def _named(architecture: Any) -> str:
    """Return the kind of quantization that a configuration names, whether there is such a kind or not."""
    found = getattr(architecture, "quantization_config", None)
    if found is None:
        return ""
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or NAMELESS)


def _is_known(method: str) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    return method in {*known, NAMELESS}


def _flag(name: str) -> str:
    return f"--load_in_{name}" if name.endswith("bit") else "--quantization"
