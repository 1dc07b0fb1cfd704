r"""Where a tensor's elements are: in memory, and in the whole tensor that directions are defined on.

A direction is a function of an element's *position*: its row-major index in the whole, unsharded tensor.  Positions are
64-bit.  Memory may be laid out differently (transposed, sliced, one shard of a distributed tensor), so a placement
lists *runs*: stretches along which both position and memory address advance evenly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.private_apis import shard_offset

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Runs:
    """Stretches of equal length.

    Attributes:
        memory: (k,) int64, element offset of each stretch from the tensor's first element.
        position: (k,) int64, position of its first element in the whole tensor.
        local: (k,) int64, row-major index of its first element among those held here.
        length: Elements in each stretch; positions advance by one.
        stride: Memory elements from one to the next.
    """

    memory: np.ndarray
    position: np.ndarray
    local: np.ndarray
    length: int
    stride: int


@dataclass(slots=True)
class Placement:
    """One tensor to work on.

    Attributes:
        name: Its name, which keys its stream.
        tensor: The tensor itself, detached.
        local: The elements held by this process, a plain tensor sharing the weights' memory.
        shape: Shape of the whole tensor.
        offset: Index in the whole tensor of the first local element.
    """

    name: str
    tensor: Tensor
    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def is_rows(self) -> bool:
        """Whether the local elements are whole rows of the tensor, in memory order."""
        return self.local.is_contiguous() and tuple(self.local.shape[1:]) == self.shape[1:]

    @property
    def runs(self) -> Runs:
        """The stretches that cover the local elements, in row-major order."""
        return find_runs(tuple(self.local.shape), self.local.stride(), self.shape, self.offset)

    def positions(self, begin: int, end: int) -> Tensor:
        """Return the positions of local elements ``begin`` to ``end`` (row-major), int64 on the tensor's device."""
        index = torch.arange(begin, end, device=self.local.device)
        position = torch.zeros_like(index)
        unit = 1
        for size, whole, start in zip(reversed(self.local.shape), reversed(self.shape), reversed(self.offset)):
            position += (index % size + start) * unit
            index = index // size
            unit *= whole
        return position


@lru_cache(maxsize=4096)
def find_runs(size: tuple[int, ...], stride: tuple[int, ...], whole: tuple[int, ...], offset: tuple[int, ...]) -> Runs:
    """Cover a strided box of a larger tensor by as few runs as possible.

    Args:
        size: Shape of the box.
        stride: Memory strides of the box, in elements.
        whole: Shape of the tensor that the box is part of.
        offset: Index of the box's first element in that tensor.

    Returns:
        The runs, in row-major order of the box; remembered, so not to be changed.

    Example:
        >>> find_runs((3, 4), (4, 1), (3, 4), (0, 0)).length
        12
        >>> find_runs((3, 2), (2, 1), (3, 4), (0, 2)).position.tolist()
        [2, 6, 10]
    """
    units = [1]
    for extent in reversed(whole[1:]):
        units.insert(0, units[0] * extent)
    units = units[: len(whole)] if whole else []
    start = sum(o * u for o, u in zip(offset, units))
    dims = [(n, s, u) for n, s, u in zip(size, stride, units) if n != 1]
    if math.prod(size) == 0:
        empty = np.zeros(0, np.int64)
        return Runs(empty, empty, empty, 0, 1)

    length, step = 1, 1
    if dims and dims[-1][2] == 1:
        length, step, _ = dims.pop()
        while dims and dims[-1][1] == step * length and dims[-1][2] == length:
            length *= dims.pop()[0]

    memory = position = np.zeros(1, np.int64)
    for n, s, u in dims:
        along = np.arange(n, dtype=np.int64)
        memory = (memory[:, None] + along * s).ravel()
        position = (position[:, None] + along * u).ravel()
    local = np.arange(memory.size, dtype=np.int64) * length
    return Runs(memory, position + start, local, length, step)


def place(name: str, tensor: Tensor) -> Placement:
    """Find where one tensor's elements are.

    Args:
        name: Its name.
        tensor: A strided floating-point tensor, or a DTensor of which this process holds a shard.

    Returns:
        Its placement.

    Raises:
        UsageError: If the tensor is not a float tensor, overlaps itself, or is a DTensor with partial values.
    """
    offset: tuple[int, ...] = (0,) * tensor.dim()
    shape = tuple(tensor.shape)
    tensor = local = tensor.detach()
    if type(tensor) is not Tensor and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh"):
        local, offset = _local_shard(name, tensor)
    if local.dtype not in DTYPES or local.layout != torch.strided:
        raise UsageError(
            f"Tensor {name!r} is {local.dtype} ({local.layout}): directions need dense float32, float64, bfloat16 or "
            "float16 weights, so freeze quantized or integer tensors."
        )
    if _overlaps_itself(local):
        raise UsageError(f"Elements of tensor {name!r} share memory (an expanded view): make it contiguous first.")
    return Placement(name, tensor, local, shape, offset)


def place_all(tensors: Mapping[str, Tensor]) -> list[Placement]:
    """Place every tensor, once each: a second name of the same memory (tied weights) is dropped.

    Args:
        tensors: Tensors by name.

    Returns:
        Placements in the mapping's order.

    Raises:
        UsageError: If two tensors overlap without being the same, since their shared elements would move twice.
    """
    places: list[Placement] = []
    by_storage: dict[int, list[tuple[int, int, Placement]]] = {}
    for name, tensor in tensors.items():
        placement = place(name, tensor)
        if placement.local.numel() and placement.local.device.type != "meta":
            sharing = by_storage.setdefault(placement.local.untyped_storage().data_ptr(), [])
            begin, end = _reach(placement.local)
            # Weights cut from one buffer are many, and lie one after the other.
            if _is_tied(placement, [other for first, last, other in sharing if first < end and begin < last]):
                continue
            sharing.append((begin, end, placement))
        places.append(placement)
    return places


def pieces(place: Placement, begin: int, end: int) -> list[Placement]:
    """Return the local elements at positions ``begin`` to ``end``, as parts of that stretch read as a vector.

    Args:
        place: A tensor, whole or a shard, in any memory layout.
        begin: First position in the whole tensor.
        end: Position after the last.

    Returns:
        One vector per run, sharing the tensor's memory; its offset counts from ``begin``.

    Example:
        >>> columns = torch.arange(12.0).view(3, 4)[:, 2:]
        >>> shard = Placement("w", columns, columns, (3, 4), (0, 2))
        >>> [(piece.offset, piece.local.tolist()) for piece in pieces(shard, 3, 8)]
        [((0,), [3.0]), ((3,), [6.0, 7.0])]
    """
    runs, parts = place.runs, []
    first = place.local.storage_offset()
    for memory, position in zip(runs.memory.tolist(), runs.position.tolist()):
        low, high = max(position, begin), min(position + runs.length, end)
        if low < high:
            start = first + memory + (low - position) * runs.stride
            local = place.local.as_strided((high - low,), (runs.stride,), start)
            parts.append(Placement(place.name, local, local, (end - begin,), (low - begin,)))
    return parts


def _local_shard(name: str, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    if any(placement.is_partial() for placement in tensor.placements):
        raise UsageError(f"DTensor {name!r} holds partial sums: redistribute it to Shard or Replicate first.")
    shard: Tensor = cast(DTensor, tensor).to_local()
    return shard, shard_offset(tensor)


def _is_tied(placement: Placement, sharing: list[Placement]) -> bool:
    for other in sharing:
        if _same_memory(placement.local, other.local):
            logger.debug("%s is tied to %s and moves with it", placement.name, other.name)
            return True
        if _overlap(placement.local, other.local):
            raise UsageError(
                f"Tensors {other.name!r} and {placement.name!r} share some of their memory: pass only one of them."
            )
    return False


def _reach(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses between which a tensor's elements lie (torch has no negative strides)."""
    begin = tensor.data_ptr()
    last = sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())])
    return begin, begin + (last + 1) * tensor.element_size()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride()) if n != 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


class _Extent:
    """The addresses of a tensor, in the form that NumPy's exact overlap test reads; memory is never touched."""

    def __init__(self, tensor: Tensor):
        width = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(s * width for s in tensor.stride()),
            "typestr": f"|V{width}",
        }


def _overlap(a: Tensor, b: Tensor) -> bool:
    return bool(np.shares_memory(np.asarray(_Extent(a)), np.asarray(_Extent(b))))
