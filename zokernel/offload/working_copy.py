r"""Trained weights in files of their own, one per unit, of which a newer version takes the place of an older one whole.

A step's update is only noted when it is made; it is carried out when the unit is read next, so that a step reads and
writes each unit once.  The new version is written beside the old one and then renamed over it: a file is always one
version, and says which.  The files only save time.  Every version can be made from the first one and the updates, which
a journal repeats; a file that does not fit these is left alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from zokernel.offload.base_files import layout, put_in_place, read_metadata, reserve, version_metadata
from zokernel.offload.mapping import MappedFile
from zokernel.offload.store import Files
from zokernel.offload.units import Unit


class WorkingCopy(Files):
    """Files of the units of a model, of which updates write newer versions.

    Args:
        folder: Where the files are.
        identity: Says which weights version 0 is; files of others are replaced.
    """

    def __init__(self, folder: Path, identity: str):
        super().__init__(identity)
        self.folder = folder
        self._writer = ThreadPoolExecutor(1, "zokernel-writer")
        self._pending: dict[str, Future[None]] = {}

    def wait(self) -> None:
        """Wait until every version is on the disk under its name.

        Raises:
            RunError: If one could not be written.
        """
        for future in self._pending.values():
            future.result()

    def _make(self, unit: Unit, names: Mapping[str, str], version: int) -> None:
        if version == 0:
            version = self._resume_version(unit)
        if version < self.updates.newest:
            self._write(unit, names, version)

    def _resume_version(self, unit: Unit) -> int:
        """Go on with the version that an earlier process of the same run left, and return which it is."""
        path, file = self._path(unit), unit.parts[0][0]
        if not path.exists() or path.stat().st_size != file.length:
            return 0
        metadata = read_metadata(path)
        version = int(metadata.get("version", 0))
        if not 0 < version <= self.updates.newest or metadata != version_metadata(self.updates, version):
            return 0
        file.replace(path)
        return version

    def _write(self, unit: Unit, names: Mapping[str, str], version: int) -> None:
        file = unit.parts[0][0]
        if unit.name in self._pending:
            self._pending.pop(unit.name).result()
        path = self._path(unit)
        partial = path.with_suffix(".partial")
        reserve(partial, file.length)
        target = MappedFile(partial, writable=True)
        ctypes.memmove(target.address, file.address, file.length)
        shapes = {key: tuple(tensor.shape) for key, tensor in unit.tensors.items()}
        dtype = next(iter(unit.tensors.values())).dtype
        header, offsets, _ = layout(shapes, dtype, version_metadata(self.updates, self.updates.newest))
        ctypes.memmove(target.address, header, len(header))
        self.updates.carry_out(
            {n: target.tensor(offsets[key], shapes[key], dtype) for key, n in names.items()}, version
        )
        file.replace(partial)
        self.bytes_written += file.length
        # The pages are the file's already; only the name waits until they are on the disk.
        self._pending[unit.name] = self._writer.submit(put_in_place, partial, path)

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name or 'model'}.weights.safetensors"
