"""Files of a unit's own: ``.safetensors`` files that say which version of the weights they hold."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zokernel.offload.mapping import PAGE, MappedFile, make_folder, no_room
from zokernel.offload.store import Span
from zokernel.offload.units import Unit
from zokernel.offload.updates import Updates

_CHUNK = 1 << 22  # numbers that are converted at a time
_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


def base_file(
    folder: Path,
    unit: Unit,
    identity: str,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> dict[str, Span]:
    """Write the first version of a unit into a file of its own, unless it is there.

    Args:
        folder: Where the file is.
        unit: The unit.
        identity: Says which weights these are; a file of others is replaced.
        shapes: Shapes of its weights by name.
        load: Returns one of them; not called if the file is there already.
        dtype: Type in which they are held.

    Returns:
        Where the weights are, by name.

    Raises:
        RunError: If the file cannot be written.
    """
    make_folder(folder)
    header, offsets, size = layout(shapes, dtype, version_metadata(Updates(identity), 0))
    path = folder / f"{unit.name or 'model'}.base.safetensors"
    if not (path.exists() and path.stat().st_size == size and _read(path, len(header)) == header):
        partial = path.with_suffix(".partial")
        reserve(partial, size)
        target = MappedFile(partial, writable=True)
        ctypes.memmove(target.address, header, len(header))
        for name in shapes:
            flat, into = load(name).reshape(-1), target.tensor(offsets[name], shapes[name], dtype).view(-1)
            for begin in range(0, flat.numel(), _CHUNK):
                into[begin : begin + _CHUNK].copy_(flat[begin : begin + _CHUNK])
        target.close()
        put_in_place(partial, path)
    return {name: Span(path, offsets[name], tuple(shapes[name]), dtype) for name in shapes}


def version_metadata(updates: Updates, version: int) -> dict[str, str]:
    """Return what a file says of the version that it holds."""
    return {"version": f"{version:012d}", "history": updates.history[version]}


def read_metadata(path: Path) -> dict[str, str]:
    """Return what a file says of the version that it holds; nothing if it is no such file."""
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    try:
        return json.loads(text)["__metadata__"]
    except (ValueError, KeyError):
        return {}


def layout(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Return the header of a ``.safetensors`` file, where its tensors begin, and its size."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end, starts = 0, {}
    for name, shape in shapes.items():
        starts[name], size = end, dtype.itemsize
        for length in shape:
            size *= length
        end += size
        entries[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries).encode()
    room = -(-(len(text) + 8) // PAGE) * PAGE
    header = (room - 8).to_bytes(8, "little") + text.ljust(room - 8)
    return header, {name: room + start for name, start in starts.items()}, room + end


def reserve(path: Path, size: int) -> None:
    """Make a file of a size whose pages all have room on the disk.

    Raises:
        RunError: If there is no room.
    """
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, size)  # a page that finds no room when it is written would end the process
    except OSError as error:
        path.unlink()
        raise no_room(path, error) from error
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a new file its name, once what it holds is on the disk: after a power cut it is whole, or not there.

    Raises:
        RunError: If it cannot be written.
    """
    try:
        descriptor = os.open(partial, os.O_RDWR)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
    except OSError as error:
        raise no_room(path, error) from error


def _read(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)
