"""Models larger than the memory: weights stay in files or host memory, and a block comes just before it runs."""

from __future__ import annotations

from zokernel._lazy import lazy_exports

# public name -> module of this package that defines it; loaded on first use, so importing the package is cheap
_EXPORTS = {
    "Blocks": "blocks",
    "Lockstep": "lockstep",
    "Memory": "store",
    "Replayed": "replayed",
    "Staged": "staged",
    "StreamedForward": "streamed_forward",
    "WorkingCopy": "working_copy",
    "streamed_blocks": "blocks",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
