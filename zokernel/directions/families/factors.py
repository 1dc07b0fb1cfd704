"""Parts of low-rank directions: how a tensor is read as a matrix, and random matrices with streams of their own."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from zokernel.directions.backends import dispatch
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job, Noise

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# Matrices of one buffer begin where 16 bytes can be moved at once, and their sizes count in whole sixteens.
ALIGNMENT = 16


def matrix_shape(shape: Sequence[int], most_square: bool = False) -> tuple[int, int]:
    """Return the matrix that a tensor is read as, row-major.

    Args:
        shape: Shape of a tensor of at least two dimensions.
        most_square: Refold the elements into the most square matrix (thin adapter matrices) instead of joining all
            dimensions after the first.

    Returns:
        Rows and columns.

    Example:
        >>> matrix_shape((8, 576)), matrix_shape((8, 576), most_square=True)
        ((8, 576), (64, 72))
    """
    numel = math.prod(shape)
    if not most_square or numel == 0:
        return shape[0], math.prod(shape[1:])
    rows = next(m for m in range(math.isqrt(numel), 0, -1) if numel % m == 0)
    return rows, numel // rows


class Draw(NamedTuple):
    """A (rows, columns) float32 matrix of a stream.

    Attributes:
        rows: Rows.
        columns: Columns.
        distribution: Distribution of its entries: ``rademacher``, ``gaussian`` or ``uniform``.
        key: Philox key of the stream.
        step: Third counter word.
        number: Fourth counter word.
        device: Where to draw it.
        first: Rows of the stream that come before it.
    """

    rows: int
    columns: int
    distribution: str
    key: tuple[int, int]
    step: int
    number: int
    device: torch.device
    first: int = 0


def draw_matrices(draws: Sequence[Draw], backend: str) -> list[Tensor]:
    """Draw some matrices in one sweep: a model has hundreds, and every sweep has a fixed cost.

    Args:
        draws: What to draw.
        backend: Which backend draws them.

    Returns:
        The matrices, (rows, columns) float32, contiguous.
    """
    sizes = [-(-draw.rows * draw.columns // ALIGNMENT) * ALIGNMENT for draw in draws]
    devices = {draw.device for draw in draws}
    room = {device: sum(size for size, draw in zip(sizes, draws) if draw.device == device) for device in devices}
    free = {device: torch.zeros(size, dtype=torch.float32, device=device) for device, size in room.items()}
    matrices, jobs = [], []
    for size, draw in zip(sizes, draws):
        shape, numel = (draw.rows, draw.columns), draw.rows * draw.columns
        matrix, free[draw.device] = free[draw.device][:numel].view(shape), free[draw.device][size:]
        noise = Noise(draw.distribution, draw.key, draw.step, draw.number)
        jobs.append(Job(Placement("", matrix, matrix, shape, (draw.first, 0)), (noise,), (1.0,)))
        matrices.append(matrix)
    dispatch.sweep(jobs, backend)
    return matrices


class Recent(Generic[K, T]):
    """The last few results of a function, by key: factors are needed three times per step but made once.

    Args:
        size: How many to keep.
    """

    def __init__(self, size: int):
        self.size = size
        self._results: OrderedDict[K, T] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"size": self.size, "_results": OrderedDict()}  # a copy makes its own

    def get(self, key: K, make: Callable[[], T]) -> T:
        """Return the result kept under ``key``, or make and keep it.

        Args:
            key: What it is.
            make: Computes it.

        Returns:
            The result.
        """
        return self.get_all([key], lambda missing: [make()])[0]

    def get_all(self, keys: Sequence[K], make: Callable[[list[K]], Sequence[T]]) -> list[T]:
        """Return the results kept under some keys; those that are not are made together.

        Args:
            keys: What they are.
            make: Computes the results of the keys it is given.

        Returns:
            The results.
        """
        missing = [key for key in dict.fromkeys(keys) if key not in self._results]
        new = dict(zip(missing, make(missing))) if missing else {}
        results = [new[key] if key in new else self._results[key] for key in keys]
        for key in keys:
            if key in new:
                self._results[key] = new[key]
            else:
                self._results.move_to_end(key)
        while len(self._results) > self.size:
            self._results.popitem(last=False)
        return results
