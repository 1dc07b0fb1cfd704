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
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zokernel.errors import RunError, UsageError

PAGE = mmap.PAGESIZE
# From sys/mman.h of Linux; Python's mmap module can neither choose an address nor read pages ahead.
_READ, _WRITE, _SHARED, _FIXED = 1, 2, 0x01, 0x10
_DONTNEED, _POPULATE_READ, _WILLNEED = 4, 22, 3
_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """A file mapped for reading.

    Args:
        path: The file.
        length: Bytes to map; all of it by default.
        writable: Whether what is written to the addresses goes to the file.

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

    def __init__(self, path: Path, *, length: int | None = None, writable: bool = False):
        if not sys.platform.startswith("linux"):
            raise UsageError("Weights are streamed from mapped files on Linux only: leave out --offload.")
        self.length, self._writable = path.stat().st_size if length is None else length, writable
        self.address = self._map(None, path)

    def replace(self, path: Path) -> None:
        """Map another file of the same length over this one, at once."""
        self._map(self.address, path)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the numbers at an offset as a tensor, which must not be written to unless the mapping is writable."""
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        held: Any = (ctypes.c_char * size).from_address(self.address + offset)
        held.mapping = self  # the addresses live as long as the tensor does
        return torch.frombuffer(held, dtype=dtype).view(shape)

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
        first = (self.address + begin) // PAGE * PAGE
        return first, -(-(self.address + end - first) // PAGE) * PAGE if end > begin else 0

    def _map(self, address: int | None, path: Path) -> Any:
        opened = os.open(path, os.O_RDWR if self._writable else os.O_RDONLY)
        try:
            protection = _READ | (_WRITE if self._writable else 0)
            flags = _SHARED | (_FIXED if address is not None else 0)
            found = _libc().mmap(address, max(self.length, 1), protection, flags, opened, 0)
        finally:
            os.close(opened)
        if found == _FAILED:
            raise RunError(f"{path} could not be mapped ({os.strerror(ctypes.get_errno())}).")
        return found


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes, library.mmap.restype = [pointer, size, number, number, number, ctypes.c_int64], pointer
    library.munmap.argtypes = [pointer, size]
    library.madvise.argtypes = [pointer, size, number]
    return library
