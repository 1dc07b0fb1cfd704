"""The output folder of a run: never another run's, resumable, and readable by people and programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from zokernel.errors import RunError, UsageError

RUN_FILE = "run.json"
_ARTEFACTS = (
    "checkpoint-*",
    "last-good",
    "runs",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.jinja",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "training_args.bin",
    "trainer_state.json",
    "README.md",
    "metrics.json",
    "steps.jsonl",
    "loss.png",
    "report.md",
    RUN_FILE,
)


def prepare(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Make sure that a run may write to ``folder``.

    Args:
        folder: The output folder; created if missing.
        overwrite: Remove what an earlier run of zokernel left there.
        resume: Continue the run that is there.

    Raises:
        UsageError: If the folder holds something else, or a run that was not asked to be resumed or overwritten.
        RunError: If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"The output folder {folder} cannot be written ({error.strerror}): choose another.") from error
    occupied = any(folder.iterdir())
    ours = (folder / RUN_FILE).exists()
    if resume:
        if not ours:
            raise UsageError(f"{folder} holds no run to resume: leave out --resume_from_checkpoint.")
        return
    if not occupied:
        return
    if not overwrite:
        raise UsageError(
            f"{folder} already holds {'another run' if ours else 'other files'}: choose another --output_dir"
            + (", --resume_from_checkpoint last, or --overwrite_output_dir." if ours else ".")
        )
    if not ours:
        raise UsageError(
            f"{folder} holds files that no run of zokernel wrote, so they are not overwritten: choose another."
        )
    for pattern in _ARTEFACTS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def last_checkpoint(folder: Path, requested: str) -> str:
    """Return the checkpoint to resume from: the newest for ``last`` or ``true``, otherwise the folder itself.

    Raises:
        UsageError: If there is none.
    """
    if requested.lower() in ("last", "true"):
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        if not found:
            raise UsageError(f"{folder} has no checkpoint to resume from: start anew with --overwrite_output_dir.")
        return str(found[-1])
    if not Path(requested).is_dir():
        raise UsageError(f"There is no checkpoint folder {requested}: give 'last' or a checkpoint-N folder.")
    return requested


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
