"""Run many experiments: skip the finished, go on after a failure, say how long the rest will take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from zokernel.errors import UsageError
from zokernel.experiments.base import Config
from zokernel.experiments.storage import command, load_record, reproduce, same_settings
from zokernel.files import write_text

ERROR_FILE = "error.txt"
LOG_FILE = "log.txt"
_SECONDS_FILE = Path(__file__).with_name("seconds.json")


@dataclass
class Outcome:
    """What became of one experiment.

    Attributes:
        name: The experiment.
        state: ``finished``, ``kept`` (it was finished before) or ``failed``.
        seconds: How long it took; for ``kept``, how long it took then.
        message: The error of a failed one, in one line.
    """

    name: str
    state: str
    seconds: float
    message: str = ""


@dataclass
class Clock:
    """Predicts the time left from the seconds of earlier runs, corrected by how fast this machine has been so far.

    Attributes:
        expected: Seconds by experiment.
        jobs: Experiments run at once.
        finished: (expected, measured) seconds of those finished in this run.

    Example:
        >>> clock = Clock({"a": 10.0, "b": 30.0}, jobs=1)
        >>> clock.finished.append((10.0, 20.0))
        >>> clock.seconds_left(["b"])
        60.0
    """

    expected: dict[str, float]
    jobs: int
    finished: list[tuple[float, float]] = field(default_factory=list)

    def seconds_left(self, names: list[str]) -> float:
        """Return the seconds that ``names`` will still take."""
        expected = [self.expected[name] for name in names]
        before, measured = (sum(column) for column in zip(*self.finished, strict=True)) if self.finished else (1.0, 1.0)
        speed = measured / before if before > 0 else 1.0
        return speed * max(sum(expected) / self.jobs, max(expected, default=0.0))


def expected_seconds(name: str, scale: str, output_dir: Path) -> float:
    """Return how long an experiment is expected to take: as at its last run here, or as measured on two cores.

    Args:
        name: The experiment.
        scale: Its scale.
        output_dir: Where an earlier result may lie.

    Returns:
        Seconds; for a scale that was never measured, a guess from the ``cpu`` scale.
    """
    record = load_record(output_dir / name)
    if record and record["config"]["scale"] == scale:
        return float(record["seconds"])
    measured = json.loads(_SECONDS_FILE.read_text(encoding="utf-8")).get(name, {})
    return float(measured.get(scale, {"smoke": 5.0, "cpu": 60.0, "full": 20 * measured.get("cpu", 60.0)}[scale]))


def plan(names: list[str], config: Config, output_dir: Path, *, overwrite: bool) -> tuple[list[str], list[Outcome]]:
    """Split experiments into those to run and those that are finished.

    Args:
        names: Experiments.
        config: The scale, seed and options wanted.
        output_dir: Where results are.
        overwrite: Run everything again.

    Returns:
        Names to run, and the outcomes of the finished.

    Raises:
        UsageError: If a finished one was run with other settings.
    """
    todo, finished = [], []
    for name in names:
        record = None if overwrite else load_record(output_dir / name)
        if record is None:
            todo.append(name)
        elif same_settings(record, config):
            finished.append(Outcome(name, "kept", float(record["seconds"])))
        else:
            raise UsageError(
                f"{output_dir / name} holds a result with other settings ({record['config']}): choose another "
                "--output_dir, or --overwrite."
            )
    return todo, finished


def run_all(
    names: list[str], config: Config, output_dir: Path, *, jobs: int = 1, report: Callable[[str], None] = print
) -> list[Outcome]:
    """Run experiments, in this process or each in one of its own; a failure is reported and the others go on.

    Args:
        names: Experiments to run.
        config: Scale, seed and options of all of them.
        output_dir: Parent of their folders; ``error.txt`` and ``log.txt`` are written there.
        jobs: How many at once; each process then uses its share of the cores.
        report: Receives a line before and after every experiment.

    Returns:
        One outcome each, in the order in which they ended.
    """
    clock = Clock({name: expected_seconds(name, config.scale, output_dir) for name in names}, jobs)
    outcomes: list[Outcome] = []

    def finish(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.state == "finished":
            clock.finished.append((clock.expected[outcome.name], outcome.seconds))
        names_done = {one.name for one in outcomes}
        remaining = [name for name in names if name not in names_done]
        time_left = f"; about {duration(clock.seconds_left(remaining))} left" if remaining else ""
        text = f"{outcome.seconds:.1f} s" if outcome.state == "finished" else f"FAILED: {outcome.message}"
        report(f"[{len(outcomes)}/{len(names)}] {outcome.name}: {text}{time_left}")

    if names:
        report(f"{len(names)} to run at scale {config.scale}: about {duration(clock.seconds_left(names))}.")
    if jobs == 1:
        for name in names:
            finish(_here(name, config, output_dir))
    else:
        _in_processes(names, config, output_dir, jobs, finish)
    return outcomes


def _here(name: str, config: Config, output_dir: Path) -> Outcome:
    start = time.perf_counter()
    error_file = output_dir / name / ERROR_FILE
    try:
        reproduce(name, config, output_dir)
    except Exception as error:  # one failure must not stop the others
        error_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(error_file, traceback.format_exc())
        return Outcome(name, "failed", time.perf_counter() - start, f"{type(error).__name__}: {error} ({error_file})")
    error_file.unlink(missing_ok=True)
    return Outcome(name, "finished", time.perf_counter() - start)


def _in_processes(
    names: list[str], config: Config, output_dir: Path, jobs: int, finish: Callable[[Outcome], None]
) -> None:
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": share, "NUMBA_NUM_THREADS": share}
    waiting = list(names)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                folder = output_dir / name
                folder.mkdir(parents=True, exist_ok=True)
                words = _words(name, config, output_dir)
                with (folder / LOG_FILE).open("w", encoding="utf-8") as log:
                    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
                running[name] = (process, time.perf_counter())
            for name, (process, start) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    finish(_outcome(name, process.returncode, time.perf_counter() - start, output_dir / name))
            time.sleep(0.05)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()


def _words(name: str, config: Config, output_dir: Path) -> list[str]:
    import shlex

    words = shlex.split(command(name, config))[1:]
    return [sys.executable, "-m", "zokernel", *words, "--output_dir", str(output_dir), "--overwrite"]


def _outcome(name: str, code: int, seconds: float, folder: Path) -> Outcome:
    if code == 0:
        return Outcome(name, "finished", seconds)
    return Outcome(name, "failed", seconds, f"exit code {code}, see {folder / LOG_FILE}")


def duration(seconds: float) -> str:
    """Write a time in words.

    Example:
        >>> duration(40), duration(400), duration(8000)
        ('40 s', '7 min', '2.2 h')
    """
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 3 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
