"""How the processes of a distributed run share the losses of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list

from zokernel.errors import UsageError
from zokernel.perturb.parallel import MODES, Parallel
from zokernel.private_apis import deal_batches
from zokernel.readable import plural

logger = logging.getLogger(__name__)


def num_processes() -> int:
    """Return how many processes of torch.distributed take part in the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_main(value: Any) -> Any:
    """Return what the main process passed, on every process."""
    return broadcast_object_list([value])[0]


def make_parallel(mode: str | None, point_ranks: int | None, weight: Callable[[], float]) -> Parallel | None:
    """Return how the processes of a distributed run share its losses; None if there is only one.

    Args:
        mode: ``data``, ``perturbation`` or ``hybrid``; None for the default.
        point_ranks: Processes that share one batch, in ``hybrid`` mode.
        weight: Returns how many terms the loss of this process's batch is a mean over.

    Raises:
        UsageError: If the processes cannot be arranged that way.
    """
    if mode not in (None, *MODES):
        raise UsageError(f"zo_parallel must be one of {', '.join(MODES)}, not {mode!r}.")
    if num_processes() == 1:
        if mode is not None:
            logger.info("zo_parallel %s: there is one process only (start more with torchrun).", mode)
        return None
    parallel = Parallel(mode or "data", point_ranks=point_ranks, weight=weight)
    logger.info(
        "%d processes: %s per step, each shared by %d; only losses are exchanged.",
        num_processes(),
        plural(parallel.data_ranks, "batch"),
        parallel.point_ranks,
    )
    return parallel


def true_on_all(holds: bool, device: torch.device) -> bool:
    """Return whether something holds on every process of the run."""
    if num_processes() == 1:
        return holds
    flag = torch.tensor(int(holds), device=device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def share_batches(loader: Any, parallel: Parallel) -> Any:
    """Make processes that share the points of a step read the same batches.

    Raises:
        UsageError: If the loader is not one whose batches are dealt out to processes.
    """
    if not deal_batches(loader, parallel.data_ranks, parallel.data_rank):
        raise UsageError("Training data without a length cannot be shared between processes: use a map-style dataset.")
    return loader
