"""What a run will need, in words: the ways to hold its weights, and the fastest that fits the free memory."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from zokernel.data import resolve_model_path
from zokernel.data.hub_requests import bounded_requests
from zokernel.errors import UsageError
from zokernel.finetune.models.check import DTYPES, not_loaded
from zokernel.finetune.models.kind import Kind, language_model_kind
from zokernel.finetune.models.ways import measure, table, ways
from zokernel.finetune.settings.arguments import ModelArguments


@bounded_requests()
def read_configuration(arguments: ModelArguments) -> tuple[Any, torch.dtype, Kind]:
    """Return a model's configuration, the type in which its weights will be held, and its kind.

    Args:
        arguments: Which model: a name, a folder, a hub id, or a ``config.json``.

    Raises:
        UsageError: If there is no such configuration.
    """
    from transformers import AutoConfig

    name = arguments.model_name_or_path
    if arguments.dtype not in (*DTYPES, "auto"):
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)} or auto, not {arguments.dtype!r}.")
    options = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    try:
        architecture = AutoConfig.from_pretrained(resolve_model_path(name), **options)
    except Exception as error:  # a configuration may be wrong in any way
        raise not_loaded(name, error, revision=arguments.model_revision) from error
    stored = getattr(architecture, "dtype", None) or getattr(architecture.get_text_config(), "dtype", None)
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    dtype = DTYPES.get(arguments.dtype) or stored or torch.float32
    return architecture, dtype, language_model_kind(architecture, arguments.lm_type)


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
    return f"{head}\n\n{table(found, free, host if gpu else None, adapter=adapter)}"
