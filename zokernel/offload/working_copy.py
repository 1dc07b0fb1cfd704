r"""Trained weights in files of their own, one per unit, of which a newer version takes the place of an older one whole.

A step's update is only noted when it is made; it is carried out when the unit is read next, so that a step reads and
writes each unit once.  The new version is written beside the old one and then renamed over it: a file is always one
version, and says which.  The files only save time.  Every version can be made from the first one and the updates, which
a journal repeats; a file that does not fit these is left alone.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zokernel.directions import Directions
from zokernel.directions.weights.copy import Unmoved
from zokernel.errors import RunError
from zokernel.offload.blocks import Unit
from zokernel.offload.mapping import PAGE, MappedFile

Draw = tuple[int, int]
_CHUNK = 1 << 22  # numbers that are converted at a time
_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Noted:
    """An update that units have yet to make: groups of names that share their coefficients and decay."""

    step: int
    groups: list[tuple[frozenset[str], Mapping[Draw, float], float]]


class WorkingCopy:
    """Files of the units of a model, and the updates that they have yet to make.

    Args:
        folder: Where the files are; made if need be.
        identity: Says which weights the files begin with; files of others are replaced.

    Attributes:
        bytes_written: Bytes of all versions that were written so far.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder, self.identity = folder, identity
        self.bytes_written = 0
        self._files: dict[str, MappedFile] = {}
        self._offsets: dict[str, dict[str, int]] = {}
        self._versions: dict[str, int] = {}
        self._noted: list[Noted] = []
        self._forgotten = 0
        self._history = [hashlib.sha256(identity.encode()).hexdigest()]
        self._apply: Callable[[dict[str, Tensor], Noted], None] | None = None
        self._trained: dict[int, str] = {}
        self._durable = ThreadPoolExecutor(1, "zokernel-writer")
        self._renamed: dict[str, Future[None]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def place(
        self,
        unit: Unit,
        shapes: Mapping[str, tuple[int, ...]],
        load: Callable[[str], Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Give a unit a file with its first version, and tensors in it.

        Args:
            unit: The unit.
            shapes: Shapes of its weights by name.
            load: Returns one of them; not called if the file is there already.
            dtype: Type in which they are held.
        """
        header, offsets, size = _layout(shapes, dtype, self._about(0))
        path = self._path(unit, "base")
        if not (path.exists() and path.stat().st_size == size and _read(path, len(header)) == header):
            partial = path.with_suffix(".partial")
            self._reserve(partial, size)
            target = MappedFile(partial, writable=True)
            ctypes.memmove(target.address, header, len(header))
            for name in shapes:
                flat, into = load(name).reshape(-1), target.tensor(offsets[name], shapes[name], dtype).view(-1)
                for begin in range(0, flat.numel(), _CHUNK):
                    into[begin : begin + _CHUNK].copy_(flat[begin : begin + _CHUNK])
            target.close()
            partial.replace(path)
        file = self._files[unit.name] = MappedFile(path)
        self._offsets[unit.name], self._versions[unit.name] = offsets, 0
        unit.tensors = {name: file.tensor(offsets[name], shapes[name], dtype) for name in shapes}
        unit.parts = [(file, len(header), size)]

    def train(self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, units: list[Unit]) -> None:
        """Take note of what is trained, and along which directions."""
        self._trained = {id(tensor): name for name, tensor in tensors.items()}
        self._names = {unit.name: self._names_in(unit) for unit in units}

        def apply(own: dict[str, Tensor], noted: Noted) -> None:
            by_name = {n: (c, d) for names, c, d in noted.groups for n in names if n in own}
            Unmoved(directions, own, seed=seed).commit(
                noted.step,
                {name: coefficients for name, (coefficients, _) in by_name.items()},
                {name: decay for name, (_, decay) in by_name.items()},
            )

        self._apply = apply

    def note(self, step: int, update: Mapping[str, Mapping[Draw, float]], decay: float | Mapping[str, float]) -> None:
        """Note an update of the trained tensors, by name, for when their units are read next."""
        grouped: dict[tuple[int, float], list[str]] = {}
        for name, coefficients in update.items():
            grouped.setdefault((id(coefficients), decay if isinstance(decay, float) else decay[name]), []).append(name)
        groups = [(frozenset(names), update[names[0]], factor) for (_, factor), names in grouped.items()]
        told = json.dumps([step, sorted([sorted(names), sorted(c.items()), d] for names, c, d in groups)])
        self._history.append(hashlib.sha256((self._history[-1] + told).encode()).hexdigest())
        self._noted.append(Noted(step, groups))

    def settle(self, unit: Unit) -> None:
        """Make the updates that a unit has yet to make.

        Raises:
            RunError: If the new version cannot be written.
        """
        known = len(self._history) - 1
        version = self._versions.get(unit.name, known)
        if version == known:
            return
        names = self._names[unit.name]
        if names:
            if version == 0:
                version = self._found(unit, known)
            if version < known:
                self._write(unit, names, version)
        self._versions[unit.name] = known
        done = min(self._versions.values()) - self._forgotten
        if done > 0:
            del self._noted[:done]
            self._forgotten += done

    def _names_in(self, unit: Unit) -> dict[str, str]:
        return {key: self._trained[id(p)] for key, p in unit.tensors.items() if id(p) in self._trained}

    def _found(self, unit: Unit, known: int) -> int:
        """Go on with the version that an earlier process of the same run left, and return which it is."""
        path, file = self._path(unit, "weights"), self._files[unit.name]
        if not path.exists() or path.stat().st_size != file.length:
            return 0
        about = _metadata(path)
        version = int(about.get("version", 0))
        if not 0 < version <= known or about != self._about(version):
            return 0
        file.replace(path)
        return version

    def _write(self, unit: Unit, names: Mapping[str, str], version: int) -> None:
        file, known = self._files[unit.name], len(self._history) - 1
        if unit.name in self._renamed:
            self._renamed.pop(unit.name).result()
        path = self._path(unit, "weights")
        partial = path.with_suffix(".partial")
        self._reserve(partial, file.length)
        target = MappedFile(partial, writable=True)
        ctypes.memmove(target.address, file.address, file.length)
        shapes = {key: tuple(tensor.shape) for key, tensor in unit.tensors.items()}
        dtype = next(iter(unit.tensors.values())).dtype
        header, offsets, _ = _layout(shapes, dtype, self._about(known))
        ctypes.memmove(target.address, header, len(header))
        own = {name: target.tensor(offsets[key], shapes[key], dtype) for key, name in names.items()}
        assert self._apply is not None
        for noted in self._noted[version - self._forgotten :]:
            self._apply(own, noted)
        file.replace(partial)
        self.bytes_written += file.length
        # The pages are the file's already; only the name waits until they are on the disk.
        self._renamed[unit.name] = self._durable.submit(_keep, partial, path)

    def wait(self) -> None:
        """Wait until every version is on the disk under its name."""
        for future in self._renamed.values():
            future.result()

    def _about(self, version: int) -> dict[str, str]:
        return {"version": f"{version:012d}", "history": self._history[version]}

    def _path(self, unit: Unit, kind: str) -> Path:
        return self.folder / f"{unit.name or 'model'}.{kind}.safetensors"

    def _reserve(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(opened, 0, size)  # a page that finds no room when it is written would end the process
        except OSError as error:
            path.unlink()
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise RunError(
                f"{path} cannot be written ({reason}): free some space and repeat the command, or choose another "
                "--offload_dir."
            ) from error
        finally:
            os.close(opened)


def _keep(partial: Path, path: Path) -> None:
    opened = os.open(partial, os.O_RDWR)
    try:
        os.fdatasync(opened)
    finally:
        os.close(opened)
    partial.replace(path)


def _layout(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, about: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Return the header of a ``.safetensors`` file, where its tensors begin, and its size."""
    entries: dict[str, Any] = {"__metadata__": dict(about)}
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


def _read(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    try:
        return json.loads(text)["__metadata__"]
    except (ValueError, KeyError):
        return {}
