"""What in_forward copies when: stretches of weights in the order in which the first forward reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel.directions import Directions
from zokernel.directions.placement import Placement, place_all
from zokernel.directions.weights.copy_perturbed import Copier, copy_perturbed_rows
from zokernel.directions.weights.restore import memory_of
from zokernel.errors import RunError, UsageError
from zokernel.estimators.base import Offsets

# Elements of a stretch.  After a matrix product the first part of a copy is slow, so there should be few; but its copy
# takes memory, 16 MiB in bfloat16, and should not fall out of the cache.
STRETCH = 1 << 23
# On a GPU a copy takes less time than starting it does, so there should be as few as this share of the weights allows.
GPU_SHARE = 1 / 32
# Vectors and small matrices of a model are copied once per loss.
SMALL = 1 << 14


@dataclass(frozen=True)
class Point:
    """Where the losses are taken: offsets along the directions of a step."""

    offsets: Offsets
    seed: int
    step: int


class CopySchedule:
    """Which parameters are copied together, in which type; learned from the first forward.

    Args:
        parameters: Trained parameters by name.

    Raises:
        UsageError: If one of them is sharded or not in memory order.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters = parameters
        self.places: dict[int, Placement] = {}
        self.memory = {id(tensor): memory_of(tensor) for tensor in parameters.values()}
        for name, tensor in parameters.items():
            place = place_all({name: tensor})[0]
            if not place.local.is_contiguous() or tuple(place.local.shape) != place.shape:
                raise UsageError(f"{name} is sharded or not contiguous: use perturb='in_place'.")
            self.places[id(tensor)] = place
        on_gpus = sum(place.numel for place in self.places.values() if place.local.is_cuda)
        self.stretch = max(STRETCH, int(GPU_SHARE * on_gpus))
        self.small = [key for key, place in self.places.items() if place.numel <= SMALL or len(place.shape) < 2]
        self.used: list[tuple[int, torch.dtype]] = []
        self.stretches: list[list[int]] = []
        self.stretch_of: dict[int, int] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self.touched = False
        self.group_of: dict[int, str] = {}  # parameters of different groups are not copied together
        self.copy_small = Copier([self.places[key] for key in self.small])
        self._copiers: dict[tuple[int, ...], Copier] = {}
        self._pieces: dict[tuple[int, int], list[Copier]] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}

    def serves(self, parameters: Mapping[str, Tensor]) -> bool:
        """Return whether these are the parameters, in the memory that they had."""
        return self.memory == {id(tensor): memory_of(tensor) for tensor in parameters.values()}

    @property
    def learned(self) -> bool:
        """Whether a forward has been seen."""
        return bool(self.stretches)

    def prepare(self, directions: Directions, *, seed: int) -> None:
        """Make the tables of all copies before a forward.

        Made one by one between activations, they would split the memory that these leave behind, and each next
        activation would take new memory: 200 MiB in the first forward of SmolLM2.
        """
        for keys in self.stretches or [[key] for key in self.places if key not in self.small]:
            self.copier(keys).prepare(directions, seed=seed)

    def finish(self) -> None:
        """After the first forward, group the large parameters that it used.

        Raises:
            RunError: If it used none of the parameters at all.
        """
        if not self.touched:
            raise RunError(
                "The loss was computed without the trained parameters: the closure must use the very tensors given to "
                "the optimizer, not copies, views or a compiled graph."
            )
        sizes: list[int] = []
        self._copiers.clear()
        for key, dtype in dict(self.used).items():
            size = self.places[key].numel
            last = self.stretches[-1] if self.stretches else []
            fits = bool(last) and self.dtypes[last[0]] == dtype and sizes[-1] + size <= self.stretch
            if not fits or self.group_of.get(last[0]) != self.group_of.get(key):
                self.stretches.append([])
                sizes.append(0)
            self.stretches[-1].append(key)
            sizes[-1] += size
            self.stretch_of[key], self.dtypes[key] = len(self.stretches) - 1, dtype

    def relocate(self, keys: Sequence[int]) -> None:
        """Find parameters in memory again, whose addresses have changed."""
        with torch.DisableTorchFunctionSubclass():  # operations on the parameters are intercepted at the moment
            for key in keys:
                name = self.places[key].name
                self.places[key] = place_all({name: self.parameters[name].data})[0]
        moved = set(keys)
        self._copiers = {copied: copier for copied, copier in self._copiers.items() if moved.isdisjoint(copied)}
        self._pieces = {copied: pieces for copied, pieces in self._pieces.items() if copied[0] not in moved}

    def copier(self, keys: Sequence[int]) -> Copier:
        """Return what copies some parameters together."""
        copier = self._copiers.get(tuple(keys))
        if copier is None:
            copier = self._copiers[tuple(keys)] = Copier([self.places[key] for key in keys])
        return copier

    def pieces(self, key: int, rows: int) -> list[Copier]:
        """Return what copies a matrix ``rows`` rows at a time."""
        if (key, rows) not in self._pieces:
            whole, pieces = self.places[key], []
            for begin in range(0, whole.shape[0], rows):
                local = whole.local[begin : begin + rows]
                place = Placement(whole.name, local, local, whole.shape, (begin, *whole.offset[1:]))
                pieces.append(Copier([place]))
            self._pieces[key, rows] = pieces
        return self._pieces[key, rows]

    def copy(self, directions: Directions, copier: Copier, targets: Sequence[Tensor], point: Point) -> None:
        """Write perturbed copies of some parameters: all copies but those of rows are made here."""
        copier(directions, targets, point.offsets, seed=point.seed, step=point.step)

    def copy_rows(self, directions: Directions, place: Placement, rows: Tensor, target: Tensor, point: Point) -> None:
        """Write perturbed copies of some rows of a parameter: all of those are made here."""
        copy_perturbed_rows(directions, place, rows, target, point.offsets, seed=point.seed, step=point.step)

    def buffer(self, dtype: torch.dtype, size: int, device: torch.device) -> Tensor:
        """Return the scratch buffer of a type, grown if need be."""
        buffer = self._scratch.get(dtype)
        if buffer is None or buffer.numel() < size or buffer.device != device:
            buffer = self._scratch[dtype] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size]
