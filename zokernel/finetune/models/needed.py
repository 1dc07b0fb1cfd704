"""What a run will need, in words: the ways to hold its weights, and the fastest that fits the free memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from zokernel.data import resolve_model_path
from zokernel.data.hub_requests import bounded_requests
from zokernel.errors import UsageError
from zokernel.finetune.models.check import DTYPES, not_loaded, stored_dtype
from zokernel.finetune.models.estimate import quantized_bytes
from zokernel.finetune.models.gguf import with_gguf
from zokernel.finetune.models.kind import Kind, language_model_kind
from zokernel.finetune.models.quantization import DEQUANTIZED, stored_as
from zokernel.finetune.models.saved_adapter import with_base
from zokernel.finetune.models.ways import measure, table, ways
from zokernel.finetune.settings.arguments import ModelArguments


@dataclass(frozen=True)
class Configured:
    """A model of which only the configuration was read.

    Attributes:
        architecture: Its configuration.
        dtype: The type in which its weights will be held.
        kind: Which kind of language model it is.
        arguments: Which model and adapter: of an adapter's folder, its base and itself.
        stored: Bytes of its weights if its files are quantized and it stays so, 0 if they are unknown.
        unpacked: Whether its files are quantized, and unpacked as it is loaded.
    """

    architecture: Any
    dtype: torch.dtype
    kind: Kind
    arguments: ModelArguments
    stored: int | None = None
    unpacked: bool = False


@bounded_requests()
def read_configuration(arguments: ModelArguments) -> Configured:
    """Read a model's configuration, and no weights.

    Args:
        arguments: Which model: a name, a folder, a hub id, a ``config.json``, a GGUF file, or the folder of an adapter.

    Raises:
        UsageError: If there is no such configuration.
    """
    from transformers import AutoConfig

    arguments = with_gguf(with_base(arguments))
    name, file = arguments.model_name_or_path, arguments.gguf_file
    if arguments.dtype not in (*DTYPES, "auto"):
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)} or auto, not {arguments.dtype!r}.")
    options: dict[str, Any] = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    options |= {"gguf_file": file} if file else {}
    path = resolve_model_path(name)
    try:
        architecture = AutoConfig.from_pretrained(path, **options)
    except Exception as error:  # a configuration may be wrong in any way
        raise not_loaded(name, error, revision=arguments.model_revision, gguf_file=file) from error
    dtype = DTYPES.get(arguments.dtype) or stored_dtype(architecture)
    place = str(Path(path).parent) if Path(path).is_file() else path
    stored = None if file else quantized_bytes(place, architecture, dtype, revision=arguments.model_revision)
    unpacked = file is not None or stored_as(architecture) in DEQUANTIZED
    kind = language_model_kind(architecture, arguments.lm_type)
    return Configured(architecture, dtype, kind, arguments, stored, unpacked)


def needed(
    architecture: Any,
    dtype: torch.dtype,
    kind: Kind,
    losses: int,
    rows: int,
    tokens: int,
    writes: int = 0,
    *,
    adapter: bool = False,
    gpu: bool | None = None,
    stored: int | None = None,
    unpacked: bool = False,
) -> str:
    """Return what each way to hold a model's weights takes, and the fastest that fits, as text.

    Args:
        architecture: The model's configuration.
        dtype: Type in which weights are held.
        kind: Which kind of language model it is.
        losses: Losses of a step.
        rows: Rows of a batch.
        tokens: Tokens of a row.
        writes: Tokens that are written after each row, if any are.
        adapter: Whether an adapter is what will be trained.
        gpu: Whether the model computes on a GPU; by default, if there is one.
        stored: Bytes of the weights of a model that stays quantized as its files are; None of any other.
        unpacked: Whether its files are quantized, and unpacked as it is loaded.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    host = psutil.virtual_memory().available
    free = torch.cuda.mem_get_info()[0] if gpu else host
    sizes = measure(architecture, dtype, kind=kind)
    head = (
        f"{sizes.weights // sizes.itemsize:,} parameters in {str(dtype).removeprefix('torch.')}, {losses} losses per "
        f"step of {rows} rows of {tokens} tokens{f', after which {writes} are written' if writes else ''}."
    )
    found = ways(sizes, losses=losses, rows=rows, tokens=tokens, writes=writes, gpu=gpu)
    if unpacked or stored is not None:  # neither quantized again nor streamed
        found = [way for way in found if "--offload" not in way.flags and "bit" not in way.flags]
    if stored is not None:
        found = [replace(way, weights=stored) for way in found if way.trains == "an adapter"]
        adapter = True
    return f"{head}\n\n{table(found, free, host if gpu else None, adapter=adapter)}"
