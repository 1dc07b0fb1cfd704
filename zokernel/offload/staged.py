r"""Weights in host memory, computed with on another device: a block is copied there just before it runs.

The device holds two blocks: the one that runs, and the next, which is copied on a stream of its own meanwhile.  A
trained block makes its updates on the device when it arrives, and is copied back on a third stream, so that a step
moves each block there once and back once.  Weights outside of blocks (embeddings, norms, the head) stay on the device.

Without a GPU the same copies are made one after the other, so that all but the streams can be tested.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from zokernel.offload.store import Memory
from zokernel.offload.units import Unit

ALIGNMENT = 256  # bytes; what vectorized loads of a GPU ask of an address


class Buffer:
    """Room on the device for one block.

    Attributes:
        bytes: Its memory.
        idle: Recorded when the last block in it had run and been copied back.
        filled: Recorded when the block is there.
    """

    def __init__(self, size: int, device: torch.device):
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.idle: list[Any] = []
        self.filled: Any = None


class Staged(Memory):
    """Units in host memory, pinned if the device is a GPU.

    Args:
        device: Where the model computes.
        identity: Says which weights version 0 is.
    """

    moves = True

    def __init__(self, device: torch.device, identity: str = ""):
        super().__init__(identity)
        self.device = device
        streams = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2)]
        self._upload_stream: Any = streams[0]
        self._download_stream: Any = streams[1]
        self._host: dict[str, Tensor] = {}
        self._offsets: dict[str, dict[str, int]] = {}
        self._free: list[Buffer] = []
        self._on_device: dict[str, Buffer] = {}
        self._save_events: dict[str, Any] = {}

    def place(
        self,
        unit: Unit,
        shapes: Mapping[str, tuple[int, ...]],
        load: Callable[[str], Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Load a unit: a block into host memory, anything else onto the device."""
        offsets, size = {}, 0
        for name, shape in shapes.items():
            offsets[name] = size
            size += -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        storage = torch.empty(size, dtype=torch.uint8, device="cpu" if unit.is_block else self.device)
        if unit.is_block and self._upload_stream is not None:
            # pin_memory() would take up to twice the memory: its sizes are powers of two.
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(storage.data_ptr(), size, 0))
            weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, storage.data_ptr()).atexit = False
        unit.tensors = {name: _view(storage, offsets[name], shape, dtype) for name, shape in shapes.items()}
        for name, tensor in unit.tensors.items():
            tensor.copy_(load(name))
        self.versions[unit.name] = 0
        if unit.is_block:
            self._host[unit.name], self._offsets[unit.name] = storage, offsets

    def fetches(self, unit: Unit) -> bool:
        """Whether a unit has to be brought in: blocks are."""
        return unit.is_block

    def fetch(self, unit: Unit) -> None:
        """Begin to copy a block to the device."""
        if unit.name in self._on_device or not unit.is_block:
            return
        if not self._free and not self._on_device:
            size = max(host.numel() for host in self._host.values())
            self._free = [Buffer(size, self.device) for _ in range(2)]
        buffer = self._on_device[unit.name] = self._free.pop()
        host = self._host[unit.name]
        with torch.no_grad(), self._using(self._upload_stream):
            for event in [*buffer.idle, self._save_events.get(unit.name)]:
                if event is not None:
                    self._upload_stream.wait_event(event)
            buffer.bytes[: host.numel()].copy_(host, non_blocking=True)
            buffer.filled = None if self._upload_stream is None else self._upload_stream.record_event()

    def arrive(self, unit: Unit) -> None:
        """Let a block's parameters be those on the device."""
        buffer = self._on_device.get(unit.name)
        if buffer is not None:
            if buffer.filled is not None:
                torch.cuda.current_stream(self.device).wait_event(buffer.filled)
            self._point_to(unit, buffer.bytes)

    def leave(self, unit: Unit) -> None:
        """Let a block's parameters be those in host memory."""
        buffer = self._on_device.pop(unit.name, None)
        if buffer is None:
            return
        self._point_to(unit, self._host[unit.name])
        if self._upload_stream is not None:
            # What was copied there and never ran may still be on its way.
            buffer.idle = [
                buffer.filled,
                torch.cuda.current_stream(self.device).record_event(),
                self._save_events.get(unit.name),
            ]
        self._free.append(buffer)

    def keep(self, unit: Unit) -> None:
        """Make the updates of a unit, and wait until host memory has them."""
        if self.versions[unit.name] < self.updates.newest and self.updates.names(unit):
            self.fetch(unit)
            self.arrive(unit)
        self.settle(unit)
        self.leave(unit)
        if self._save_events.get(unit.name) is not None:
            self._save_events[unit.name].synchronize()

    def _make(self, unit: Unit, names: Mapping[str, str], version: int) -> None:
        super()._make(unit, names, version)
        if not unit.is_block:
            return
        host, buffer = self._host[unit.name], self._on_device[unit.name]
        with torch.no_grad(), self._using(self._download_stream):
            if self._download_stream is not None:
                self._download_stream.wait_event(torch.cuda.current_stream(self.device).record_event())
            host.copy_(buffer.bytes[: host.numel()], non_blocking=True)
            stream = self._download_stream
            self._save_events[unit.name] = None if stream is None else stream.record_event()
        self.bytes_written += unit.nbytes

    def _point_to(self, unit: Unit, storage: Tensor) -> None:
        with torch.DisableTorchFunctionSubclass():  # operations on the parameters may be intercepted at the moment
            for name, parameter in unit.tensors.items():
                parameter.data = _view(storage, self._offsets[unit.name][name], tuple(parameter.shape), parameter.dtype)

    def _using(self, stream: Any) -> Any:
        return nullcontext() if stream is None else torch.cuda.stream(stream)


def _view(storage: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return storage[offset : offset + size].view(dtype).view(shape)
