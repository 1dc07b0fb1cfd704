"""What a run will need, in words: the ways to hold its weights, and the fastest that fits the free memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from zokernel.data import resolve_model_path
from zokernel.data.hub_requests import bounded_requests
from zokernel.errors import RunError
from zokernel.finetune.models.adapters import check_peft, trained_by, wants_adapter
from zokernel.finetune.models.check import DTYPES, check_dtype, read_architecture, stored_dtype
from zokernel.finetune.models.estimate import QuantizedBytes, quantized_bytes
from zokernel.finetune.models.gguf import with_gguf
from zokernel.finetune.models.kind import Kind, language_model_kind
from zokernel.finetune.models.quantization import DEQUANTIZED, check_library, stored_as
from zokernel.finetune.models.saved_adapter import base_flags, with_base
from zokernel.finetune.models.ways import SCALES, Way, fastest, measure, table, ways
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.readable import counted


@dataclass(frozen=True)
class Configured:
    """A model of which only the configuration was read.

    Attributes:
        architecture: Its configuration.
        dtype: The type in which its weights will be held.
        kind: Which kind of language model it is.
        arguments: Which model and adapter: of an adapter's folder, its base and itself.
        stored: Bytes of its weights if its files are quantized and it stays so.
        unpacked: Whether its files are quantized, and unpacked as it is loaded.
    """

    architecture: Any
    dtype: torch.dtype
    kind: Kind
    arguments: ModelArguments
    stored: QuantizedBytes | None = None
    unpacked: bool = False


@bounded_requests()
def read_configuration(arguments: ModelArguments) -> Configured:
    """Read a model's configuration, and no weights.

    Args:
        arguments: Which model: a name, a folder, a hub id, a ``config.json``, a GGUF file, or the folder or hub id
            of an adapter.

    Raises:
        UsageError: If there is no such configuration.
    """
    arguments = with_gguf(with_base(arguments))
    check_dtype(arguments)
    file, path = arguments.gguf_file, resolve_model_path(arguments.model_name_or_path)
    architecture, both = read_architecture(path, arguments)
    if both is not None:
        return read_configuration(both)
    dtype = DTYPES.get(arguments.dtype) or stored_dtype(architecture)
    place = str(Path(path).parent) if Path(path).is_file() else path
    stored = None if file else quantized_bytes(place, architecture, dtype, revision=arguments.model_revision)
    unpacked = file is not None or stored_as(architecture) in DEQUANTIZED
    kind = language_model_kind(architecture, arguments.lm_type)
    return Configured(architecture, dtype, kind, arguments, stored, unpacked)


def needed(model: Configured, losses: int, rows: int, tokens: int, writes: int = 0, *, gpu: bool | None = None) -> str:
    """Return what each way to hold a model's weights takes, and the fastest that fits, as text.

    Args:
        model: The model; if it comes with an adapter, the ways are those that train an adapter.
        losses: Losses of a step.
        rows: Rows of a batch.
        tokens: Tokens of a row.
        writes: Tokens that are written after each row, if any are.
        gpu: Whether the model computes on a GPU; by default, if there is one.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    available = psutil.virtual_memory().available
    free, host = (torch.cuda.mem_get_info()[0], available) if gpu else (available, None)
    stored, saved = model.stored, model.arguments.adapter_name_or_path
    sizes, method = measure(model.architecture, model.dtype, kind=model.kind), stored_as(model.architecture)
    head = (
        f"{sizes.weights // sizes.itemsize:,} parameters in {str(model.dtype).removeprefix('torch.')}, "
        f"{counted(losses, 'loss')} per step of {counted(rows, 'row')} of {counted(tokens, 'token')}"
        f"{f', after which {writes} are written' if writes else ''}."
    )

    def ways_of(rows: int, tokens: int) -> list[Way]:
        found = ways(sizes, losses=losses, rows=rows, tokens=tokens, writes=writes, gpu=gpu)
        if model.unpacked or stored is not None:  # neither quantized again nor streamed
            found = [way for way in found if not any(word in way.flags for word in ("--offload", "_in_", "torchao"))]
        if stored is not None:
            found = [way for way in found if way.trains == "an adapter"]
            found = [replace(way, weights=stored.weights, known=stored.known) for way in found]
            if method == "torchao":
                whole = stored.weights + stored.factors
                found.append(replace(found[-1], flags=SCALES, trains="scales", weights=whole))
        return found if saved is None else _continuing(found, saved)

    found = ways_of(rows, tokens)
    kinds = ("an adapter",) if wants_adapter(model.arguments) else tuple(dict.fromkeys(way.trains for way in found))
    smaller = {
        "fewer rows (--update_examples here, --per_device_train_batch_size in a run)": ways_of(1, tokens),
        "one shorter row (--max_length)": ways_of(1, 1),
    }
    streams = not model.unpacked and stored is None
    last = "--offload disk --use_cpu true, which leaves the weights in their files" if gpu and streams else ""
    told = [_fastest(found, trains, free, host, smaller, last or "a smaller model", method) for trains in kinds]
    notes = [] if saved is None or stored is not None else _base_told(saved)
    return "\n".join([head, "", table(found, free, host), *told, *notes])


def _continuing(found: Sequence[Way], saved: str) -> list[Way]:
    """Return the ways that train a saved adapter on: ``--model_name_or_path`` alone says that it is one."""
    stacks = trained_by(ModelArguments(adapter_name_or_path=saved)) == "LoRA"
    flags = {way: way.flags.removeprefix("--lora true").strip() for way in found if way.trains == "an adapter"}
    return [
        replace(way, flags=own or "--perturb in_place")
        for way, own in flags.items()
        if stacks or own != "--perturb stacked"
    ]


def _base_told(saved: str) -> list[str]:
    """Return how the base of a saved adapter was quantized while it was trained, as a list of at most one sentence."""
    flags = base_flags(saved)
    if not flags:
        return []
    return [f"The adapter was trained with {flags}: repeat it, or the base is held in full precision."]


def _fastest(
    found: Sequence[Way],
    trains: str,
    free: int,
    host: int | None,
    smaller: Mapping[str, Sequence[Way]],
    otherwise: str,
    method: str,
) -> str:
    """Return which way to take, and which library it lacks; if none fits, what would help.

    Args:
        found: The ways.
        trains: What is trained.
        free: Free bytes where the model computes.
        host: Free bytes of host memory, if that is another one.
        smaller: The ways with smaller batches, by what makes them smaller; the mildest first.
        otherwise: What helps where no batch is small enough.
        method: How the model's files are quantized; empty if they are not.
    """
    told = f"Fastest that fits for {trains}"
    best = fastest(found, free, trains, host)
    if best is not None and not best.known:
        return f"{told}: unknown, as the size of the weights is."
    if best is not None:
        return f"{told}: {best.flags}.{_lacking(best, method)}"
    for change, ways_then in smaller.items():
        then = fastest(ways_then, free, trains, host)
        if then is not None:
            fits = "would fit" if then.known else "might fit"
            return f"{told}: none; with {change}, {then.flags} {fits}.{_lacking(then, method)}"
    return f"{told}: none, even with one short row: use {otherwise}."


def _lacking(way: Way, method: str) -> str:
    """Return which library a way needs that is not installed, as a sentence after a space; nothing if it has all."""
    kinds = {"_in_": "bitsandbytes", "torchao": "torchao"}
    try:
        for library in [method, *(library for part, library in kinds.items() if part in way.flags)]:
            check_library(library, "It")
        if way.trains == "an adapter":
            check_peft("It")
    except RunError as error:
        return f" {error}"
    return ""
