"""The file beside a run's weights that says how new rows are phrased and scored: ``predictor.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError
from zokernel.files import write_json
from zokernel.finetune.models.quantization import recorded_flags
from zokernel.finetune.run_files import METRICS_FILE, PREDICTOR_FILE, read_run_file, run_folders
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.tasks import Task
from zokernel.finetune.tasks.prompt import Label
from zokernel.finetune.tasks.serialization import task_values
from zokernel.secrets import hide_in_text


def write_predictor(
    folder: Path,
    task: Task,
    *,
    kind: str,
    max_length: int,
    precision: str,
    arguments: ModelArguments,
    labels: Sequence[Label] = (),
    context: str = "",
    calibrate: bool = False,
    max_new_tokens: int = 50,
    ends: Sequence[int] = (),
) -> None:
    """Write how new examples are phrased and scored beside a run's weights.

    Args:
        folder: The folder of the run.
        task: Template and options.
        kind: Kind of the language model: ``causal``, ``masked`` or ``seq2seq``.
        max_length: Longest sequence in tokens.
        precision: ``fp32`` or ``bf16`` of the forwards.
        arguments: How the model was loaded.
        labels: The label of each class as the training data write it, in its type, for classification.
        context: Solved examples before every prompt.
        calibrate: Whether the scores in an empty prompt are subtracted.
        max_new_tokens: Longest generated answer.
        ends: Tokens that end a turn of a chat, beside those that the model says.
    """
    values = {
        "task": task_values(task),
        "language_model": kind,
        "max_length": max_length,
        "precision": precision,
        **recorded_flags(arguments),
        "labels": list(labels),
        "context": hide_in_text(context),
        "calibrate": calibrate,
        "max_new_tokens": max_new_tokens,
        "ends": list(ends),
    }
    write_json(folder / PREDICTOR_FILE, values)


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return what :func:`write_predictor` wrote.

    Args:
        folder: The folder of a run, or one of its checkpoints.

    Raises:
        UsageError: If there is no such folder, its run has not finished, or the file is damaged.
    """
    if not Path(folder).expanduser().is_dir():
        raise UsageError(f"There is no folder {folder}: give that of a finished run, or one of its checkpoints.")
    path = _record_of(folder)
    if not path.is_file():
        metrics = path.parent / METRICS_FILE
        if metrics.is_file() and not read_run_file(metrics)["steps"]:
            raise UsageError(f"The run in {path.parent} only scored its model and saved none: train at least one step.")
        if metrics.is_file():
            raise UsageError(
                f"{path} is missing, though the run has finished: repeat its command, which writes it again."
            )
        raise UsageError(
            f"{path.parent} has no {PREDICTOR_FILE}, which 'zokernel finetune' writes when a run ends: give the folder "
            "of a finished run, or one of its checkpoints."
        )
    return read_run_file(path)


def _record_of(folder: str | Path) -> Path:
    """Return the file that says how a model answers new rows: that of a run holds for its checkpoints, too."""
    files = [path / PREDICTOR_FILE for path in run_folders(Path(folder).expanduser())]
    return next((file for file in files if file.is_file()), files[-1])


def copy_record(adapter: str | Path, folder: Path, arguments: ModelArguments) -> None:
    """Write beside a merged model how the run of its adapter answered new rows; nothing if that is not known.

    Args:
        adapter: The adapter: the folder of a run, or one of its checkpoints.
        folder: Where the merged model goes.
        arguments: How that model is to be loaded.
    """
    if _record_of(adapter).is_file():
        record = read_record(adapter)
        attention = {"attn_implementation": record.get("attn_implementation")}
        write_json(folder / PREDICTOR_FILE, record | recorded_flags(arguments) | attention)
