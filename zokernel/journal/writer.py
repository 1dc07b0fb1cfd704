"""Writing a journal: one record per step, appended whole; it survives a kill at once and a power cut within a second.

A record is handed to the operating system in a single write when its step is done, so killing the process loses
nothing.  Forcing it to the disk as well would only matter if the machine itself went down; that is done at most once
a second, and before anything that counts on the journal, such as a checkpoint.  Steps lost to a power cut are computed
again, with the same result, so they cost time and never correctness.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from zokernel.errors import RunError, UsageError
from zokernel.files import whole_file
from zokernel.journal.format import (
    CHECKSUM_BYTES,
    CONDITIONS,
    Conditions,
    Event,
    Record,
    Step,
    checksum,
    encode,
    encode_header,
)
from zokernel.journal.reader import Journal

SECONDS_BETWEEN_SYNCS = 1.0


class JournalWriter:
    """Appends records to a journal.

    Make one with :meth:`create` or :meth:`append_to`.

    Attributes:
        path: The file.
        size: Its length in bytes.

    Example:
        >>> import tempfile
        >>> from zokernel.journal import Step
        >>> path = Path(tempfile.mkdtemp()) / "journal.zkj"
        >>> writer = JournalWriter.create(path, {"any": "JSON"})
        >>> writer.append(Step(0, (1e-6,), (0.5, 0.25)))
        >>> writer.close()
        >>> Journal.read(path).steps
        [Step(step=0, learning_rates=(1e-06,), losses=(0.5, 0.25))]
    """

    def __init__(self, path: Path, size: int, previous: bytes, conditions: Conditions | None = None):
        self.path, self.size = path, size
        self._conditions = conditions or Conditions()
        self._previous = previous
        self._synced = time.monotonic()
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise RunError(f"The journal {path} cannot be written ({error.strerror}).") from error

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> JournalWriter:
        """Begin a new journal; it appears with its whole header or not at all.

        Raises:
            RunError: If it cannot be written.
        """
        data = encode_header(header)
        try:
            with whole_file(path, durable=True) as partial:
                partial.write_bytes(data)
        except OSError as error:
            raise RunError(f"The journal {path} cannot be written ({error.strerror}).") from error
        return cls(path, len(data), data[-CHECKSUM_BYTES:], Conditions.of_header(header))

    @classmethod
    def append_to(cls, journal: Journal) -> JournalWriter:
        """Go on with a journal that was read, after cutting off its torn end.

        Raises:
            RunError: If it cannot be written.
        """
        with journal.path.open("rb") as file:
            file.seek(journal.size - CHECKSUM_BYTES)
            previous = file.read(CHECKSUM_BYTES)
        writer = cls(journal.path, journal.size, previous, journal.conditions)
        os.ftruncate(writer._file, journal.size)
        return writer

    def append(self, record: Record) -> None:
        """Write a record, after the conditions of a step if they differ from those of the step before it.

        Raises:
            UsageError: If the step moved parameter groups that the journal does not know.
            RunError: If it cannot be written whole; the journal then ends with the record before it.
        """
        if isinstance(record, Step) and record.conditions is not None:
            self._record_conditions(record.step, record.conditions)
        body = encode(record)
        digest = checksum(self._previous, body)
        data = body + digest
        try:
            written = os.write(self._file, data)
            while written < len(data):
                written += os.write(self._file, data[written:])
            if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
                self.sync()
        except OSError as error:
            os.ftruncate(self._file, self.size)
            raise RunError(
                f"The journal {self.path} cannot be written ({error.strerror}); everything before this step is kept. "
                "Free some space and repeat the command to continue."
            ) from error
        self._previous = digest
        self.size += len(data)

    def _record_conditions(self, step: int, conditions: Conditions) -> None:
        last = self._conditions
        if None not in (last.groups, conditions.groups) and last.groups != conditions.groups:
            raise UsageError(
                f"The journal {self.path} began with {last.groups} parameter groups, and the optimizer has "
                f"{conditions.groups}: begin another one after add_param_group."
            )
        if not conditions.same_steps(last):
            content = {"perturb": conditions.perturb, "frozen": list(conditions.frozen)}
            self.append(Event({"event": CONDITIONS, "step": step, **content}))
        self._conditions = conditions

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Force everything to the disk and close the file."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1
