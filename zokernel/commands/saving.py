"""Models that a command saves: in a new folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zokernel.errors import UsageError
from zokernel.files import check_output_dir, writing


def check_new_folder(folder: Path) -> None:
    """Refuse an ``--output_dir`` that cannot be written, or is not empty, before anything is loaded.

    Raises:
        UsageError: If it holds files.
        RunError: If it cannot be written.
    """
    check_output_dir(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} already holds files: choose another --output_dir.")


@contextmanager
def saved_whole(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder whose files move to ``folder`` when the block ends well.

    Args:
        folder: Where the model goes; created if missing.

    Yields:
        Where to write it.
    """
    from zokernel.finetune.storage.checkpoint import move_files, scratch_folder

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder) as scratch:
            yield scratch
            move_files(scratch, folder)
