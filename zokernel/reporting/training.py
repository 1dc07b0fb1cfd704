"""What is known of a training run, finished or not: steps, evaluations and predictions, read from its folder."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zokernel.errors import RunError, UsageError
from zokernel.files import read_json
from zokernel.finetune.run_files import METRICS_FILE, RUN_FILE, STEPS_FILE, read_run_file
from zokernel.journal.reader import FILE_NAME as JOURNAL_FILE
from zokernel.journal.reader import Journal
from zokernel.readable import plural
from zokernel.reporting.rewards import Band, band, is_rewarded

EVOLUTION = "evolution.json"
TRAINING_FILES = (METRICS_FILE, STEPS_FILE, JOURNAL_FILE)
"""Any of which tells what a training run did."""
_TIMINGS = {"model_preparation_time", "runtime", "samples_per_second", "steps_per_second", "epoch"}


@dataclass
class TrainingRun:
    """A run as its folder tells it.

    Attributes:
        folder: Where it is.
        rows: One dict per step: ``step``, ``loss``, and where known ``forwards``, ``seconds``, ``projected_gradient``,
            ``learning_rate``.
        evaluations: Validation results with ``step``, ``loss`` and ``accuracy``.
        metrics: The final numbers; empty while it runs.
        run: What was noted when it began.
        method: Name of the method, if the journal says it.
        prediction: Predicted losses by step, if ``evolution.json`` is there.
        slope: Predicted rms slope of a batch and its error, if a plan is there.
        rewards: Quantiles of the members' rewards by step, if the run is one on rewards and its journal is there.
        evaluation_seconds: Seconds that each evaluation took, if the journal says it.
        unread: Which files are damaged or cut off, each in a sentence.
    """

    folder: Path
    rows: list[dict[str, float]]
    evaluations: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    prediction: dict[str, list[float | None]] = field(default_factory=dict)
    slope: tuple[float, float] | None = None
    rewards: dict[int, Band] = field(default_factory=dict)
    evaluation_seconds: list[float] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run has written its final numbers."""
        return bool(self.metrics)


def is_training(folder: Path) -> bool:
    """Say whether a folder holds a training run, finished or not."""
    return any((folder / name).is_file() for name in TRAINING_FILES)


def read_training(folder: Path) -> TrainingRun:
    """Read what a run has written so far.

    Args:
        folder: Its ``output_dir``.

    Returns:
        The run; steps come from ``steps.jsonl`` if that reaches as far as the journal, else from the journal.
    """
    run = TrainingRun(folder, read_lines(folder / STEPS_FILE))
    run.metrics, run.run = _read_run_file(run, METRICS_FILE), _read_run_file(run, RUN_FILE)
    if run.metrics and not (folder / RUN_FILE).is_file():
        run.unread.append(f"{folder / RUN_FILE} is missing: without it the run can be neither repeated nor continued.")
    if (folder / JOURNAL_FILE).is_file():
        _add_journal(run)
    if run.metrics:
        run.evaluations = run.metrics.get("evaluations", [])
    losses = _json(folder / EVOLUTION).get("losses", {})
    if "expected_loss" in losses:
        run.prediction = {key: losses[key] for key in ("step", "expected_loss", "band_low", "band_high")}
    plan = find_plan(folder)
    if plan is not None:
        slope = plan["plan"].get("slope") or plan["plan"]["gradient_norm"]  # an earlier version wrote no slope
        run.slope = (float(slope["value"]), float(slope["error"])) if slope else None
    return run


def _read_run_file(run: TrainingRun, name: str) -> dict[str, Any]:
    """Return what a file of a run holds; empty if it is not there, or damaged, which is noted."""
    path = run.folder / name
    if not path.is_file():
        return {}
    try:
        return read_run_file(path)
    except UsageError as error:
        run.unread.append(str(error))
        return {}


def _whole_part(run: TrainingRun) -> Journal | None:
    """Return the journal up to where it is damaged, which is noted; None if that is its header."""
    try:
        return Journal.read(run.folder)
    except RunError as error:
        run.unread.append(str(error))
    try:
        return Journal.read(run.folder, up_to_damage=True)
    except RunError:  # its header is damaged, or still being written
        return None


def _check_steps(run: TrainingRun, journal: Journal) -> None:
    """Note that ``steps.jsonl`` or the journal lacks steps that the run has taken."""
    steps = run.metrics.get("steps") or journal.num_steps - 1  # a step is in the journal first
    path, last = run.folder / STEPS_FILE, int(run.rows[-1]["step"]) if run.rows else 0
    if path.is_file() and last < steps:
        run.unread.append(f"{path} is cut off after step {last:,}: the other steps are those of the journal.")
    elif run.metrics and not path.is_file():
        run.unread.append(f"{path} is missing: the steps are those of the journal.")
    if journal.num_steps < steps:
        run.unread.append(f"{journal.path} is cut off: it holds {journal.num_steps:,} of {plural(steps, 'step')}.")


def _add_journal(run: TrainingRun) -> None:
    journal = _whole_part(run)
    if journal is None:
        return
    _check_steps(run, journal)
    if is_rewarded(run.metrics, run.run):
        run.rewards = {record.step + 1: band(record.losses) for record in journal.steps if record.losses}
    header = journal.header
    run.method = str(header.get("method", ""))
    two_point = re.search(r"TwoPoint\(eps=([0-9.e+-]+)", str(header.get("estimator", "")))
    eps = float(two_point.group(1)) if two_point else None
    steps_in_file = {int(row["step"]) for row in run.rows}
    for record in journal.steps:
        if record.step + 1 not in steps_in_file and record.losses:
            run.rows.append(_row(record, eps))
    run.rows.sort(key=lambda row: row["step"])
    for event in journal.events:
        if event.get("event") == "evaluation" and event.get("prefix") == "eval":
            metrics = {
                name.removeprefix("eval_"): value
                for name, value in event["metrics"].items()
                if name.removeprefix("eval_") not in _TIMINGS and isinstance(value, (int, float))
            }
            run.evaluations.append({"step": event["step"], **metrics})
            if "eval_runtime" in event["metrics"]:
                run.evaluation_seconds.append(float(event["metrics"]["eval_runtime"]))


def _row(record: Any, eps: float | None) -> dict[str, float]:
    losses = [loss for loss in record.losses if math.isfinite(loss)]
    row = {
        "step": record.step + 1,
        "loss": sum(losses) / len(losses) if losses else math.nan,
        "learning_rate": record.learning_rates[0],
    }
    if eps and len(record.losses) % 2 == 0:  # both ends of every direction
        slopes = [(a - b) / (2 * eps) for a, b in zip(record.losses[::2], record.losses[1::2], strict=True)]
        row["projected_gradient"] = math.sqrt(sum(slope * slope for slope in slopes) / len(slopes))
    return row


def read_lines(path: Path) -> list[dict[str, float]]:
    """Return the rows of a ``.jsonl`` file; a last line that is still being written is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except UsageError:  # read_run names it if there is nothing else
        return {}
    return content if isinstance(content, dict) else {}


def json_files(folder: Path) -> list[Path]:
    """Return the ``.json`` files of a folder in order; the ending may be in upper case."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() == ".json")


def find_plan(folder: Path) -> dict[str, Any] | None:
    """Return the record of ``zokernel plan`` in a folder, if there is one."""
    for path in json_files(folder):
        record = _json(path)
        if isinstance(record.get("plan"), dict) and "relative_error_one" in record["plan"]:
            return record
    return None
