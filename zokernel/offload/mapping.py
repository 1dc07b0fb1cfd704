r"""Files mapped into memory at an address of their own, where another file can take their place.

Pages of a mapped file are no memory of the process: the system reads them when they are touched and takes them back
when it needs the room.  Tensors are views of the addresses.  They stay valid when a newer version of the file is mapped
over the older one, so that nobody who holds them needs to know.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import tempfile
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zokernel.errors import RunError, UsageError

PAGE = mmap.PAGESIZE
# From sys/mman.h of Linux; Python's mmap module can neither choose an address nor read pages ahead.
_READ, _WRITE, _SHARED, _PRIVATE, _FIXED, _NORESERVE = 1, 2, 0x01, 0x02, 0x10, 0x4000
_DONTNEED, _POPULATE_READ, _WILLNEED = 4, 22, 3
_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """A file, or a stretch of one, mapped for reading.

    Offsets are those in the file.

    Args:
        path: The file.
        begin: First byte to map.
        end: Byte after the last one; the end of the file by default.
        writable: Whether the addresses may be written to.
        private: Whether what is written stays in memory, until it is dropped; otherwise it goes to the file.

    Raises:
        UsageError: On a system other than Linux.
        RunError: If the file cannot be mapped.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "numbers"
        ...     _ = path.write_bytes(torch.arange(4.0).numpy().tobytes())
        ...     MappedFile(path).tensor(8, (2,), torch.float32)
        tensor([2., 3.])
    """

    def __init__(
        self, path: Path, *, begin: int = 0, end: int | None = None, writable: bool = False, private: bool = False
    ):
        if not sys.platform.startswith("linux"):
            raise UsageError("Weights are streamed from mapped files on Linux only: leave out --offload.")
        self._begin = begin // PAGE * PAGE  # where a mapping may begin
        self.length, self._writable, self._private = (end or path.stat().st_size) - self._begin, writable, private
        with path.open("r+b" if writable and not private else "rb") as file:
            self.address = self._map(None, file.fileno(), self._begin)

    def replace(self, path: Path) -> None:
        """Map another file of the same length over this one, at once."""
        with path.open("r+b" if self._writable and not self._private else "rb") as file:
            self._map(self.address, file.fileno(), self._begin)

    def keep(self, folder: Path) -> None:
        """Put what the addresses hold into a file without a name, and map that: what was written is memory no more.

        The file goes when the mapping does.

        Args:
            folder: On which disk it is.

        Raises:
            RunError: If there is no room for it.
        """
        content = memoryview((ctypes.c_char * self.length).from_address(self.address)).cast("B")
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                written = 0
                while written < self.length:
                    written += file.write(content[written:])
                self._map(self.address, file.fileno(), 0)
        except OSError as error:
            raise no_room(folder, error) from error

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the numbers at an offset as a tensor, which must not be written to unless the mapping is writable."""
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        buffer: Any = (ctypes.c_char * size).from_address(self.address + offset - self._begin)
        buffer.mapping = self  # the addresses live as long as the tensor does
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def populate(self, begin: int, end: int) -> None:
        """Read the pages from one offset to another, and wait until they are there."""
        first, size = self._pages(begin, end)
        if size and _libc().madvise(first, size, _POPULATE_READ) != 0:
            if ctypes.get_errno() != errno.EINVAL:  # which kernels before 5.14 answer
                raise RunError(f"Weights could not be read: {os.strerror(ctypes.get_errno())}.")
            _libc().madvise(first, size, _WILLNEED)

    def drop(self, begin: int, end: int) -> None:
        """Let go of the pages from one offset to another; the file keeps what they hold."""
        first, size = self._pages(begin, end)
        if size:
            _libc().madvise(first, size, _DONTNEED)

    def close(self) -> None:
        """Unmap the file, after which no tensor of it may be read."""
        if self.address is not None:
            _libc().munmap(self.address, max(self.length, 1))
            self.address = None

    def __del__(self) -> None:
        if getattr(self, "address", None) is not None and not sys.is_finalizing():
            self.close()

    def _pages(self, begin: int, end: int) -> tuple[int, int]:
        start = self.address - self._begin
        first = (start + begin) // PAGE * PAGE
        return first, -(-(start + end - first) // PAGE) * PAGE if end > begin else 0

    def _map(self, address: int | None, descriptor: int, begin: int) -> Any:
        protection = _READ | (_WRITE if self._writable else 0)
        # Few of the pages that may be written to are memory at a time.
        flags = (_PRIVATE | _NORESERVE if self._private else _SHARED) | (_FIXED if address is not None else 0)
        mapped = _libc().mmap(address, max(self.length, 1), protection, flags, descriptor, begin)
        if mapped == _FAILED:
            raise RunError(f"Weights could not be mapped ({os.strerror(ctypes.get_errno())}).")
        return mapped


def no_room(path: Path, error: OSError) -> RunError:
    """Return the error for a file that could not be written."""
    if error.errno == errno.ENOSPC:
        return RunError(
            f"{path} cannot be written (the disk is full): free some space and repeat the command, or choose another "
            "--offload_dir."
        )
    return RunError(f"{path} cannot be written ({error.strerror}): choose another --offload_dir.")


def make_folder(folder: Path) -> None:
    """Make a folder for weights, unless it is there.

    Raises:
        RunError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise no_room(folder, error) from error


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes, library.mmap.restype = [pointer, size, number, number, number, ctypes.c_int64], pointer
    library.munmap.argtypes = [pointer, size]
    library.madvise.argtypes = [pointer, size, number]
    return library
