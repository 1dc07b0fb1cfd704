"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
