"""Nested state in one ``.safetensors`` file: tensors as tensors, everything else as JSON in its metadata.

Loading such a file runs no code, unlike a pickle.  Every bit of floats is kept, tuples stay tuples and integer
keys integers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zokernel.errors import RunError

_KEY = "zokernel_state"


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, arrays, numbers, strings and None.

    Args:
        path: The file, ending in ``.safetensors``.
        state: What to write.

    Raises:
        TypeError: If it holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    structure = _pack(state, tensors)
    # safetensors wants each tensor to own its memory; only those that share it are copied.
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        owns_memory = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in addresses
        addresses.add(storage.data_ptr())
        tensors[name] = tensor.contiguous() if owns_memory else tensor.clone(memory_format=torch.contiguous_format)
    save_file(tensors, path, metadata={_KEY: json.dumps(structure)})


def load_state(path: Path) -> Any:
    """Read what :func:`save_state` wrote; tensors come on the CPU.

    Raises:
        RunError: If the file is missing, damaged or something else.
    """
    try:
        with safe_open(path, "pt") as archive:
            metadata = archive.metadata() or {}
            if _KEY not in metadata:
                raise RunError(f"{path} holds tensors but no state of zokernel: resume from another checkpoint.")
            return _unpack(json.loads(metadata[_KEY]), {name: archive.get_tensor(name) for name in archive.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is damaged or missing ({error}): resume from another checkpoint.") from error


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
        return ["array", _pack(value, tensors)[1]]
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return ["tensor", name]
    if isinstance(value, dict):
        return ["dict", [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]]
    if isinstance(value, (list, tuple)):
        return ["tuple" if isinstance(value, tuple) else "list", [_pack(v, tensors) for v in value]]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"State of type {type(value).__name__} cannot be saved without pickling it.")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
