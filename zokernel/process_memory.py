"""Give back memory that a process holds and does not need, so that its peak is that of the model's forward passes."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

_MAPS = Path("/proc/self/maps")


def release_code(library: str) -> int:
    """Let go of the pages of a shared library's code, on Linux; elsewhere do nothing.

    LLVM's are 50 MiB, and it loads compiled loops but is not needed to run them.  Nobody writes to code, so the process
    reads the file again where it runs the library again.

    Args:
        library: What the name of the library's file begins with.

    Returns:
        Bytes of addresses whose pages were let go.

    Example:
        >>> release_code("libthere_is_none")
        0
    """
    if not (_MAPS.exists() and hasattr(mmap, "MADV_DONTNEED")):
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    released = 0
    for line in _MAPS.read_text().splitlines():
        # Address range, permissions, offset, device, inode and, unless it is memory without a file, a path.
        span, permissions, *rest = line.split(maxsplit=5)
        if permissions == "r-xp" and len(rest) == 4 and Path(rest[-1]).name.startswith(library):
            begin, end = (int(address, 16) for address in span.split("-"))
            if advise(begin, end - begin, mmap.MADV_DONTNEED) == 0:
                released += end - begin
    return released


def release_heap() -> bool:
    """Give freed memory back to the system, where the C library can (glibc), and return whether it could.

    After a forward the heap keeps the room that activations took.  The next forward takes it again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _MAPS.exists() else None
    if trim is None:
        return False
    trim(0)
    return True
