"""What a run leaves in its folder, by name; its journal is :data:`zokernel.journal.reader.FILE_NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zokernel.files import read_json

RUN_FILE = "run.json"  # command line and settings, from when the run begins
STEPS_FILE = "steps.jsonl"  # one line per step
SETTINGS_FILE = "settings.json"  # every setting, and who decided it
PREDICTOR_FILE = "predictor.json"  # how the trained weights answer new rows
METRICS_FILE = "metrics.json"  # the final numbers: it says that the run is finished
LAST_GOOD = "last-good"  # the folder of the weights before a loss that was not finite

_WRITTEN_AGAIN = "remove it and repeat the command of the run, which writes it again"
# What each file holds at least, and what to do about a damaged one.
_CONTENTS: dict[str, tuple[tuple[str, ...], str]] = {
    RUN_FILE: ((), "restore it from a copy, or start the run over with --overwrite_output_dir true"),
    SETTINGS_FILE: (("settings",), "remove it, since it only says who decided each setting, and repeat the command"),
    METRICS_FILE: (("steps", "before", "after"), _WRITTEN_AGAIN),
    PREDICTOR_FILE: (
        ("task", "language_model", "max_length", "precision", "context", "calibrate", "max_new_tokens", "ends"),
        _WRITTEN_AGAIN,
    ),
}


def read_run_file(path: Path) -> dict[str, Any]:
    """Read one of the JSON files that a run leaves, and which commands look at later.

    Args:
        path: The file, under its own name.

    Raises:
        UsageError: If it is damaged.
    """
    keys, advice = _CONTENTS[path.name]
    return dict(read_json(path, keys=keys, advice=advice))


def run_folders(folder: Path) -> list[Path]:
    """Return the folders that hold what a run wrote about a model or an adapter, the nearest first.

    Args:
        folder: Where the weights are: the folder of a run, or one that the run made in it.

    Example:
        >>> [str(place) for place in run_folders(Path("/runs/mine"))]
        ['/runs/mine']
        >>> [str(place) for place in run_folders(Path("/runs/mine/checkpoint-20"))]
        ['/runs/mine/checkpoint-20', '/runs/mine']
    """
    whole = folder.absolute()
    if whole.name == LAST_GOOD or whole.name.startswith("checkpoint-"):
        return [folder, whole.parent]
    return [folder]
