"""How far a run is: steps done and to do, the time left, and whether it still goes on."""

from __future__ import annotations

import math
import os
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from zokernel.finetune.run_files import METRICS_FILE, RUN_FILE, STEPS_FILE
from zokernel.finetune.storage.lock import holder
from zokernel.journal.reader import FILE_NAME as JOURNAL_FILE
from zokernel.readable import readable_seconds
from zokernel.reporting.training import TrainingRun

RECENT_STEPS = 50  # whose median time is that of the steps to come
QUIET = 60.0  # seconds in which nothing was written that are worth a word
SEEN = 10.0  # seconds after the last write for which a run whose process is not there may be that of another machine
_LOST_END = {
    "missing": f"{METRICS_FILE}, which says that the run has finished, is missing: the same command writes it",
    "damaged": f"{METRICS_FILE} is damaged: remove it, and the same command writes it again",
}


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        state: ``waiting``, ``running``, ``finished``, ``stopped`` (it ended before its last step) or ``died`` (its
            process was killed).
        steps: Steps done.
        total: Steps in all; None if the folder does not say.
        seconds: Seconds of the steps done; None if they were not recorded.
        seconds_left: Estimated seconds to the end; None if nothing is known, or nothing is left.
        quiet: Seconds since something was written, if a running run has been silent for long.
        lost_end: What is wrong with the file that says that a run has finished, if all of its steps are taken:
            ``missing`` or ``damaged``.
        error: The error that stopped the run, in a sentence; empty if none is known.
    """

    state: str
    steps: int
    total: int | None
    seconds: float | None = None
    seconds_left: float | None = None
    quiet: float | None = None
    lost_end: str = ""
    error: str = ""

    @property
    def percent(self) -> int | None:
        """Whole percent of the steps that are done.

        Example:
            >>> Progress("running", 126, 300).percent, Progress("running", 126, None).percent
            (42, None)
        """
        return min(100, 100 * self.steps // self.total) if self.total else None

    def title(self, name: str) -> str:
        """Return a page title that says how far which run is.

        Example:
            >>> Progress("running", 126, 300).title("runs/reviews")
            '42 % · runs/reviews'
            >>> Progress("died", 126, None).title("runs/reviews")
            'died at step 126 · runs/reviews'
        """
        position = f"step {self.steps:,}" if self.percent is None else f"{self.percent} %"
        if self.state in ("waiting", "finished"):
            return f"{self.state} · {name}"
        return f"{position} · {name}" if self.state == "running" else f"{self.state} at {position} · {name}"

    @property
    def steps_done(self) -> str:
        """The steps done, of how many.

        Example:
            >>> Progress("running", 1260, 3000).steps_done, Progress("running", 7, None).steps_done
            ('1,260 of 3,000', '7 of an unknown number')
        """
        return f"{self.steps:,} of " + ("an unknown number" if self.total is None else f"{self.total:,}")

    @property
    def time_left(self) -> str:
        """The time left, or why there is none.

        Example:
            >>> Progress("running", 126, 300, seconds_left=93.4).time_left, Progress("died", 126, 300).time_left
            ('about 1 min 33 s', 'none: the run died')
            >>> Progress("stopped", 300, 300, lost_end="missing").time_left
            'none: metrics.json is missing'
        """
        if self.lost_end:
            return f"none: {METRICS_FILE} is {self.lost_end}"
        if self.state == "running" and self.seconds_left is not None:
            return f"about {readable_seconds(self.seconds_left)}"
        if self.state == "running":
            return "not known: no number of steps was noted" if self.total is None else "not known yet"
        return {"waiting": "not known yet", "finished": "none"}.get(self.state, f"none: the run {self.state}")

    @property
    def description(self) -> str:
        """What the run is doing, in a sentence or two.

        Example:
            >>> Progress("died", 126, 300).description
            'The run died after step 126 of 300: its process is gone. The same command continues it.'
            >>> Progress("stopped", 300, 300, lost_end="damaged").description
            'All steps are taken (300), but metrics.json is damaged: remove it, and the same command writes it again.'
        """
        end = f"with an error: {self.error} Once that is mended, the" if self.error else "before its end. The"
        at = f"{self.steps:,}" + ("" if self.total is None else f" of {self.total:,}")
        if self.lost_end:
            return f"All steps are taken ({self.steps:,}), but {_LOST_END[self.lost_end]}."
        description = {
            "waiting": "Waiting for the run to begin.",
            "finished": "The run has finished.",
            "running": f"Running: step {at}.",
            "stopped": f"The run stopped after step {at}, {end} same command continues it.",
            "died": f"The run died after step {at}: its process is gone. The same command continues it.",
        }[self.state]
        return (
            description
            if self.quiet is None
            else f"{description} Nothing was written for {readable_seconds(self.quiet)}."
        )


def progress_of(run: TrainingRun | None, *, now: float | None = None) -> Progress:
    """Return how far a run is.

    The time of a step to come is the median of the last ones, that of an evaluation the median of those so far.

    Args:
        run: What its folder tells; None if it holds nothing yet.
        now: Seconds since 1970; the present if not given.
    """
    if run is None:
        return Progress("waiting", 0, None)
    steps = int(run.rows[-1]["step"]) if run.rows else 0
    total = int(run.metrics["steps"]) if run.finished else total_steps(run.run)
    times = [row["seconds"] for row in run.rows if "seconds" in row]
    seconds = times[-1] if times else None
    if run.finished:
        return Progress("finished", steps, total, seconds)
    silence = (time.time() if now is None else now) - _last_written(run.folder)
    step_seconds = seconds_per_step(run.rows)
    usual_silence = max(20 * (step_seconds or 0.0), 3 * max(run.evaluation_seconds, default=0.0))
    process = holder(run.folder)
    if process is None:
        error = str(run.run.get("stopped_by", ""))
        return Progress("stopped", steps, total, seconds, lost_end=_lost_end(run, steps, total), error=error)
    if not _is_alive(process) and silence > max(SEEN, usual_silence):
        return Progress("died", steps, total, seconds, lost_end=_lost_end(run, steps, total))
    seconds_left = None
    if total is not None and step_seconds is not None:
        seconds_left = max(0, total - steps) * step_seconds + _evaluations_left(run, steps, total)
    return Progress(
        "running", steps, total, seconds, seconds_left, silence if silence > max(QUIET, usual_silence) else None
    )


def _lost_end(run: TrainingRun, steps: int, total: int | None) -> str:
    """Return what is wrong with the file that says that a run has finished; empty if nothing is, or steps are left."""
    if (run.folder / METRICS_FILE).is_file():
        return "damaged"
    return "" if total is None or steps < total else "missing"


def total_steps(run: dict[str, Any]) -> int | None:
    """Return the steps that a run will have taken when it ends; None if ``run.json`` does not say.

    Example:
        >>> total_steps({"total_steps": 300}), total_steps({"settings": {"max_steps": 20}}), total_steps({})
        (300, 20, None)
    """
    if isinstance(run.get("total_steps"), int) and run["total_steps"] > 0:
        return int(run["total_steps"])
    settings = run.get("settings")  # of a run that an earlier version wrote
    max_steps = settings.get("max_steps") if isinstance(settings, dict) else None
    return max_steps if isinstance(max_steps, int) and max_steps > 0 else None


def seconds_per_step(rows: list[dict[str, float]]) -> float | None:
    """Return the median time of the last steps; None if no times were recorded.

    Example:
        >>> seconds_per_step([{"step": 1, "seconds": 9.0}, {"step": 2, "seconds": 9.5}, {"step": 4, "seconds": 10.7}])
        0.55
    """
    times = [(row["step"], row["seconds"]) for row in rows[-RECENT_STEPS - 1 :] if "seconds" in row]
    durations = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(times) if b[0] > a[0] and b[1] >= a[1]]
    return round(statistics.median(durations), 9) if durations else times[0][1] / times[0][0] if times else None


def _evaluations_left(run: TrainingRun, steps: int, total: int) -> float:
    """Return the seconds of the evaluations to come, as far as the settings say when they are."""
    settings = run.run.get("settings") or {}
    interval = settings.get("eval_steps")
    if settings.get("eval_strategy") != "steps" or not interval or not run.evaluation_seconds:
        return 0.0
    interval = math.ceil(interval * total) if interval < 1 else int(interval)
    return (total // interval - steps // interval) * statistics.median(run.evaluation_seconds)


def _last_written(folder: Path) -> float:
    """Return when one of the files that a run writes was last changed, in seconds since 1970."""
    paths = [folder / name for name in (STEPS_FILE, RUN_FILE, JOURNAL_FILE)]
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


def _is_alive(process: int) -> bool:
    """Return whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
