"""Run a function in several processes of torch.distributed, each of which ends at once when it is done."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import context


def spawn(function: Callable[..., None], *args: Any, size: int) -> None:
    """Call ``function(rank, *args)`` in ``size`` processes and raise what any of them raises."""
    context()
    mp.start_processes(_run, (function, args), nprocs=size, start_method="forkserver")


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a process of one machine about itself."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def command(argv: list[str], folder: Path, *, size: int) -> tuple[str, str]:
    """Run ``zokernel argv`` in ``size`` fresh processes, as torchrun does, and return their two streams.

    Args:
        argv: The words of the command.
        folder: Where the output is collected; it need not exist.
        size: The number of processes.
    """
    folder.mkdir(parents=True)
    rest = (free_port(), argv, folder, os.environ["ZOKERNEL_HOME"])
    processes = [context().Process(target=_command, args=(rank, size, *rest)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return (folder / "stdout").read_text(), (folder / "stderr").read_text()


def _command(rank: int, size: int, port: int, argv: list[str], folder: Path, home: str) -> None:
    from zokernel.cli import main

    os.environ.update(environment(rank, size, port), ZOKERNEL_HOME=home)
    torch.set_num_threads(1)  # torchrun's OMP_NUM_THREADS, which this process would read too late
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.exit(main(argv))


def _run(rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    function(rank, *args)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Caches of distributed tensors keep gloo's threads alive, and one of them that drops a tensor while the interpreter
    # shuts down aborts the process, after all it had to do was done.
    os._exit(0)
