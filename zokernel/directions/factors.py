"""Parts of low-rank directions: how a tensor is read as a matrix, and small random matrices with own streams."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from zokernel.directions import engine
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job, Noise

T = TypeVar("T")


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


def draw_matrix(
    rows: int, columns: int, law: str, key: tuple[int, int], step: int, index: int, device: torch.device, backend: str
) -> Tensor:
    """Draw a (rows, columns) float32 matrix from a stream.

    Args:
        rows: Rows.
        columns: Columns.
        law: Law of its entries.
        key: Philox key of the stream.
        step: Third counter word.
        index: Fourth counter word.
        device: Where to draw it.
        backend: Which backend draws it.

    Returns:
        The matrix.
    """
    matrix = torch.zeros(rows, columns, device=device)
    place = Placement("", matrix, matrix, (rows, columns), (0, 0))
    engine.sweep([Job(place, (Noise(law, key, step, index),), (1.0,))], backend)
    return matrix


class Recent(Generic[T]):
    """The last few results of a function, by key: factors are needed three times a step but made once.

    Args:
        size: How many to keep.
    """

    def __init__(self, size: int):
        self.size = size
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result kept under ``key``, or make and keep it.

        Args:
            key: What it is.
            make: Computes it.

        Returns:
            The result.
        """
        if key not in self._kept:
            self._kept[key] = make()
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
