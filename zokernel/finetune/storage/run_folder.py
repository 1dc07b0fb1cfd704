"""The output folder of a run: never another run's, resumable, and readable by people and programs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zokernel._version import __version__
from zokernel.errors import RunError, UsageError
from zokernel.files import check_output_dir, remedy, write_json, writing
from zokernel.finetune.models.starting_weights import STARTING_WEIGHTS
from zokernel.finetune.run_files import (
    LAST_GOOD,
    METRICS_FILE,
    PREDICTOR_FILE,
    RUN_FILE,
    SETTINGS_FILE,
    STEPS_FILE,
    read_run_file,
)
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.settings.resolve import COSMETIC
from zokernel.finetune.storage.lock import LOCK_FILE
from zokernel.journal import Journal
from zokernel.journal.reader import FILE_NAME
from zokernel.secrets import hide_in_values, hide_in_words

RECORD = 2  # what run.json and settings.json hold; raised when a run with another record cannot be continued
_INTERVAL = "save_steps"  # how often checkpoints are saved changes no step, and its default has changed
_CARD, _LOGS = "README.md", "runs"  # a run's model card, and the folder of its TensorBoard logs
ARTEFACTS = (
    "checkpoint-*",
    LAST_GOOD,
    _LOGS,
    "*.safetensors",
    "*.safetensors.index.json",
    "*.jinja",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
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
_MAY_DIFFER = (  # in a run that is continued
    *("max_steps", "num_train_epochs", "per_device_eval_batch_size"),
    *("offload", "offload_dir", "offload_updates"),
)
_ROWS = {"train_rows": "training", "validation_rows": "validation", "test_rows": "test"}
_WHICH_ROWS = (  # what they are is compared, not how they were found
    *("train_file", "validation_file", "test_file", "column_names", "dataset_name", "dataset_config"),
    *("dataset_revision", "max_train_samples", "max_eval_samples", "max_test_samples", "protocol", "k_shot"),
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
        settings: What decides the run's result: see :func:`run_settings`.

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
        _refuse_other_start(folder, old or {}, settings or {})
        if is_finished:
            _refuse_lost_steps(folder, old, settings)
        return "unfinished"
    if not is_occupied:
        return "new"
    if not overwrite:
        if not is_run:
            lost = f" ({_LOST_RECORD})" if is_finished else ""
            raise UsageError(f"{folder} already holds other files{lost}: choose another --output_dir.")
        refuse_old_run(folder)
        different = _different(old, settings)
        if different:
            raise _other_run(folder, different, old, settings, is_finished=is_finished)
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


def run_settings(*groups: Any) -> dict[str, Any]:
    """Return the settings that decide a run's result, as JSON values; where it is logged or saved is left out.

    Args:
        groups: Dataclasses of arguments; of ``TrainingArguments``, what ``to_dict`` returns counts.

    Returns:
        Values by name.
    """
    values: dict[str, Any] = {}
    for group in groups:
        values |= group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
    deciding = {key: value for key, value in values.items() if not key.startswith(COSMETIC)}
    return json.loads(json.dumps(hide_in_values(deciding), default=str))


def new_record(command: Sequence[str], settings: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``run.json`` holds when a run begins.

    Args:
        command: The command line.
        settings: What decides the run's result: see :func:`run_settings`.
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


def _refuse_other_start(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other examples, phrased or scored otherwise, or from other weights.

    What was measured before would stand beside what is measured now.

    Raises:
        UsageError: If one of them has changed.
    """
    changed = [name for name in _different(old, new) if name in old and name in new]
    for name, split in _ROWS.items():
        if name in changed:
            raise UsageError(
                f"The {split} examples are not those of the run in {folder} "
                f"({_describe_rows(name.removesuffix('_rows'), old[name], new[name])}): give it the same, or choose "
                "another --output_dir."
            )
    if STARTING_WEIGHTS in changed:
        raise _other_weights(folder)
    own = {field.name for field in dataclasses.fields(DataArguments)}.difference(_WHICH_ROWS)
    if names := [name for name in changed if name in own]:
        raise UsageError(
            f"The examples are not used as in the run in {folder} ({_describe_differences(names, old, new)}): repeat "
            "its settings, or choose another --output_dir."
        )


def _other_run(
    folder: Path,
    different: Sequence[str],
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any] | None,
    *,
    is_finished: bool,
) -> UsageError:
    """Return the error for a folder that holds a run with other settings.

    Args:
        folder: The output folder.
        different: Names of the settings that differ.
        old: The settings of the run that is there.
        new: The requested ones.
        is_finished: Whether the run that is there is finished.
    """
    if different == [STARTING_WEIGHTS]:
        return _other_weights(folder)
    can_continue = all(name in _MAY_DIFFER or name.startswith("eval_") for name in different)
    is_shorter, has_steps = _is_shorter(old, new), (old or {}).get("save_strategy") != "no"
    return UsageError(
        f"{folder} already holds another run{'' if is_finished else ', unfinished'} "
        f"({_describe_differences(different, old, new)}): "
        + ("" if is_finished else "repeat its settings to continue it, ")
        + ("lengthen it with --resume_from_checkpoint last, " if can_continue and has_steps and not is_shorter else "")
        + ("rebuild an earlier step with 'zokernel replay --step N', " if can_continue and is_shorter else "")
        + "choose another --output_dir, or start over with --overwrite_output_dir true."
    )


def _refuse_lost_steps(folder: Path, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> None:
    """Refuse to continue a finished run to an earlier step, or one that kept no step: its model would be replaced.

    Raises:
        UsageError: If it would be.
    """
    if _is_shorter(old, new):
        raise _other_run(folder, _different(old, new), old, new, is_finished=True)
    if not (folder / FILE_NAME).is_file() and not any(folder.glob("checkpoint-*")):
        raise UsageError(
            f"The finished run in {folder} kept no step to continue from: choose another --output_dir, or start over "
            "with --overwrite_output_dir true."
        )


def _is_shorter(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> bool:
    """Return whether a run is to end earlier than the one that is there."""
    lengths = [((old or {}).get(name) or 0, (new or {}).get(name) or 0) for name in ("max_steps", "num_train_epochs")]
    (old_steps, new_steps), (old_epochs, new_epochs) = lengths
    if old_steps > 0 and new_steps > 0:
        return bool(new_steps < old_steps)
    return old_steps <= 0 and new_steps <= 0 and bool(new_epochs < old_epochs)


def _other_weights(folder: Path) -> UsageError:
    """Return the error for a model that was trained further, or replaced, since a run began."""
    return UsageError(
        f"The model's weights are not those that the run in {folder} began with: give it the same, choose another "
        "--output_dir, or start over with --overwrite_output_dir true."
    )


def _different(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the settings that differ, those of data last."""
    if old is None or new is None:
        return ["settings"]
    names = sorted(key for key in old.keys() | new.keys() if key != _INTERVAL and old.get(key) != new.get(key))
    if None in (old.get(STARTING_WEIGHTS), new.get(STARTING_WEIGHTS)):  # of an earlier version, or on the hub
        names = [name for name in names if name != STARTING_WEIGHTS]
    return sorted(names, key=lambda name: str(old.get(name)).count(" rows, sha256 "))


def _describe_differences(names: Sequence[str], old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    """Return how settings differ."""
    if old is None or new is None:
        return "with settings that are not known"
    return ", ".join(
        _describe_rows(name.removesuffix("_rows"), old[name], new.get(name))
        if " rows, sha256 " in str(old.get(name))
        else f"{name}: {_value_text(old.get(name))} there, {_value_text(new.get(name))} asked for"
        for name in names
        if name != STARTING_WEIGHTS
    )


def _value_text(value: Any) -> Any:
    return "not set" if value is None else value


def _describe_rows(split: str, old: Any, new: Any) -> str:
    """Return how the rows of a split differ, of which each text gives number and SHA-256."""
    before, after = str(old).partition(" rows")[0], str(new).partition(" rows")[0]
    return f"{split}: {before} rows there, {after} now" if before != after else f"{split}: other rows"


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
