"""What a child process of the hub's tests runs: the libraries read their environment when they are imported."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import sys
import time
from typing import Any

_pauses: list[float] = []


def _pause(seconds: float) -> None:
    """Stand in for ``time.sleep``: what a client waits before it asks again is counted instead."""
    _pauses.append(seconds)


def command(arguments: list[str]) -> dict[str, Any]:
    """Run the command line, and return its exit code, its output, and how many seconds it waited to ask again."""
    from zokernel.cli import main

    _pauses.clear()
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            code = main(arguments)
        except SystemExit as left:
            code = left.code
    return {"code": code or 0, "output": output.getvalue(), "waited": sum(_pauses)}


def task_rows(name: str) -> dict[str, Any]:
    """Return how many rows each split of a task has, and which answer goes with the label that a row's text names."""
    from zokernel.finetune.data.datasets import load_task, read_parts
    from zokernel.finetune.settings.arguments import DataArguments

    arguments = DataArguments(task=name)
    task = load_task(arguments)
    parts = read_parts(arguments, task)
    answers: dict[str, str] = {}
    for row in parts["train"]:
        label = re.search(r"says (\d)", " ".join(str(value) for value in row.values()))
        right = task.references(row) if task.kind == "generation" else [task.options(row)[i] for i in task.correct(row)]
        answers[label[1] if label else ""] = " / ".join(right).strip()
    prompt = task.prompt(parts["train"][0])
    return {"counts": {split: len(rows) for split, rows in parts.items()}, "answers": answers, "prompt": prompt}


def import_once() -> None:
    """Import what every case needs, out of the garbage collector's sight: a trainer has it look at all there is."""
    gc.disable()
    import zokernel.commands.finetune
    import zokernel.finetune.trainer.zo_trainer  # noqa: F401

    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    time.sleep = _pause
    import_once()
    results = []
    for case in json.load(sys.stdin):
        if isinstance(case, dict):
            os.environ.update(case)
        else:
            results.append(command(case) if isinstance(case, list) else task_rows(case))
    print("\n" + json.dumps(results))
