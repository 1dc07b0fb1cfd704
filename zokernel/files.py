"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from zokernel.errors import RunError, UsageError, first_line

# Why a file cannot be written, and what helps.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    errno.EIO: "check the disk",
    errno.EFBIG: "raise the limit on the size of files",
}


def remedy(error: OSError) -> str:
    """Return what helps where a file cannot be written, as a clause; nothing for an error of another kind.

    Example:
        >>> remedy(OSError(errno.ENOSPC, "No space left on device")), remedy(FileNotFoundError())
        ('free some space', '')
    """
    return _REMEDIES.get(error.errno or 0, "")


def explain_write_error(error: OSError) -> RunError | None:
    """Return the error that tells in one sentence which file cannot be written, why, and what to do.

    Args:
        error: What was raised.  A full disk names no file outside of :func:`writing`; that is what is printed.

    Returns:
        The error; None if it is of another kind.

    Example:
        >>> print(explain_write_error(OSError(errno.ENOSPC, "No space left on device", "runs/plan.json")))
        runs/plan.json cannot be written (No space left on device): free some space and repeat the command, or choose \
another place.
    """
    path, cure = error.filename2 or error.filename, remedy(error)
    if not cure or (path is None and cure == "make it writable"):  # a port, or another process
        return None
    if path is not None and os.path.isfile(path) and not os.access(path, os.R_OK):
        return RunError(f"{path} cannot be read ({error.strerror}): make it readable and repeat the command.")
    return RunError(
        f"{'The output' if path is None else path} cannot be written ({error.strerror}): {cure} and repeat the "
        "command, or choose another place."
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let an error of writing name the file or folder: that of a full disk names none, and safetensors has its own.

    Args:
        path: The file or folder, for what is in it and for temporary names that begin with its own.

    Raises:
        OSError: What was raised, with the name.

    Example:
        >>> try:
        ...     with writing(Path("runs/plan.json")):
        ...         raise OSError(errno.ENOSPC, "No space left on device")
        ... except OSError as error:
        ...     print(error)
        [Errno 28] No space left on device: 'runs/plan.json'
    """
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename
        if remedy(error) and (place is None or str(place).startswith(str(path))):
            setattr(error, "filename2" if error.filename2 else "filename", str(path))
        raise
    except SafetensorError as error:
        match = re.search(r"\(os error (\d+)\)", str(error))
        number = int(match.group(1)) if match else 0
        if number not in _REMEDIES:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


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

    It is removed if the block fails.

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
    try:
        with writing(path):
            yield partial
            if durable:
                sync(partial)
            partial.replace(path)
            if durable:
                sync(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


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


def read_json(path: Path, *, keys: Collection[str] | None = None, advice: str = "restore it from a copy") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        keys: What the file, which then holds an object, must have at least.
        advice: What to do about a damaged file, as a clause.

    Raises:
        UsageError: If it is cut off or otherwise damaged, or lacks one of the keys.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (path := Path(folder) / "plan.json").write_text("{")
        ...     try:
        ...         read_json(path)
        ...     except UsageError as error:
        ...         print(str(error).removeprefix(folder))
        /plan.json is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)): \
restore it from a copy.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text's encoding, too
        raise UsageError(f"{path} is not valid JSON ({first_line(error)}): {advice}.") from error
    if keys is not None and not isinstance(value, dict):
        raise UsageError(f"{path} is damaged (it holds no JSON object): {advice}.")
    for key in keys or ():
        if key not in value:
            raise UsageError(f"{path} is damaged (it has no {key!r}): {advice}.")
    return value


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
