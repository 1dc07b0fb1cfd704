"""The cache folder: complete or absent, never half-written, and safe when two processes fetch at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zokernel.errors import RunError, UsageError
from zokernel.files import writing

MANIFEST = "manifest.json"


def cache_home() -> Path:
    """Return the cache folder: ``$ZOKERNEL_HOME``, or ``~/.cache/zokernel``."""
    configured = os.environ.get("ZOKERNEL_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "zokernel"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise unless the file has the expected SHA-256.

    Args:
        path: File to check.
        expected: 64 hexadecimal digits.

    Raises:
        RunError: If it differs; the file is not what it should be and must not be used.
    """
    actual = sha256(path)
    if actual != expected:
        raise RunError(
            f"{path.name} has sha256 {actual[:12]}... where {expected[:12]}... was expected: "
            "the download is damaged or was changed; delete it and fetch again."
        )


def is_complete(folder: Path, source: str | None = None) -> bool:
    """Return whether ``folder`` holds a finished fetch: its manifest is there and every file has its recorded size.

    Args:
        folder: The folder.
        source: Where the content must come from, as its manifest says; None takes any.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return source in (None, manifest["source"]) and all(
            (folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def verify(folder: Path) -> None:
    """Check every file of a finished fetch against the SHA-256 recorded when it was written.

    Raises:
        RunError: If a file is missing or has changed.
    """
    if not is_complete(folder):
        raise RunError(f"{folder} is not a complete fetch: delete it and fetch again.")
    for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items():
        check_sha256(folder / name, entry["sha256"])


@contextmanager
def atomic_folder(target: Path, *, source: str) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``target`` when the block ends without an exception.

    The scratch folder lies beside the target (the same file system, so the final rename is atomic).  A killed process
    leaves at most a hidden scratch folder, removed by the next fetch.

    Args:
        target: Folder to create or replace.
        source: Where the content comes from, written to the manifest.

    Yields:
        The scratch folder.

    Raises:
        UsageError: If ``target`` holds what was not fetched, which replacing it would delete.
    """
    _refuse_foreign_content(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        with writing(target.parent):
            yield scratch
        for path in scratch.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        files = {
            str(path.relative_to(scratch)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(scratch.rglob("*"))
            if path.is_file()
        }
        (scratch / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n")
        _refuse_foreign_content(target)
        if target.exists():
            shutil.rmtree(target)
        scratch.chmod(0o755)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _refuse_foreign_content(target: Path) -> None:
    """Refuse to replace a file, or a folder with content but without a manifest of :func:`atomic_folder`."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        manifest = json.loads((target / MANIFEST).read_text())
        is_fetched = {"source", "files"} <= manifest.keys()
    except (OSError, ValueError, AttributeError):
        is_fetched = False
    if not is_fetched:
        raise UsageError(
            f"{target} was not fetched by zokernel, so it is not replaced: move it away, or set ZOKERNEL_HOME."
        )


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Hold the fetch lock of ``name``: a second process waits, then finds the work done."""
    home = cache_home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / f".{name}.lock").open("w")
    except OSError as error:
        raise RunError(f"The cache folder {home} cannot be written ({error.strerror}): set ZOKERNEL_HOME.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
