r"""Where a step's time goes: ``zokernel finetune --profile true``.

After a warm-up, a few steps are timed part by part, and a few more are recorded by torch's profiler.  Every instant
belongs to exactly one part, so the parts add up to the whole: a part's time is its own, without what it calls that is
another part.  Recording slows a step down, so the table is made of steps that were not recorded.

The methods that make up a step are wrapped when the first of these steps begins and put back after the last, so
without a profile nothing is slower.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from zokernel.errors import UsageError
from zokernel.finetune.monitor.step_record import StepRecord

logger = logging.getLogger(__name__)

TRACE_FILE, TABLE_FILE = "profile.json", "profile.md"
WARM_UP, TIMED, TRACED = 2, 5, 2

FORWARDS, PERTURBATION, UPDATE = "forwards", "perturbation", "update"
DATA, JOURNAL, LOGGING, EVALUATION, REST = "data", "journal", "logging", "evaluation and checkpoints", "rest"
MEANING = {
    FORWARDS: "the model and its loss",
    PERTURBATION: "moving the weights to the points of the step, or copying them perturbed",
    UPDATE: "restoring and moving the weights",
    DATA: "fetching, collating and placing batches",
    JOURNAL: "recording the step",
    LOGGING: "rows, bars, TensorBoard and the like",
    EVALUATION: "not part of a step",
    REST: "the loop",
}


class Stopwatch:
    """Shares the time between start and stop out to parts, the innermost one at any instant.

    Attributes:
        seconds: Time of every part so far.

    Example:
        >>> watch = Stopwatch()
        >>> watch.start()
        >>> watch.enter("forwards")
        'forwards'
        >>> watch.leave()
        >>> watch.stop()
        >>> sorted(watch.seconds)
        ['forwards', 'rest']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since: float | None = None

    def start(self) -> None:
        """Start the clock; until a part is entered, time is the rest's."""
        self._since = _now()

    def stop(self) -> None:
        """Stop the clock."""
        self._pass_on()
        self._since = None

    def enter(self, part: str) -> str:
        """Begin a part, inside the one under way, and return it; all that an evaluation does is evaluation."""
        self._pass_on()
        self._open.append(EVALUATION if EVALUATION in self._open else part)
        return self._open[-1]

    def leave(self) -> None:
        """End the part entered last."""
        self._pass_on()
        if self._open:
            self._open.pop()

    def _pass_on(self) -> None:
        if self._since is None:
            return
        now, part = _now(), self._open[-1] if self._open else REST
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


def _now() -> float:
    # Work on an accelerator goes on after the call that began it has returned.
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def check_profile(method: str, *, zeroth_order: bool, max_steps: int) -> None:
    """Refuse a run that cannot be profiled.

    Raises:
        UsageError: If it has too few steps, or follows gradients.
    """
    num_steps = WARM_UP + TIMED + TRACED
    if 0 < max_steps < num_steps:
        raise UsageError(f"profile takes {num_steps} steps: set max_steps {num_steps} or more.")
    if not zeroth_order:
        raise UsageError(f"profile knows the parts of zeroth-order steps, not those of {method}.")


class Profile(TrainerCallback):
    """Writes ``profile.json`` (a Chrome trace) and ``profile.md`` (a table of parts) to a folder.

    Args:
        methods: Returns what makes up a step, as (part, object, name of its method); called before the first step that
            is timed.
        describe: Returns how the run takes a step, for the text above the table.
        folder: Where to write.
        writes: Whether this process writes.
    """

    def __init__(
        self,
        methods: Callable[[], Sequence[tuple[str, Any, str]]],
        describe: Callable[[], str],
        folder: Path,
        *,
        writes: bool,
    ):
        self._methods, self._describe, self._folder, self._writes = methods, describe, folder, writes
        self._watch = Stopwatch()
        self._replayed = False
        self._steps = 0
        self._profiler: profile | None = None
        self._wrapped: list[tuple[Any, str, Any]] = []

    def on_record(self, record: StepRecord) -> None:
        """Note whether the step was taken from the journal, which tells nothing about time."""
        self._replayed = record.replayed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go from warm-up to timing to recording to nothing, at the ends of steps."""
        if self._replayed:
            return
        self._steps += 1
        if self._steps == WARM_UP:
            self._wrap()
            self._watch.start()
        elif self._steps == WARM_UP + TIMED:
            self._watch.stop()
            self._profiler = profile(activities=_activities())
            self._profiler.start()
        elif self._steps == WARM_UP + TIMED + TRACED:
            self._finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn if training ended before the profile was complete."""
        if self._wrapped:
            self._unwrap()
            if self._profiler is not None:
                self._profiler.stop()
        if self._steps < WARM_UP + TIMED + TRACED:
            logger.warning(
                "No profile was written: it takes %d steps, and only %d %s run.",
                WARM_UP + TIMED + TRACED,
                self._steps,
                "was" if self._steps == 1 else "were",
            )

    def _finish(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._unwrap()
        if not self._writes:
            return
        self._profiler.export_chrome_trace(str(self._folder / TRACE_FILE))
        (self._folder / TABLE_FILE).write_text(self.table(), encoding="utf-8")
        own = sum(seconds for part, seconds in self._watch.seconds.items() if part != EVALUATION)
        share = self._watch.seconds.get(FORWARDS, 0.0) / own
        logger.info("Profile: %.0f%% of a step are forwards (%s, %s).", 100 * share, TABLE_FILE, TRACE_FILE)

    def table(self) -> str:
        """Return the parts of a step as Markdown: seconds, and shares of the step without evaluation."""
        seconds = {part: self._watch.seconds.get(part, 0.0) / TIMED for part in MEANING}
        own = sum(value for part, value in seconds.items() if part != EVALUATION)
        lines = [
            "# Where a step's time goes",
            "",
            f"{self._describe()}; {torch.get_num_threads()} CPU threads. "
            f"Means of {TIMED} steps after {WARM_UP} of warm-up; "
            f"`{TRACE_FILE}` shows {TRACED} more (open it in https://ui.perfetto.dev).",
            "",
            "| part | ms per step | share | what |",
            "| --- | --- | --- | --- |",
        ]
        for part, value in seconds.items():
            share = "" if part == EVALUATION else f"{100 * value / own:.1f} %"
            lines.append(f"| {part} | {1e3 * value:.2f} | {share} | {MEANING[part]} |")
        lines.append(f"| **step** | {1e3 * own:.2f} | 100 % | |")
        beside = own / seconds[FORWARDS] - 1 if seconds[FORWARDS] else float("nan")
        lines += ["", f"Beside its forwards a step costs {100 * beside:.1f} % of them."]
        return "\n".join(lines) + "\n"

    def _wrap(self) -> None:
        for part, owner, name in self._methods():
            if hasattr(owner, name):
                self._wrapped.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _unwrap(self) -> None:
        for owner, name, own in self._wrapped:
            delattr(owner, name)
            if own is not None:
                setattr(owner, name, own)
        self._wrapped = []

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            entered = self._watch.enter(part)
            try:
                with nullcontext() if self._profiler is None else record_function(f"zokernel: {entered}"):
                    return method(*args, **kwargs)
            finally:
                self._watch.leave()

        return timed


def _activities() -> list[ProfilerActivity]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return activities
