"""Process groups under torchrun: processes that it has restarted find each other again, and leave when they are done.

torch's agent keeps one store for all restarts.  In it gloo finds the addresses of processes that are gone, and waits
for them.  A name for each restart keeps the restarts apart.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def rejoin() -> None:
    """Form the process group under a name of its own in a process that torchrun has restarted; else do nothing."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts == 0 or not agent_keeps_store or dist.is_initialized():
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(f"restart-{restarts}", store), rank=rank, world_size=size)


def leave() -> None:
    """Close the process group of a finished run: its threads must not outlive the interpreter."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
