r"""Trained weights of which the disk holds the first version only: a block's updates are all repeated on each read.

An update is a few numbers times directions that are functions of their position, so a block that is read can be brought
up to date on the way, by the numbers of all steps so far.  Nothing is written, and the weights need no second place on
the disk.  The price grows with the steps: step t repeats t updates of every block.

A block is mapped so that what is written to it stays in memory until the block is let go of.  Weights outside of
blocks (embeddings, norms, the head) stay in memory once they are trained, and make one update per step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from zokernel.offload.mapping import MappedFile, make_folder
from zokernel.offload.store import Files, Span, stretches
from zokernel.offload.units import Unit
from zokernel.readable import plural

logger = logging.getLogger(__name__)


class Replayed(Files):
    """Units in the model's files, brought up to date whenever they are read.

    Args:
        folder: On which disk the weights are put once all of them are needed, as when the trained model is saved.
        identity: Says which weights version 0 is.

    Attributes:
        replays: Updates of single blocks that were repeated so far.
        seconds: How long they took.
    """

    def __init__(self, folder: Path, identity: str = ""):
        super().__init__(identity)
        self.folder = folder
        self.replays, self.seconds = 0, 0.0
        self._logged_steps, self._step_start = 4, (0, 0.0)
        self._saved_versions: dict[str, int] = {}

    def place(self, unit: Unit, spans: Mapping[str, Span]) -> None:
        """Map a unit, apart from all others.

        Args:
            unit: The unit.
            spans: Where its weights are, by name.
        """
        regions = stretches(spans.values())
        unit.parts = [
            (MappedFile(path, begin=begin, end=end, writable=True, private=True), begin, end)
            for path, begin, end in regions
        ]
        files = {
            name: number
            for name, span in spans.items()
            for number, region in enumerate(regions)
            if _contains(region, span)
        }
        unit.tensors = {
            name: unit.parts[files[name]][0].tensor(span.begin, span.shape, span.dtype) for name, span in spans.items()
        }
        self.versions[unit.name] = 0
        if unit.is_block:
            self._saved_versions[unit.name] = 0

    def leave(self, unit: Unit) -> None:
        """Let go of a block, and of what was written to it."""
        if unit.is_block:
            unit.drop()
            self.versions[unit.name] = self._saved_versions[unit.name]
        elif not self.updates.names(unit):
            unit.drop()

    def keep(self, unit: Unit) -> None:
        """Bring a unit up to date for good, in a file without a name that goes when the process ends."""
        self.settle(unit)
        if unit.is_block and self.versions[unit.name] > self._saved_versions[unit.name]:
            make_folder(self.folder)
            for file, _, _ in unit.parts:
                file.keep(self.folder)
                self.bytes_written += file.length
            self._saved_versions[unit.name] = self.versions[unit.name]
        self.leave(unit)

    def _make(self, unit: Unit, names: Mapping[str, str], version: int) -> None:
        start, newest = time.perf_counter(), self.updates.newest
        if self._step_start[0] != newest:
            self._log_cost()
            self._step_start = newest, self.seconds
        try:
            super()._make(unit, names, version)
        except BaseException:
            self.leave(unit)  # some of its updates are made, and nobody knows which
            raise
        if unit.is_block:
            self.replays += newest - version
            self.seconds += time.perf_counter() - start

    def _log_cost(self) -> None:
        """Log what the last step's replays took, whenever their number has doubled."""
        steps, before = self._step_start
        seconds, first = self.seconds - before, min(self._saved_versions.values(), default=0)
        if steps - first >= 2 * self._logged_steps:
            self._logged_steps, per_update = steps - first, seconds / (steps - first)
            logger.info(
                "Journal: repeating the updates of %s on each block took %.3g s, %.3g s per update; after 1,000 "
                "steps a step will repeat for %.3g s, and a run of 1,000 steps for %.3g h.",
                plural(self._logged_steps, "step"),
                seconds,
                per_update,
                1000 * per_update,
                1000 * 999 / 2 * per_update / 3600,
            )

    def _oldest(self) -> int:
        outside = [version for name, version in self.versions.items() if name not in self._saved_versions]
        return min([*outside, *self._saved_versions.values()])


def _contains(region: tuple[Path, int, int], span: Span) -> bool:
    path, begin, end = region
    return span.path == path and begin <= span.begin and span.end <= end
