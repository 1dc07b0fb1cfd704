"""What a run will need, in words: the setups of its weights, and the fastest that fits the free memory."""

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
from zokernel.finetune.models.adapters import check_peft, part_to_train, trains_adapter
from zokernel.finetune.models.check import DTYPES, check_dtype, read_architecture, stored_dtype
from zokernel.finetune.models.estimate import QuantizedBytes, quantized_bytes
from zokernel.finetune.models.gguf import with_gguf
from zokernel.finetune.models.kind import Kind, language_model_kind
from zokernel.finetune.models.memory_setups import ADAPTER, SCALES, Setup, fastest_setup, list_setups, measure, table
from zokernel.finetune.models.quantization import DEQUANTIZED, check_library, stored_quantization
from zokernel.finetune.models.saved_adapter import base_flags, with_base
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.readable import plural


@dataclass(frozen=True)
class ConfiguredModel:
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
def read_configuration(arguments: ModelArguments) -> ConfiguredModel:
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
    architecture, with_adapter = read_architecture(path, arguments)
    if with_adapter is not None:
        return read_configuration(with_adapter)
    dtype = DTYPES.get(arguments.dtype) or stored_dtype(architecture)
    place = str(Path(path).parent) if Path(path).is_file() else path
    stored = None if file else quantized_bytes(place, architecture, dtype, revision=arguments.model_revision)
    unpacked = file is not None or stored_quantization(architecture) in DEQUANTIZED
    kind = language_model_kind(architecture, arguments.lm_type)
    return ConfiguredModel(architecture, dtype, kind, arguments, stored, unpacked)


def describe_setups(
    model: ConfiguredModel, losses: int, rows: int, tokens: int, writes: int = 0, *, gpu: bool | None = None
) -> str:
    """Return what each setup of a model takes, and the fastest that fits, as text.

    Args:
        model: The model; if it comes with an adapter, the setups are those that train an adapter.
        losses: Losses of a step.
        rows: Rows of a batch.
        tokens: Tokens of a row.
        writes: Tokens that are written after each row, if any are.
        gpu: Whether the model computes on a GPU; by default, if there is one.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    available = psutil.virtual_memory().available
    free, host = (torch.cuda.mem_get_info()[0], available) if gpu else (available, None)
    sizes, saved = measure(model.architecture, model.dtype, kind=model.kind), model.arguments.adapter_name_or_path
    head = (
        f"{sizes.weights // sizes.itemsize:,} parameters in {str(model.dtype).removeprefix('torch.')}, "
        f"{plural(losses, 'loss')} per step of {plural(rows, 'row')} of {plural(tokens, 'token')}"
        f"{f', after which {writes} are written' if writes else ''}."
    )

    def setups_for(rows: int, tokens: int) -> list[Setup]:
        setups = list_setups(sizes, losses=losses, rows=rows, tokens=tokens, writes=writes, gpu=gpu)
        return _possible_setups(model, setups)

    setups = setups_for(rows, tokens)
    kinds = (ADAPTER,) if trains_adapter(model.arguments) else tuple(dict.fromkeys(s.trains for s in setups))
    smaller = {
        "fewer rows (--update_examples here, --per_device_train_batch_size in a run)": setups_for(1, tokens),
        "one shorter row (--max_length)": setups_for(1, 1),
    }
    streams = not model.unpacked and model.stored is None
    last_resort = "--offload disk --use_cpu true, which leaves the weights in their files" if gpu and streams else ""
    method, otherwise = stored_quantization(model.architecture), last_resort or "a smaller model"
    advice = [
        _describe_fastest(setups, trains, free=free, host=host, smaller=smaller, otherwise=otherwise, method=method)
        for trains in kinds
    ]
    notes = [] if saved is None or model.stored is not None else _base_note(saved)
    return "\n".join([head, "", table(setups, free, host), *advice, *notes])


def _possible_setups(model: ConfiguredModel, setups: Sequence[Setup]) -> list[Setup]:
    """Return those of some setups that a model can have: one that is quantized in its files stays so."""
    stored, saved = model.stored, model.arguments.adapter_name_or_path
    possible = list(setups)
    if model.unpacked or stored is not None:  # neither quantized again nor streamed
        possible = [s for s in possible if not any(word in s.flags for word in ("--offload", "_in_", "torchao"))]
    if stored is not None:
        possible = [setup for setup in possible if setup.trains == ADAPTER]
        possible = [replace(setup, weights=stored.weights, size_known=stored.is_known) for setup in possible]
        if stored_quantization(model.architecture) == "torchao":
            whole = stored.weights + stored.factors
            possible.append(replace(possible[-1], flags=SCALES, trains="scales", weights=whole))
    return possible if saved is None else _continued_setups(possible, saved)


def _continued_setups(setups: Sequence[Setup], saved: str) -> list[Setup]:
    """Return the setups that train a saved adapter on: ``--model_name_or_path`` alone says that it is one."""
    stacks = part_to_train(ModelArguments(adapter_name_or_path=saved)) == "LoRA"
    flags = {setup: setup.flags.removeprefix("--lora true").strip() for setup in setups if setup.trains == ADAPTER}
    return [
        replace(setup, flags=own or "--perturb in_place")
        for setup, own in flags.items()
        if stacks or own != "--perturb stacked"
    ]


def _base_note(saved: str) -> list[str]:
    """Return how the base of a saved adapter was quantized while it was trained, as a list of at most one sentence."""
    flags = base_flags(saved)
    if not flags:
        return []
    return [f"The adapter was trained with {flags}: repeat it, or the base is held in full precision."]


def _describe_fastest(
    setups: Sequence[Setup],
    trains: str,
    *,
    free: int,
    host: int | None,
    smaller: Mapping[str, Sequence[Setup]],
    otherwise: str,
    method: str,
) -> str:
    """Return which setup to take, and which library it lacks; if none fits, what would help.

    Args:
        setups: The setups.
        trains: What is trained.
        free: Free bytes where the model computes.
        host: Free bytes of host memory, if that is another one.
        smaller: The setups with smaller batches, by what makes them smaller; the mildest first.
        otherwise: What helps where no batch is small enough.
        method: How the model's files are quantized; empty if they are not.
    """
    head = f"Fastest that fits for {trains}"
    best = fastest_setup(setups, free, trains, host)
    if best is not None and not best.size_known:
        return f"{head}: unknown, as the size of the weights is."
    if best is not None:
        return f"{head}: {best.flags}.{_missing_library(best, method)}"
    for change, smaller_setups in smaller.items():
        best = fastest_setup(smaller_setups, free, trains, host)
        if best is not None:
            fits = "would fit" if best.size_known else "might fit"
            return f"{head}: none; with {change}, {best.flags} {fits}.{_missing_library(best, method)}"
    return f"{head}: none, even with one short row: use {otherwise}."


def _missing_library(setup: Setup, method: str) -> str:
    """Return which library a setup needs that is not installed, as a sentence after a space; nothing if it has all."""
    kinds = {"_in_": "bitsandbytes", "torchao": "torchao"}
    try:
        for library in [method, *(library for part, library in kinds.items() if part in setup.flags)]:
            check_library(library, "It")
        if setup.trains == ADAPTER:
            check_peft("It")
    except RunError as error:
        return f" {error}"
    return ""
