"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zokernel.errors import RunError, UsageError


def check_output_dir(folder: Path, what: str = "--output_dir") -> None:
    """Refuse a folder that cannot be written, or made, before the work whose results go there; nothing is left behind.

    Args:
        folder: The folder, which need not exist.
        what: What it is, for the message.

    Raises:
        RunError: If a file cannot be made in it, or in the nearest folder above it that exists.
    """
    place = folder.absolute()
    nearest = next(path for path in (place, *place.parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        reason = f"{nearest} is a file" if nearest.is_file() else error.strerror
        raise RunError(f"{what} {folder} cannot be written ({reason}): choose another.") from error


def check_output_file(path: Path, what: str = "--output_file") -> None:
    """Refuse a file that cannot be written, before the work whose result goes there.

    Args:
        path: The file, to create or replace.
        what: What it is, for the message.

    Raises:
        UsageError: If it is a folder, or no file that can be replaced.
        RunError: If its folder cannot be written.
    """
    if os.path.isdir(path):
        raise UsageError(f"{what} {path} is a folder: name a file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{what} {path} is a device or a pipe: name a file.")
    check_output_dir(path.parent, f"{what} {path.name}: the folder")


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a path beside ``path``, with ``.partial`` after its name, that takes its place when the block ends well.

    Args:
        path: File to create or replace.
        durable: Wait until the new file and its name are on the disk, so that it survives a power cut, too.

    Yields:
        Where to write.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(Path(folder) / "a.txt") as partial:
        ...         _ = partial.write_text("all of it")
        ...     [path.name for path in Path(folder).iterdir()]
        ['a.txt']
    """
    partial = path.with_name(path.name + ".partial")
    yield partial
    if durable:
        sync(partial)
    partial.replace(path)
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, default: Callable[[Any], Any] | None = None) -> None:
    """Write JSON, whole or not at all.

    Args:
        path: File to create or replace.
        value: What to write.
        default: Turns what JSON has no form for into what it has; see :func:`json.dumps`.
    """
    write_text(path, json.dumps(value, indent=2, default=default) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
