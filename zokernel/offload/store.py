r"""Where the weights of units are between their uses, and how they come to be the weights of now.

A unit that is about to run is *fetched* (perhaps while the one before it still runs), *arrives*, is *settled* (it makes
the updates noted since it was there last), and is *left* when the next unit has begun.  The places:

=============== =============================================== ==========================================
store           between its uses a unit is                      a trained unit's updates
=============== =============================================== ==========================================
``Memory``      in memory                                       are made in place
``Staged``      in host memory, copied to the device            are made on the device and copied back
``Files``       in the model's own files, mapped                (nothing in it is trained)
``WorkingCopy`` in a file of its own, mapped                    are written to a new version of the file
``Replayed``    in the model's own files, mapped                are all repeated on each read, none is kept
=============== =============================================== ==========================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from zokernel.directions.weights.restore import uninterrupted
from zokernel.offload.mapping import MappedFile
from zokernel.offload.units import Unit
from zokernel.offload.updates import Updates


@dataclass(frozen=True)
class Span:
    """Where in a file a tensor is: its first byte, its shape, and its type."""

    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.begin + prod(self.shape) * self.dtype.itemsize


class Store:
    """Units between their uses; this base class says what is common to all places.

    Args:
        identity: Says which weights version 0 is.

    Attributes:
        updates: The updates that units have yet to make.
        versions: The version of each unit, by name.
        bytes_written: Bytes that updates wrote so far, to files or back to host memory.
        lazy: Whether bytes that are touched come by themselves, so that of an embedding only rows need be fetched.
        moves: Whether tensors have other addresses whenever they are there.
    """

    lazy = False
    moves = False

    def __init__(self, identity: str = ""):
        self.updates = Updates(identity)
        self.versions: dict[str, int] = {}
        self.bytes_written = 0

    def fetches(self, unit: Unit) -> bool:
        """Whether a unit has to be brought in before it runs."""
        return False

    def fetch(self, unit: Unit) -> None:
        """Begin to bring a unit in; another thread than that of the forwards may call this."""

    def arrive(self, unit: Unit) -> None:
        """Let the tensors of a unit that was fetched be used."""

    def leave(self, unit: Unit) -> None:
        """Let go of a unit that was fetched."""

    def settle(self, unit: Unit) -> None:
        """Make the updates that a unit has yet to make; it has arrived.

        Raises:
            RunError: If they cannot be written.
        """
        newest = self.updates.newest
        version = self.versions.get(unit.name, newest)
        if version == newest:
            return
        if names := self.updates.names(unit):
            with uninterrupted():
                self._make(unit, names, version)
                self.versions[unit.name] = newest
        self.versions[unit.name] = newest
        self.updates.forget(self._oldest())

    def keep(self, unit: Unit) -> None:
        """Make the updates of a unit for good, so that its tensors can be read from outside of a forward."""
        self.settle(unit)
        self.leave(unit)

    def wait(self) -> None:
        """Wait until everything that was written is where it is kept."""

    def _make(self, unit: Unit, names: Mapping[str, str], version: int) -> None:
        with torch.DisableTorchFunctionSubclass():  # operations on the parameters may be intercepted at the moment
            weights = {name: unit.tensors[key].data for key, name in names.items()}
        self.updates.carry_out(weights, version)

    def _oldest(self) -> int:
        """Return the oldest version from which a unit may yet be brought up to date."""
        return min(self.versions.values())


class Memory(Store):
    """Weights in memory, where forwards read them: nothing is fetched, and updates are made in place."""

    def place(
        self,
        unit: Unit,
        shapes: Mapping[str, tuple[int, ...]],
        load: Callable[[str], Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Load a unit.

        Args:
            unit: The unit.
            shapes: Shapes of its weights by name.
            load: Returns one of them, of any type.
            dtype: Type in which they are held.
        """
        unit.tensors = {name: load(name).to(dtype, copy=True) for name in shapes}
        self.versions[unit.name] = 0


class Files(Store):
    """Weights in files, mapped: pages come when they are touched, and are let go of when the next unit has begun."""

    lazy = True

    def __init__(self, identity: str = ""):
        super().__init__(identity)
        self._mapped: dict[Path, MappedFile] = {}

    def place(self, unit: Unit, spans: Mapping[str, Span]) -> None:
        """Map a unit.

        Args:
            unit: The unit.
            spans: Where its weights are, by name.
        """
        for span in spans.values():
            if span.path not in self._mapped:
                self._mapped[span.path] = MappedFile(span.path)
        unit.parts = [(self._mapped[path], begin, end) for path, begin, end in stretches(spans.values())]
        unit.tensors = {
            name: self._mapped[span.path].tensor(span.begin, span.shape, span.dtype) for name, span in spans.items()
        }
        self.versions[unit.name] = 0

    def fetches(self, unit: Unit) -> bool:
        """Whether a unit has to be brought in: all are."""
        return True

    def fetch(self, unit: Unit) -> None:
        """Read its pages."""
        unit.populate()

    def leave(self, unit: Unit) -> None:
        """Let go of its pages."""
        unit.drop()


def stretches(spans: Iterable[Span]) -> list[tuple[Path, int, int]]:
    """Return stretches of files that hold some spans, those that lie one after the other as one.

    Example:
        >>> one = Span(Path("a"), 8, (2,), torch.float32)
        >>> stretches([Span(Path("a"), 16, (1,), torch.float32), one])
        [(PosixPath('a'), 8, 20)]
    """
    regions: list[tuple[Path, int, int]] = []
    for span in sorted(spans, key=lambda span: (span.path, span.begin)):
        if regions and regions[-1][0] == span.path and regions[-1][2] == span.begin:
            regions[-1] = (span.path, regions[-1][1], span.end)
        else:
            regions.append((span.path, span.begin, span.end))
    return regions
