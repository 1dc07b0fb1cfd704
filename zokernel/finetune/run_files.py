"""What a run leaves in its folder, by name; its journal is :data:`zokernel.journal.reader.FILE_NAME`."""

from __future__ import annotations

RUN_FILE = "run.json"  # command line and settings, from when the run begins
STEPS_FILE = "steps.jsonl"  # one line per step
METRICS_FILE = "metrics.json"  # the final numbers: it says that the run is finished
LAST_GOOD = "last-good"  # the folder of the weights before a loss that was not finite
