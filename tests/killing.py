"""Runs of the command line in processes of their own, to be killed."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

from forked import context

# Every way in which a run changes a file.
WRITES = ("write", "ftruncate", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def start(argv: list[str], log: Path, *, die_at_write: int | None = None) -> Any:
    """Start ``zokernel argv`` in a fresh process; with ``die_at_write``, it dies before its n-th file operation."""
    process = context().Process(target=run, args=(argv, str(log), die_at_write, os.environ["ZOKERNEL_HOME"]))
    process.start()
    return process


def run(argv: list[str], log: str, die_at_write: int | None, home: str) -> None:
    """Be the process of ``zokernel argv``, which ends with its exit code; its output is added to the file ``log``."""
    import torch

    from zokernel.cli import main

    torch.set_num_threads(1)
    os.environ["ZOKERNEL_HOME"] = home  # the server has the environment in which it was started
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if die_at_write is not None:
        _count_down(die_at_write)
    sys.exit(main(argv))


def _count_down(count: int) -> None:
    left = [count]

    def dying(operation: Any) -> Any:
        @functools.wraps(operation)
        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if operation.__name__ == "write" and len(args[1]) > 3:
                    operation(args[0], bytes(args[1])[: len(args[1]) // 2])  # a torn write
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return counted

    for name in WRITES:
        setattr(os, name, dying(getattr(os, name)))
