"""What a finished run left is looked at when its command is repeated: lost results are made again or named."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zokernel.errors import RunError, UsageError
from zokernel.files import read_json
from zokernel.finetune.models.model_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    CHAT_TEMPLATE,
    CONFIG,
    INDEX,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    check_folder,
    check_weights,
)
from zokernel.finetune.run_files import METRICS_FILE, PREDICTOR_FILE, SETTINGS_FILE, read_run_file
from zokernel.finetune.settings.record import RunSettings
from zokernel.finetune.settings.zo_arguments import is_first_order
from zokernel.finetune.storage.checkpoint import checkpoints
from zokernel.finetune.storage.run_journal import read_journal
from zokernel.journal import Journal
from zokernel.journal.reader import FILE_NAME
from zokernel.readable import plural

logger = logging.getLogger(__name__)


def has_results(folder: Path, settings: RunSettings, tokenizer: Any) -> bool:
    """Return whether the folder of a finished run still has its model; warn of records that it has lost.

    A tokenizer that was lost is saved again.

    Args:
        folder: The output folder, with its ``metrics.json``.
        settings: Every setting of the run.
        tokenizer: The tokenizer of the run, with its chat template.

    Returns:
        False if the run is to be continued from journal or checkpoint, which makes the lost files again.

    Raises:
        UsageError: If ``metrics.json`` is damaged, or a result is lost and nothing is there to make it from.
        RunError: If a result is lost, and the journal is damaged.
    """
    metrics = read_run_file(folder / METRICS_FILE)
    if not metrics["steps"]:
        return True
    keeps_journal = settings["save_strategy"] != "no" and not is_first_order(settings["method"])
    lost = _lost_result(folder, metrics)
    if not lost:
        if lost_part := _lost_tokenizer(folder, tokenizer):
            logger.warning("The run in %s has finished, but %s: it is saved again.", folder, lost_part)
            tokenizer.save_pretrained(folder)
        for warning in _lost_records(folder, metrics, keeps_journal=keeps_journal):
            logger.warning("%s", warning)
        return True
    if not ((folder / FILE_NAME).is_file() if keeps_journal else checkpoints(folder)):
        raise UsageError(
            f"The run in {folder} has finished, but {lost}, and no {'journal' if keeps_journal else 'checkpoint'} is "
            "left to make it from: restore the file from a copy, or start over with --overwrite_output_dir true."
        )
    source = _describe_journal(folder, lost, metrics["steps"]) if keeps_journal else "its last checkpoint"
    logger.warning("The run in %s has finished, but %s: it is made again from %s.", folder, lost, source)
    return False


def _describe_journal(folder: Path, lost: str, steps: int) -> str:
    """Return what a lost result is made again from, as a clause.

    Raises:
        RunError: If the journal is damaged.
    """
    try:
        journal = read_journal(folder / FILE_NAME)
    except RunError as error:
        raise RunError(f"The run in {folder} has finished, but {lost} and cannot be made again: {error}") from error
    which = "its steps" if journal.num_steps >= steps else f"the first {plural(journal.num_steps, 'step')}"
    return f"its journal, without forward passes for {which}"


def _lost_result(folder: Path, metrics: Mapping[str, Any]) -> str:
    """Return which file of the trained model is missing or damaged, as a clause; empty if none is."""
    weights = WEIGHTS if not (folder / INDEX).is_file() else INDEX
    model = (ADAPTER_CONFIG, ADAPTER) if metrics.get("saved") == "adapter" else (CONFIG, weights)
    for name in (PREDICTOR_FILE, *model):
        if not (folder / name).is_file():
            return f"its {name} is missing"
    try:
        read_run_file(folder / PREDICTOR_FILE)
        if metrics.get("saved") == "adapter":
            read_json(folder / ADAPTER_CONFIG, keys=("peft_type",))
            check_weights(folder / ADAPTER)
        else:
            check_folder(folder)
    except UsageError as error:
        return _without_advice(error)
    return ""


def _without_advice(error: UsageError) -> str:
    """Return what an error says is wrong, without what to do about it."""
    return str(error).rpartition(": ")[0] or str(error).removesuffix(".")


def _lost_tokenizer(folder: Path, tokenizer: Any) -> str:
    """Return which file of the tokenizer is missing or damaged, as a clause; empty if none is."""
    names = [TOKENIZER_CONFIG, *([TOKENIZER] if getattr(tokenizer, "is_fast", False) else [])]
    for name in names:
        if not (folder / name).is_file():
            return f"its {name} is missing"
    try:
        settings, *_ = [read_json(folder / name) for name in names]
    except UsageError as error:
        return _without_advice(error)
    has_template = (folder / CHAT_TEMPLATE).is_file() or "chat_template" in settings  # where older versions keep it
    return "" if has_template or not isinstance(tokenizer.chat_template, str) else f"its {CHAT_TEMPLATE} is missing"


def _lost_records(folder: Path, metrics: Mapping[str, Any], *, keeps_journal: bool) -> Iterator[str]:
    """Yield what a run with its model no longer says about itself, each in a sentence."""
    if not (folder / SETTINGS_FILE).is_file():
        yield (
            f"{folder / SETTINGS_FILE}, which says who decided each setting, is missing; the trained model is whole."
        )
    if not keeps_journal:
        return
    path, steps = folder / FILE_NAME, metrics["steps"]
    try:
        journal = Journal.read(path)
    except UsageError:
        problem = f"{path} is missing"
    except RunError as error:
        yield f"{error} The trained model is whole, but its steps cannot be rebuilt from this file."
        return
    else:
        if journal.num_steps >= steps:
            if journal.torn_bytes:
                yield f"{path} is cut off in its last record, but all {plural(steps, 'step')} are in it."
            return
        problem = f"{path} is cut off: it holds {journal.num_steps:,} of {plural(steps, 'step')}"
    yield (
        f"{problem}; the trained model is whole, but the run can be neither rebuilt nor continued: restore the file "
        "from a copy."
    )
