"""The log of a run: one row per step, in memory and in ``steps.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

from zokernel.files import write_text
from zokernel.finetune.monitor.step_record import StepRecord
from zokernel.finetune.run_files import STEPS_FILE

Row = dict[str, float]


class RunLog(TrainerCallback):
    """Keeps one row per step: loss, projected gradient, and the forwards and seconds so far.

    Args:
        writes: Whether this process writes ``steps.jsonl``.

    Attributes:
        rows: The rows so far; always the same list.
        seconds: Seconds of all steps, without evaluations between them.
        forwards: Forward passes of all steps.
        replayed: Whether the last step was taken from the journal.
        earlier_seconds: Seconds of steps that earlier processes of the run took.
    """

    def __init__(self, *, writes: bool):
        self._folder, self._writes = Path(), writes
        self.rows: list[Row] = []
        self.seconds = 0.0
        self.forwards = 0
        self.replayed = False
        self.earlier_seconds = 0.0
        self._seconds_at: dict[int, float] = {}
        self._has_saved = False

    def begin(self, folder: Path, step: int, *, continues: bool) -> None:
        """Keep the rows of the steps already taken.

        Args:
            folder: Where ``steps.jsonl`` is.
            step: How many steps the weights have taken.
            continues: Whether an earlier process's run is continued.
        """
        self._folder = folder
        earlier_rows = read_rows(self._folder / STEPS_FILE) if continues else []
        self._seconds_at = {int(row["step"]): row["seconds"] for row in earlier_rows}
        self.earlier_seconds = earlier_rows[-1]["seconds"] if earlier_rows else 0.0
        self.rows[:] = [row for row in earlier_rows if row["step"] <= step]
        self.forwards = int(self.rows[-1]["forwards"]) if self.rows else 0
        self.seconds = self.rows[-1]["seconds"] if self.rows else 0.0
        self._has_saved = False

    def on_record(self, record: StepRecord) -> None:
        """Append a row."""
        self.replayed = record.replayed
        if record.replayed:
            self.seconds = self._seconds_at.get(record.step, self.seconds)
        else:
            self.seconds += record.seconds
        self.forwards += record.forwards
        row: Row = {
            "step": record.step,
            "forwards": self.forwards,
            "seconds": round(self.seconds, 3),
            "loss": record.loss,
        }
        if record.projected_gradient is not None:
            row["projected_gradient"] = record.projected_gradient
        if record.bytes_sent is not None:
            row["bytes_sent"] = record.bytes_sent
        self.rows.append(row)
        if self._writes and not record.replayed:
            self._write(row)

    def _write(self, row: Row) -> None:
        if not self._has_saved:
            # What an earlier process wrote after the last whole step is replaced.
            self.save()
            self._has_saved = True
            return
        with (self._folder / STEPS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def forwards_at(self, step: float) -> int:
        """Return how many forwards had been used after ``step`` steps."""
        return next((int(row["forwards"]) for row in reversed(self.rows) if row["step"] <= step), 0)

    def forwards_per_second(self) -> float:
        """Return the forwards per second of training."""
        return self.forwards / max(self.seconds, 1e-9)

    def save(self) -> None:
        """Write all rows to ``steps.jsonl``."""
        write_text(self._folder / STEPS_FILE, "".join(json.dumps(row) + "\n" for row in self.rows))

    def annotate(self, logs: dict[str, float]) -> None:
        """Add forwards and the projected gradient to what the Trainer is about to log, for the gradient's norm."""
        if "loss" not in logs or not self.rows:
            return
        recent = [row["projected_gradient"] for row in self.rows[-10:] if "projected_gradient" in row]
        if recent:
            logs["projected_gradient"] = sum(recent) / len(recent)
            logs.pop("grad_norm", None)
        logs["forwards"] = self.forwards
        logs["forwards_per_second"] = round(self.forwards_per_second(), 2)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a ``steps.jsonl``, up to a line that was torn by a crash."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
