r"""Losses taken by several processes: each evaluates its share of a step's points, and only the losses travel.

Processes form a grid of data ranks times point ranks.  Point ranks see the same batch and share the points of the step
among them; data ranks see different batches, whose losses are averaged.  After one all-gather every process holds the
same numbers in the same order, and so makes the same step, bit for bit: weights and gradients never travel.

Weights may be sharded (FSDP2, tensor parallel): directions are addressed by position in the whole tensor.  FSDP2 must
free the gathered weights after each forward, or the next one would not see the perturbation:
``fully_shard(model, reshard_after_forward=True)``, for the root too.

==============  ==========  ===========  ====================================================
mode            data ranks  point ranks  what W processes do with one step's forwards
==============  ==========  ===========  ====================================================
``data``        W           1            all points on W batches: a W times larger batch
``perturbation``  1         W            each 1/W of the points: the same step, W times sooner
``hybrid``      W / Q       Q            both
==============  ==========  ===========  ====================================================
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zokernel.directions import Directions, Restore
from zokernel.errors import RunError, UsageError
from zokernel.estimators.base import Offsets
from zokernel.perturb.base import Closure, Perturb
from zokernel.perturb.in_place import InPlace, loss_value
from zokernel.perturb.per_example import PerExampleRows

logger = logging.getLogger(__name__)

MODES = ("data", "perturbation", "hybrid")


class Parallel(Perturb):
    """Share the losses of a step among the processes of a group.

    Args:
        mode: ``data``, ``perturbation`` or ``hybrid``.
        inner: How a process takes the losses of its own points; in place when not given.
        point_ranks: Processes that share one batch, in ``hybrid`` mode: a divisor of their number.
        group: Process group of torch.distributed; all processes when not given.
        weight: Returns how many terms the loss of this process's batch is a mean over (examples, or scored tokens).
            Losses of different batches are averaged with these weights, so that they are the loss of all batches
            together; all batches count alike when not given.

    Attributes:
        data_rank: Which of the ``data_ranks`` batches this process sees.
        point_rank: Which of the ``point_ranks`` shares of the points it evaluates.
        bytes_sent: Bytes that this process has sent so far.

    Raises:
        UsageError: If the processes cannot be arranged this way, or torch.distributed has not been started.

    Example:
        >>> import tempfile, zokernel
        >>> rendezvous = f"file://{tempfile.mkdtemp()}/here"
        >>> dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
        >>> weight, parallel = torch.nn.Parameter(torch.ones(3)), Parallel("perturbation")
        >>> optimizer = zokernel.optim.MeZO([weight], lr=0.05, num_perturbations=4, perturb=parallel)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(3)]
        >>> parallel.bytes_sent == 3 * 8 * 8  # three steps, eight float64 losses each
        True
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        mode: str = "data",
        inner: Perturb | None = None,
        *,
        point_ranks: int | None = None,
        group: Any = None,
        weight: Callable[[], float] | None = None,
    ):
        if mode not in MODES:
            raise UsageError(f"There is no parallel mode {mode!r}: choose one of {', '.join(MODES)}.")
        if not dist.is_initialized():
            raise UsageError("torch.distributed is not running: start with torchrun or accelerate launch.")
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        if mode == "hybrid":
            if point_ranks is None or point_ranks < 1 or world % point_ranks:
                raise UsageError(f"hybrid needs a number of point ranks that divides the {world} processes.")
        elif point_ranks not in (None, 1 if mode == "data" else world):
            raise UsageError(f"The number of point ranks is set in hybrid mode only, not with mode={mode!r}.")
        else:
            point_ranks = 1 if mode == "data" else world
        self.mode, self.group, self.weight = mode, group, weight
        self.inner = inner if inner is not None else InPlace()
        self.point_ranks, self.data_ranks = point_ranks, world // point_ranks
        self.data_rank, self.point_rank = divmod(rank, point_ranks)
        self.bytes_sent = 0
        # NCCL only takes tensors that are on the GPU.
        self._device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        self._checked = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of ``inner``: a journal is replayed by one process, which takes no losses."""
        return self.inner.name

    @property
    def restore_mode(self) -> str:  # type: ignore[override]
        """That of ``inner``, which restores the weights."""
        return self.inner.restore_mode

    @property
    def weights(self) -> Restore:  # type: ignore[override]
        """Those that ``inner`` moves."""
        return self.inner.weights

    def attach(
        self, parameters: Mapping[str, Tensor], directions: Directions, *, seed: int, reach: float = 0.01
    ) -> None:
        """Attach ``inner``; see :meth:`Perturb.attach`."""
        self.inner.attach(parameters, directions, seed=seed, reach=reach)

    def release(self) -> None:
        """Release ``inner``; see :meth:`Perturb.release`."""
        self.inner.release()

    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Return the losses at ``points``, each averaged over the data ranks; the same on every process.

        Raises:
            RunError: If the processes did not start from the same weights.
        """
        if not self._checked:
            self.check_same_weights(self.weights.tensors)
            self._checked = True
        if isinstance(self.inner, PerExampleRows):
            return self._example_losses(self.inner, closure, points, step)
        my_points = points[self.point_rank :: self.point_ranks]
        if self.walks_points:
            my_losses = self._losses_along_path(closure, points, step)
        else:
            my_losses = self.inner.losses(closure, my_points, step=step) if my_points else []
        rows = math.ceil(len(points) / self.point_ranks)
        table = self._gather([*my_losses, *[math.nan] * (rows - len(my_losses)), *self._batch_weight()])
        losses = []
        for number in range(len(points)):
            row, share = divmod(number, self.point_ranks)
            column = [table[data_rank * self.point_ranks + share] for data_rank in range(self.data_ranks)]
            if self.weight is None or len({values[-1] for values in column}) == 1:
                losses.append(sum(values[row] for values in column) / self.data_ranks)
            else:
                total = sum(values[-1] for values in column)
                losses.append(sum(values[row] * values[-1] for values in column) / total)
        return losses

    def _example_losses(
        self, inner: PerExampleRows, closure: Closure, points: Sequence[Offsets], step: int
    ) -> list[float]:
        """Return the losses of all processes' examples at the first point, then those at the second, and so on."""
        count = inner.num_examples()
        sizes = self._gather([count, *(self._batch_weight() or [count])])[:: self.point_ranks]
        counts, weights = [int(size[0]) for size in sizes], [size[1] for size in sizes]
        inner.first = sum(counts[: self.data_rank])
        my_points = points[self.point_rank :: self.point_ranks]
        my_losses = inner.losses(closure, my_points, step=step) if my_points else []
        # The mean of a process's own losses is that of its batch; the mean of all is to be that of all batches.
        share = weights[self.data_rank] / count * sum(counts) / sum(weights)
        room = math.ceil(len(points) / self.point_ranks) * max(counts)
        table = self._gather([*(loss * share for loss in my_losses), *[math.nan] * (room - len(my_losses))])
        losses = []
        for number in range(len(points)):
            row, point_rank = divmod(number, self.point_ranks)
            for data_rank, size in enumerate(counts):
                losses += table[data_rank * self.point_ranks + point_rank][row * size : (row + 1) * size]
        return losses

    def _batch_weight(self) -> list[float]:
        return [] if self.weight is None else [float(self.weight())]

    def _losses_along_path(self, closure: Closure, points: Sequence[Offsets], step: int) -> list[float]:
        """Return the losses at this process's points; folded weights round along the path, so all walk all of it."""
        losses = []
        for number, offsets in enumerate(points):
            self.weights.move_to(step, offsets)
            if number % self.point_ranks == self.point_rank:
                losses.append(loss_value(closure()))
        return losses

    def check_same_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Check that all processes hold the same weights, by two sums of each.

        Shards of distributed tensors differ by design and are left out.

        Raises:
            RunError: If they do not.
        """
        sums = [
            float(value)
            for tensor in weights.values()
            if not hasattr(tensor, "to_local")
            for value in (tensor.sum(dtype=torch.float64), tensor.abs().sum(dtype=torch.float64))
        ]
        table = self._gather(sums)
        if any(row != table[0] for row in table):
            raise RunError(
                "The processes hold different weights at the start, so their steps would differ: load the same "
                "checkpoint and set the same seed on every process."
            )

    def _gather(self, values: list[float]) -> list[list[float]]:
        """Return every process's values by rank; all have equally many."""
        local = torch.tensor(values, dtype=torch.float64, device=self._device)
        gathered = [torch.empty_like(local) for _ in range(self.point_ranks * self.data_ranks)]
        dist.all_gather(gathered, local, group=self.group)
        if self._checked:
            self.bytes_sent += 8 * len(values)
        return [row.tolist() for row in gathered]
