"""The page of a training run, a plan, a kernel or an evolution: whichever a folder holds."""

from __future__ import annotations

from pathlib import Path

from zokernel.errors import UsageError
from zokernel.files import read_json
from zokernel.finetune.run_files import RUN_FILE, SETTINGS_FILE
from zokernel.reporting.page import Page
from zokernel.reporting.plan_page import read_evolve, read_kernel, read_plan
from zokernel.reporting.training import TRAINING_FILES, find_plan, is_training, json_files
from zokernel.reporting.training_page import read_finetune

_AGAIN = "restore it from a copy, or repeat the command that wrote it"


def read_run(folder: Path) -> Page:
    """Return the page of the run that a folder, or the ``.json`` file of a plan, holds.

    Args:
        folder: ``output_dir`` of ``finetune``, ``kernel`` or ``evolve``, or where a plan was written.

    Returns:
        The page.

    Raises:
        UsageError: If it holds no run of zokernel, or a damaged one.
    """
    if folder.is_file() and folder.suffix.lower() == ".json":
        record = read_json(folder, keys=(), advice=_AGAIN)
        if "plan" in record:
            return read_plan(record)
    if not folder.is_dir():
        raise UsageError(f"There is no run in {folder}: give the output_dir of a run, or the file of a plan.")
    if is_training(folder):
        return read_finetune(folder)
    for name, reader in (("evolution.json", read_evolve), ("kernel.json", read_kernel)):
        if (folder / name).is_file():
            return reader(read_json(folder / name, keys=(), advice=_AGAIN))
    plan = find_plan(folder)
    if plan is not None:
        return read_plan(plan)
    for path in json_files(folder):
        read_json(path, advice=_AGAIN)  # a damaged file may be what the folder was given for
    _refuse_lost_run(folder)
    raise UsageError(
        f"{folder} holds no run of zokernel: give the output_dir of finetune, kernel, evolve or reproduce."
    )


def _refuse_lost_run(folder: Path) -> None:
    """Refuse the folder of a training run that has lost every file from which its page is made.

    Raises:
        UsageError: If it is one, naming the files.
    """
    begun = (folder / RUN_FILE).is_file()
    if begun or (folder / SETTINGS_FILE).is_file():
        files = ", ".join([*(() if begun else (RUN_FILE,)), *TRAINING_FILES[:-1]])
        reason = "has not taken a step yet, or has lost its" if begun else "has lost its"
        raise UsageError(
            f"The run in {folder} {reason} {files} and {TRAINING_FILES[-1]}: "
            f"{'look again later, or ' if begun else ''}restore one of them from a copy."
        )
