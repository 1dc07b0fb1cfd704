"""Reading a journal: what is whole is used, a torn end is dropped, damage in the middle is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from zokernel.errors import RunError, UsageError
from zokernel.journal.format import (
    CHECKSUM_BYTES,
    EVENT,
    STEP_NARROW,
    STEP_WIDE,
    Conditions,
    Event,
    Record,
    Step,
    decode,
    decode_header,
    record_end,
)
from zokernel.readable import plural

FILE_NAME = "journal.zkj"
_STARTS = re.compile(b"[%c%c%c]" % (STEP_WIDE, STEP_NARROW, EVENT), re.DOTALL)


@dataclass(frozen=True)
class Journal:
    """A verified journal.

    Attributes:
        path: Where it was read from.
        header: What identifies the run: see :func:`zokernel.journal.make_header`.
        records: Steps and events in order.
        ends: Where each record ends in the file, in bytes.
        size: Bytes up to the end of the last whole record.
        torn_bytes: Bytes after that, of a record whose writing was cut short.
    """

    path: Path
    header: dict[str, Any]
    records: list[Record]
    ends: list[int]
    size: int
    torn_bytes: int

    @cached_property
    def steps(self) -> list[Step]:
        """The steps in order."""
        return [record for record in self.records if isinstance(record, Step)]

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The contents of the events in order."""
        return [record.content for record in self.records if isinstance(record, Event)]

    @property
    def conditions(self) -> Conditions:
        """What holds at the end: for the next step, unless an event before it says otherwise."""
        return reduce(Conditions.after, self.events, Conditions.of_header(self.header))

    @property
    def num_steps(self) -> int:
        """How many steps the weights can be rebuilt after."""
        return len(self.steps)

    def end_of_step(self, step: int) -> int:
        """Return the size in bytes of the journal cut after ``step`` steps."""
        if step == 0:
            return decode_header(self.path.read_bytes())[1]
        count = 0
        for record, end in zip(self.records, self.ends, strict=True):
            count += isinstance(record, Step)
            if count == step:
                return end
        raise UsageError(f"{self.path} holds {plural(count, 'step')}: choose one of 0 to {count}, not {step}.")

    @classmethod
    def read(cls, path: str | Path, *, up_to_damage: bool = False) -> Journal:
        """Read and verify a journal.

        Args:
            path: The file, or the folder of the run that holds it.
            up_to_damage: Take what comes before a damaged record, instead of refusing the journal.

        Returns:
            The journal, up to its last whole record.

        Raises:
            UsageError: If there is no such file.
            RunError: If it is no journal, or a record in the middle is damaged.
        """
        path = find(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"The journal {path} cannot be read ({error.strerror}).") from error
        try:
            header, offset = decode_header(data)
            records, ends, conditions = [], [], Conditions.of_header(header)
            previous, steps = data[offset - CHECKSUM_BYTES : offset], 0
            while (end := record_end(data, offset, previous)) is not None:
                record = decode(data, offset)
                if isinstance(record, Step):
                    if record.step != steps:
                        raise RunError(f"Step {steps} is followed by a record of step {record.step}.")
                    steps += 1
                    record = replace(record, conditions=conditions)
                else:
                    conditions = conditions.after(record.content)
                records.append(record)
                ends.append(end)
                previous, offset = data[end - CHECKSUM_BYTES : end], end
            later = None if up_to_damage else next(_records_after(data, offset), None)
            if later is not None:
                raise RunError(
                    f"The record of step {steps} (at byte {offset}) is damaged, and whole records follow (at byte "
                    f"{later}), so it was not torn off by a crash. Restore the file from a copy, or keep the first "
                    f"{plural(steps, 'step')} with 'zokernel journal truncate {path} --step {steps} --damaged'."
                )
        except RunError as error:
            raise RunError(f"{path}: {error}") from error
        return cls(path, header, records, ends, offset, len(data) - offset)


def find(path: str | Path) -> Path:
    """Return the journal's file, given that or the run's folder.

    Raises:
        UsageError: If there is none.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"There is no journal {file}: give a .zkj file or the output_dir of a run that kept one.")
    return file


def _records_after(data: bytes, offset: int) -> Iterator[int]:
    """Find whole records after a place that holds none; each is chained to the checksum stored before it."""
    for match in _STARTS.finditer(data, offset + 1):
        start = match.start()
        previous = data[start - CHECKSUM_BYTES : start]
        if record_end(data, start, previous) is not None:
            yield start
