"""Checkpoints that are whole or absent, and hold only safetensors and JSON.

A checkpoint is the folder ``checkpoint-N``: what ``save_pretrained`` writes, ``trainer_state.json``, and under
``training_state/`` optimizer, schedule and random state.  It is written under a hidden name and renamed when complete.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zokernel.errors import RunError, UsageError, first_line
from zokernel.files import read_json, sync
from zokernel.finetune.models.adapters import virtual_tokens
from zokernel.finetune.models.model_files import ADAPTER, ADAPTER_CONFIG, INDEX, WEIGHTS, reading_error
from zokernel.finetune.models.pickles import PICKLES
from zokernel.finetune.models.weights import load_weights_
from zokernel.finetune.storage.state_file import load_state, save_state

STATE_FOLDER = "training_state"
TRAINER_STATE = "trainer_state.json"
_STATE_FILES = (f"{STATE_FOLDER}/optimizer.safetensors", f"{STATE_FOLDER}/scheduler.safetensors")
_HIDDEN = (".partial-", ".stale-")
_REMOVE = "remove this checkpoint, and the run continues from what is left"


def hidden_path(target: Path) -> Path:
    """Return the name under which a folder is written before it is complete."""
    return target.with_name(f".partial-{target.name}")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder that takes the name ``target`` when the block ends well, and is removed when it does not.

    Args:
        target: Folder to create or replace.

    Yields:
        The hidden folder.
    """
    scratch = hidden_path(target)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                sync(path)
        remove_folder(target)
        scratch.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder inside ``folder`` that is removed in the end."""
    scratch = folder / ".partial-model"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def move_files(source: Path, target: Path) -> None:
    """Move finished files into a folder one rename each; what names the others, configuration and index, comes last."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: (path.suffix == ".json", path.name == "config.json")):
        sync(path)
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.replace(destination)
    sync(target)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill half-way leaves no half of it under its name."""
    if folder.exists():
        stale = folder.with_name(f".stale-{folder.name}")
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
        shutil.rmtree(stale)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(_HIDDEN):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(".partial"):
            path.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, oldest first."""
    folders = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit() and path.is_dir()]
    return sorted(folders, key=step_of)


def newest_checkpoint(folder: Path, *, last_step: float) -> Path | None:
    """Return the newest checkpoint in a run's folder after at most so many steps; None if there is none."""
    return next((path for path in reversed(checkpoints(folder)) if step_of(path) <= last_step), None)


def step_of(checkpoint: Path) -> int:
    """Return after how many steps a checkpoint was written: the N of ``checkpoint-N``, or what it says inside."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else _global_step(checkpoint)


def _global_step(checkpoint: Path) -> int:
    return int(read_json(checkpoint / TRAINER_STATE, keys=("global_step",), advice=_REMOVE)["global_step"])


def rotate(folder: Path, *, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond ``limit``, but neither the newest nor the best."""
    paths = checkpoints(folder)
    if not limit or limit < 1:
        return
    protected = {paths[-1].name} | ({Path(best).name} if best else set()) if paths else set()
    surplus = len(paths) - max(limit, len(protected))
    for path in [path for path in paths if path.name not in protected][: max(0, surplus)]:
        remove_folder(path)


def remove_checkpoints(folder: Path) -> int:
    """Remove all checkpoints of a run, and return how many there were."""
    paths = checkpoints(folder)
    for path in paths:
        remove_folder(path)
    return len(paths)


def check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint that cannot be resumed from without loading a pickle.

    Raises:
        UsageError: If it is no checkpoint of zokernel, or its state is damaged.
    """
    if not folder.is_dir():
        raise UsageError(
            f"There is no checkpoint folder {folder}: name one called checkpoint-N, or let the run find the "
            "last one (resume_from_checkpoint: last on the command line, True in Python)."
        )
    weights = list(folder.glob("*.safetensors"))
    missing = [name for name in (TRAINER_STATE, *_STATE_FILES) if not (folder / name).exists()]
    missing += _missing_weights(folder)
    if missing:
        raise _missing_file(folder, missing[0])
    for file in weights:
        if error := reading_error(file):
            raise UsageError(f"{file} is damaged or cut off ({first_line(error)}): {_REMOVE}.") from error
    _global_step(folder)  # transformers reads it without a word about a damaged file


def _missing_weights(folder: Path) -> list[str]:
    """Return which files of weights a checkpoint lacks."""
    if (folder / ADAPTER_CONFIG).is_file():
        names = [ADAPTER]
    elif (folder / INDEX).is_file():
        index = read_json(folder / INDEX, keys=("weight_map",), advice=_REMOVE)
        names = sorted(set(index["weight_map"].values()))
    else:
        names = [] if any(folder.glob("*.safetensors")) else [WEIGHTS]
    return [name for name in names if not (folder / name).is_file()]


def _missing_file(folder: Path, name: str) -> UsageError:
    """Return the error for a checkpoint without one of its files: of zokernel's own, or of another library's."""
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if (folder / STATE_FOLDER).is_dir() and not pickles:
        return UsageError(f"{folder} has lost its {name}: {_REMOVE}.")
    return UsageError(
        f"{folder} has no {name}"
        + (
            f", only pickles ({', '.join(pickles)}): loading one can run any code, so none ever is. "
            if pickles
            else ": it was not written by zokernel, or with save_only_model. "
        )
        + "Start anew from the weights, saved as safetensors."
    )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights, or adapter, into the model.

    Raises:
        RunError: If they do not fit.
    """
    if hasattr(model, "peft_config"):
        load_adapter_(model, folder)
    else:
        load_weights_(model, folder)


def load_adapter_(model: Any, folder: Path) -> None:
    """Copy a saved adapter into a peft model of the same shape.

    Raises:
        RunError: If it does not fit.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / ADAPTER
    if not file.exists():
        raise RunError(
            f"{folder} holds no {ADAPTER}: restore the file from a copy, or start over with overwrite_output_dir=True."
        )
    result: Any = set_peft_model_state_dict(model, load_file(file))
    # peft files virtual tokens under a name of its own, loads them, and then calls the name unexpected.
    unexpected = [name for name in result.unexpected_keys if name != "prompt_embeddings" or not virtual_tokens(model)]
    if unexpected:
        raise RunError(f"{file} holds {unexpected[0]!r}, which this adapter has not.")


def save_training_state(folder: Path, *, optimizer: Any, scheduler: Any, extra: dict[str, Any]) -> None:
    """Write optimizer, schedule and what else the loop keeps."""
    state = folder / STATE_FOLDER
    state.mkdir(exist_ok=True)
    save_state(state / "optimizer.safetensors", optimizer.state_dict())
    save_state(state / "scheduler.safetensors", {"scheduler": scheduler.state_dict(), "loop": extra})


def load_training_state(folder: Path, *, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Take over what :func:`save_training_state` wrote; return what else the loop kept."""
    state = folder / STATE_FOLDER
    optimizer.load_state_dict(load_state(state / "optimizer.safetensors"))
    saved = load_state(state / "scheduler.safetensors")
    scheduler.load_state_dict(saved["scheduler"])
    return saved["loop"]


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every random generator a training step may draw from."""
    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
