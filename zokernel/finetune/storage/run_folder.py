"""The output folder of a run: never another run's, resumable, and readable by people and programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zokernel._version import __version__
from zokernel.errors import RunError, UsageError, ZokernelError
from zokernel.files import check_output_dir, remedy, write_json, writing
from zokernel.finetune.models.model_files import ADAPTER_CONFIG, CONFIG, TOKENIZER, TOKENIZER_CONFIG
from zokernel.finetune.run_files import (
    LAST_GOOD,
    METRICS_FILE,
    PREDICTOR_FILE,
    RUN_FILE,
    SETTINGS_FILE,
    STEPS_FILE,
    read_run_file,
)
from zokernel.finetune.storage.lock import LOCK_FILE
from zokernel.finetune.storage.run_identity import (
    different_settings,
    other_run_error,
    refuse_lost_steps,
    refuse_other_start,
)
from zokernel.journal import Journal
from zokernel.journal.reader import FILE_NAME
from zokernel.secrets import hide_in_words

RECORD = 2  # what run.json and settings.json hold; raised when a run with another record cannot be continued
_CARD, _LOGS = "README.md", "runs"  # a run's model card, and the folder of its TensorBoard logs
ARTEFACTS = (
    "checkpoint-*",
    LAST_GOOD,
    _LOGS,
    "*.safetensors",
    "*.safetensors.index.json",
    "*.jinja",
    ADAPTER_CONFIG,
    CONFIG,
    "generation_config.json",
    "special_tokens_map.json",
    *(TOKENIZER, TOKENIZER_CONFIG, "tokenizer.model"),
    *("vocab.json", "vocab.txt", "vocab-src.json", "vocab-tgt.json"),
    "merges.txt",
    "training_args.bin",
    "trainer_state.json",
    _CARD,
    STEPS_FILE,
    "held-out-start.json",
    "loss.png",
    "report.md",
    "report.html",
    "profile.md",
    "profile.json",
    PREDICTOR_FILE,
    "training_args.json",
    "base-adapter",
    "journal.zkj*",
    ".partial-*",
    ".stale-*",
    "*.partial",
    SETTINGS_FILE,
    METRICS_FILE,
    RUN_FILE,
)
_OWN_CARDS = ("- zokernel", "# Model Card for Model ID")  # a line of the card of a run, or of peft's until it ends
_LOST_RECORD = f"{RUN_FILE} of a finished run is missing: restore it from a copy"
_OWN_HIDDEN = (LOCK_FILE, ".partial-", ".stale-")


def prepare(folder: Path, *, overwrite: bool, resume: bool, settings: dict[str, Any] | None = None) -> str:
    """Make sure that a run may write to ``folder``, and return its state.

    A run that was cut off is continued by the settings it was started with; nobody has to know that it was.

    Args:
        folder: The output folder; created if missing.
        overwrite: Remove what an earlier run of zokernel left there.
        resume: Continue the run that is there, even if it becomes longer, or is evaluated at other steps.
        settings: What decides the run's result: see :func:`~zokernel.finetune.storage.run_identity.run_settings`.

    Returns:
        ``new``, ``unfinished`` or ``finished``.

    Raises:
        UsageError: If the folder holds something else, a run that is not to be resumed or overwritten, or one
            with other examples or starting weights.
        RunError: If it cannot be written.
    """
    check_output_dir(folder, "The output folder")
    folder.mkdir(parents=True, exist_ok=True)
    is_occupied = any(not path.name.startswith(_OWN_HIDDEN) for path in folder.iterdir())
    is_run, is_finished = (folder / RUN_FILE).exists(), (folder / METRICS_FILE).exists()
    old = read_run_file(folder / RUN_FILE).get("settings") if is_run and (resume or not overwrite) else None
    if resume:
        if not is_run:
            advice = _LOST_RECORD if is_finished else "leave out --resume_from_checkpoint"
            raise UsageError(f"{folder} holds no run to resume: {advice}.")
        refuse_old_run(folder)
        refuse_other_start(folder, old or {}, settings or {})
        if is_finished:
            refuse_lost_steps(folder, old, settings)
        return "unfinished"
    if not is_occupied:
        return "new"
    if not overwrite:
        if not is_run:
            lost = f" ({_LOST_RECORD})" if is_finished else ""
            raise UsageError(f"{folder} already holds other files{lost}: choose another --output_dir.")
        refuse_old_run(folder)
        different = different_settings(old, settings)
        if different:
            raise other_run_error(folder, different, old, settings, is_finished=is_finished)
        return "finished" if is_finished else "unfinished"
    if not is_run and is_finished:
        raise UsageError(f"{folder} cannot be overwritten ({_LOST_RECORD}): choose another --output_dir.")
    if not is_run:
        raise UsageError(
            f"{folder} holds files that no run of zokernel wrote, so they are not overwritten: choose another."
        )
    if (folder / _CARD).is_file() and not _is_artefact(folder / _CARD):
        raise UsageError(f"{folder / _CARD} was not written by the run: move it away, or choose another --output_dir.")
    _clear(folder)
    return "new"


def _clear(folder: Path) -> None:
    """Remove what a run left; the file that says whose folder this is goes last, so that a kill leaves it ours."""
    for pattern in ARTEFACTS:
        for path in filter(_is_artefact, folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_artefact(path: Path) -> bool:
    """Return whether a run wrote what has the name of an artefact, where people use that name, too."""
    if path.name == _LOGS:
        files = [file.name for file in path.rglob("*") if not file.is_dir()]
        return path.is_dir() and all(name.startswith("events.out.tfevents") for name in files)
    if path.name == _CARD:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[:1] == ["---"] and any(line in _OWN_CARDS for line in lines)
    return True


@contextmanager
def clear_if_refused(folder: Path, *, new: bool) -> Iterator[None]:
    """Remove what a new run has written if it is refused before its first step: there is nothing to continue.

    Args:
        folder: The output folder.
        new: Whether the run began in an empty folder.
    """
    try:
        yield
    except UsageError:
        journal, later = folder / FILE_NAME, (STEPS_FILE, METRICS_FILE, "*.safetensors")
        has_steps = journal.exists() and Journal.read(journal).num_steps > 0
        if new and not has_steps and not any(list(folder.glob(pattern)) for pattern in later):
            _clear(folder)
        raise


def refuse_old_run(folder: Path) -> None:
    """Refuse to continue what a version of zokernel wrote that kept no record of the settings.

    Raises:
        UsageError: If the folder holds such a run.
    """
    if (folder / SETTINGS_FILE).exists():
        return
    run = read_run_file(folder / RUN_FILE) if (folder / RUN_FILE).exists() else None
    if run is not None and run.get("record") == RECORD:
        return
    journal = folder / FILE_NAME
    if run is None and not journal.exists():
        return
    version = (run or {}).get("zokernel") or Journal.read(journal).header.get("zokernel", "an earlier version")
    raise UsageError(
        f"{folder} holds a run of zokernel {version}, which this version ({__version__}) cannot continue: rebuild its "
        "weights with 'zokernel replay', start over with --overwrite_output_dir true, or choose another --output_dir."
    )


def new_record(command: Sequence[str], settings: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``run.json`` holds when a run begins.

    Args:
        command: The command line.
        settings: What decides the run's result: see :func:`~zokernel.finetune.storage.run_identity.run_settings`.
        base: What tells the base of an adapter from others.
    """
    words = hide_in_words(command)
    return {"zokernel": __version__, "record": RECORD, "command": words, "settings": dict(settings), "base": dict(base)}


def note_begin(
    folder: Path, run: dict[str, Any], *, settings: Mapping[str, Any], total_steps: int, steps_taken: int
) -> None:
    """Write to ``run.json`` that training begins, or goes on where another process left it, perhaps to a later step.

    Args:
        folder: The output folder, whose run is no longer finished.
        run: What ``run.json`` holds; changed in place.
        settings: What decides the run's result.
        total_steps: Steps the run will have taken when it ends.
        steps_taken: Steps that earlier processes took.
    """
    (folder / METRICS_FILE).unlink(missing_ok=True)
    run.update(settings=dict(settings), total_steps=total_steps)
    if 0 < steps_taken < total_steps:
        run["continued_at"] = [*run.get("continued_at", []), steps_taken]
    write_json(folder / RUN_FILE, run)


@contextmanager
def noted_failure(folder: Path, run: dict[str, Any]) -> Iterator[None]:
    """Note in ``run.json`` the error that stops a run, for its report; the error passes as it is.

    Args:
        folder: The output folder.
        run: What ``run.json`` holds.
    """
    try:
        yield
    except ZokernelError as error:
        write_json(folder / RUN_FILE, run | {"stopped_by": str(error)})
        raise


@contextmanager
def explained_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or read-only output of a run into one sentence; other errors pass as they are.

    Raises:
        RunError: If the block could not write.
    """
    try:
        with writing(folder):
            yield
    except OSError as error:
        if not (advice := remedy(error)):
            raise
        raise RunError(
            f"{folder} cannot be written ({error.strerror}), but checkpoints and journal are whole up to now: {advice} "
            "and repeat the command to continue."
        ) from error
