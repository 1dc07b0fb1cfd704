"""What training with weights that stay in files took: bytes, passes over the weights, time and memory."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from torch import nn

from zokernel.offload.blocks import Blocks, streamed_blocks
from zokernel.process_memory import memory_count

SECONDS_BETWEEN_LOOKS = 5e-3


class Streaming:
    """Context that measures what a model with streamed weights takes in its block; nothing for another model.

    Args:
        model: The model, or one with an adapter around it.

    Example:
        >>> with Streaming(nn.Linear(2, 2)) as streaming:
        ...     pass
        >>> streaming.facts
        {}
    """

    def __init__(self, model: nn.Module):
        self._blocks = streamed_blocks(model)
        self._done = threading.Event()
        self._measured: dict[str, Any] = {}

    def __enter__(self) -> Streaming:
        if self._blocks is not None:
            self._before, self._begun_at = _counts(self._blocks), time.perf_counter()
            self._first = self._peak = memory_count("RssAnon")
            self._watcher = threading.Thread(target=self._watch, name="zokernel-memory", daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._blocks is None:
            return
        self._done.set()
        self._watcher.join()
        seconds = time.perf_counter() - self._begun_at
        counts = {name: after - self._before[name] for name, after in _counts(self._blocks).items()}
        self._measured = {
            "weights_bytes": self._blocks.nbytes,
            **counts,
            "seconds": round(seconds, 3),
            "seconds_per_pass": round(seconds / counts["passes"], 6) if counts["passes"] else None,
            "anonymous_before": self._first,
            "anonymous_peak": self._peak,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """As ``offload``: bytes read and written, passes, seconds, and anonymous memory in bytes; else nothing.

        All are of this process, and include evaluations between steps.  Anonymous memory is None where the system does
        not tell it.
        """
        return {"offload": self._measured} if self._measured else {}

    def _watch(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            now = memory_count("RssAnon")
            if now is None or self._peak is None:
                return
            self._peak = max(self._peak, now)


def _counts(blocks: Blocks) -> dict[str, int]:
    """Return passes over the blocks, and bytes read and written, so far."""
    passes = max((blocks.passes[unit.name] for unit in blocks.units if unit.is_block), default=0)
    return {"passes": passes, "bytes_read": blocks.bytes_read, "bytes_written": blocks.store.bytes_written}
