"""One process at a time in an output folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from zokernel.errors import RunError

LOCK_FILE = ".lock"
# Opening and closing a locked file again would free its POSIX lock, so a process remembers what it holds.
_held: set[tuple[int, Path]] = set()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing; the system frees it when the process dies, however.

    A POSIX lock rather than ``flock``: data loader workers would inherit the latter and keep it after a kill.  A
    process that holds the lock may take it again.  In the end the lock file is removed, and with it the folders that
    were created for it and hold nothing.

    Args:
        folder: The output folder.

    Raises:
        RunError: If another process holds it, or the folder cannot be written.
    """
    key = (os.getpid(), folder.resolve())
    if key in _held:
        yield
        return
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    with _locked(folder) as file:
        _held.add(key)
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        try:
            yield
        finally:
            if os.getpid() == key[0]:  # not in a fork of the process
                _held.discard(key)
                with suppress(OSError):  # a folder that cannot be written any more, or holds something
                    (folder / LOCK_FILE).unlink()
                    for path in new_folders:
                        path.rmdir()


def holder(folder: Path) -> int | None:
    """Return the id of the process that took the lock of a folder; None if it is free.

    The process may have been killed since: the file stays then.
    """
    if (os.getpid(), folder.resolve()) in _held:  # reading the file would free the lock
        return os.getpid()
    try:
        number = (folder / LOCK_FILE).read_text(encoding="utf-8").removeprefix("pid ")
    except OSError:
        return None
    return int(number) if number.isdecimal() else None


def _locked(folder: Path) -> TextIO:
    """Return the lock file of a folder, opened and locked."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK_FILE).open("a+")
        except OSError as error:
            raise RunError(
                f"The output folder {folder} cannot be written ({error.strerror}): choose another."
            ) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise RunError(
                f"Another process ({owner}) is working in {folder}: wait for it to end, or choose another output_dir."
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK_FILE).stat()):
                return file
        file.close()  # its owner removed it before it was locked here
