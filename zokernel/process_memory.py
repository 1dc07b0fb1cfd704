"""The memory of this process: what it holds, and giving back what it does not need, so that peaks are of forwards."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

_MAPS, _STATUS = Path("/proc/self/maps"), Path("/proc/self/status")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
HEAP_ROOM = 2**18  # bytes


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


def memory_count(name: str) -> int | None:
    """Return a memory count of this process in bytes, as Linux keeps it; None where the system does not tell.

    Args:
        name: The count: ``VmHWM`` (the peak resident set), ``VmRSS``, ``RssAnon`` (what no file backs), ...

    Example:
        >>> memory_count("there is none") is None
        True
    """
    if not _STATUS.exists():
        return None
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def release_heap() -> bool:
    """Give freed memory back to the system, where the C library can (glibc), and return whether it could.

    After a forward the heap keeps the room that activations took.  The next forward takes it again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _MAPS.exists() else None
    if trim is None:
        return False
    trim(0)
    return True


def limit_heaps() -> bool:
    """Let the heap of every thread keep at most 256 KiB of what it frees, where the C library can (glibc).

    glibc raises its own limits with every large piece that is freed, up to 64 MiB for each thread, and
    :func:`release_heap` does not reach the end of another thread's heap.  Larger pieces are then no part of a heap:
    the system gives and takes them one by one, which costs time for every page.

    Returns:
        Whether it could.

    Example:
        >>> limit_heaps() == release_heap()
        True
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if _MAPS.exists() else None
    if option is None:
        return False
    return bool(option(_MMAP_THRESHOLD, HEAP_ROOM) and option(_TRIM_THRESHOLD, HEAP_ROOM))
