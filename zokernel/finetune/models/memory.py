"""Peak memory of a phase of a run, as the operating system (or the GPU's allocator) counted it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

import torch

from zokernel.process_memory import memory_count, release_heap

_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Context that measures the peak memory of its block.

    On a GPU this is the allocator's peak; on Linux the peak resident set of the process, reset on entry; elsewhere the
    peak since the process started (``is_of_block`` is then False).  What was freed before the block, such as the room
    that loading and quantizing a model took, goes back to the system on entry and is not counted.

    Example:
        >>> with PeakMemory() as memory:
        ...     block = torch.zeros(1 << 20)
        >>> memory.peak_bytes > 0
        True
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.is_of_block = True

    def __enter__(self) -> PeakMemory:
        release_heap()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                _CLEAR.write_text("5")  # proc(5): resets the peak resident set
            except OSError:
                self.is_of_block = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_resident()


def _peak_resident() -> int:
    count = memory_count("VmHWM")
    if count is not None:
        return count
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
