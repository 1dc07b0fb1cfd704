"""Whether a run is the one that its folder holds: the settings that decide its result, and how two runs differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError
from zokernel.finetune.models.starting_weights import STARTING_WEIGHTS
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.settings.resolve import COSMETIC
from zokernel.journal.reader import FILE_NAME
from zokernel.secrets import hide_in_values

_INTERVAL = "save_steps"  # how often checkpoints are saved changes no step, and its default has changed
_KEPT = {"save_strategy", "load_best_model_at_end"}  # what they are without evaluations has changed
_MAY_DIFFER = (  # in a run that is continued
    *("max_steps", "num_train_epochs", "per_device_eval_batch_size"),
    *("offload", "offload_dir", "offload_updates"),
)
_ROWS = {"train_rows": "training", "validation_rows": "validation", "test_rows": "test"}
_WHICH_ROWS = (  # what they are is compared, not how they were found
    *("train_file", "validation_file", "test_file", "column_names", "dataset_name", "dataset_config"),
    *("dataset_revision", "max_train_samples", "max_eval_samples", "max_test_samples", "protocol", "k_shot"),
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


def refuse_other_start(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other examples, phrased or scored otherwise, or from other weights.

    What was measured before would stand beside what is measured now.

    Raises:
        UsageError: If one of them has changed.
    """
    changed = [name for name in different_settings(old, new) if name in old and name in new]
    for name, split in _ROWS.items():
        if name in changed:
            raise UsageError(
                f"The {split} examples are not those of the run in {folder} "
                f"({_describe_rows(name.removesuffix('_rows'), old[name], new[name])}): give it the same, or choose "
                "another --output_dir."
            )
    if STARTING_WEIGHTS in changed:
        raise _other_weights_error(folder)
    own = {field.name for field in dataclasses.fields(DataArguments)}.difference(_WHICH_ROWS)
    if names := [name for name in changed if name in own]:
        raise UsageError(
            f"The examples are not used as in the run in {folder} ({_describe_differences(names, old, new)}): repeat "
            "its settings, or choose another --output_dir."
        )


def other_run_error(
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
        return _other_weights_error(folder)
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


def refuse_lost_steps(folder: Path, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> None:
    """Refuse to continue a finished run to an earlier step, or one that kept no step: its model would be replaced.

    Raises:
        UsageError: If it would be.
    """
    if _is_shorter(old, new):
        raise other_run_error(folder, different_settings(old, new), old, new, is_finished=True)
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


def _other_weights_error(folder: Path) -> UsageError:
    """Return the error for a model that was trained further, or replaced, since a run began."""
    return UsageError(
        f"The model's weights are not those that the run in {folder} began with: give it the same, choose another "
        "--output_dir, or start over with --overwrite_output_dir true."
    )


def different_settings(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the settings that differ, those of data last."""
    if old is None or new is None:
        return ["settings"]
    names = sorted(key for key in old.keys() | new.keys() if key != _INTERVAL and old.get(key) != new.get(key))
    if old.get("eval_strategy") == "no" and old.get("save_strategy") == "best":  # of an earlier version
        names = [name for name in names if name not in _KEPT]
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
