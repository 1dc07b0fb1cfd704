"""Run a function in several processes of torch.distributed, each of which ends at once when it is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp
from forked import context


def spawn(function: Callable[..., None], *args: Any, size: int) -> None:
    """Call ``function(rank, *args)`` in ``size`` processes and raise what any of them raises."""
    context()
    mp.start_processes(_run, (function, args), nprocs=size, start_method="forkserver")


def _run(rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    function(rank, *args)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Caches of distributed tensors keep gloo's threads alive, and one of them that drops a tensor while the interpreter
    # shuts down aborts the process, after all it had to do was done.
    os._exit(0)
