r"""Perturb while the forward runs: each layer reads :math:`\theta + \epsilon z`, made just before it is needed.

Moving the weights in place costs a read and a write of all of them for every loss, as much as a short forward.  Here
the weights stay where they are.  While the model runs, every trained parameter that an operation is about to read is
replaced by a perturbed copy in a small scratch buffer, still in cache when the operation reads it.  Under bf16 autocast
the copy is made in bf16 at once, in place of the conversion that autocast would have made.  What is left of a step
beside its forwards is the update.

Copies are made for a stretch of parameters at a time, in the order in which the first forward used them.  Of embeddings
only the rows looked up are made, of output layers a stretch of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zokernel.directions import Dense, Directions, LowRank, Subspace
from zokernel.directions.placement import Placement, place_all
from zokernel.directions.weights.copy_perturbed import Copier, copy_perturbed_rows, on_gpu
from zokernel.directions.weights.restore import memory_of
from zokernel.errors import RunError, UsageError
from zokernel.estimators.base import Offsets
from zokernel.perturb.base import Closure, Perturb
from zokernel.perturb.in_place import loss_value
from zokernel.perturb.intercept import Intercepted
from zokernel.private_apis import flatten_and_unflatten

_flatten, _unflatten = flatten_and_unflatten()

# Elements of a stretch.  After a matrix product the first part of a copy is slow, so there should be few; but its copy
# takes memory, 16 MiB in bfloat16, and should not fall out of the cache.
STRETCH = 1 << 23
# On a GPU a copy takes less time than starting it does, so there should be as few as this share of the weights allows.
GPU_SHARE = 1 / 32
# Vectors and small matrices of a model are copied once per loss.
SMALL = 1 << 14
# Families whose directions on some rows do not depend on the other rows.
BY_POSITION = (Dense, LowRank, Subspace)
# Operations that autocast runs in low precision, on weights too.
LOW_PRECISION = {F.linear, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.mm, F.conv1d, F.conv2d}


class InForward(Perturb):
    r"""Leave the weights in place and let each layer read :math:`\theta + \epsilon z`, made just before it is needed.

    The closure must use the trained parameters themselves, by torch operations in its own thread: not views or copies
    made before, and no compiled or captured graph.

    Attributes:
        schedule: What is copied when; complete once losses have been taken.

    Raises:
        UsageError: When attached, if the directions or the weights (sharded, strided) cannot be copied this way.
        RunError: When losses are taken, if the closure uses none of the parameters.

    Example:
        >>> import zokernel
        >>> layer, inputs = torch.nn.Linear(3, 1), torch.ones(4, 3)
        >>> optimizer = zokernel.optim.MeZO(layer, lr=0.01, perturb=InForward())
        >>> loss = optimizer.step(lambda: layer(inputs).square().mean())
    """

    name = "in_forward"

    def __init__(self) -> None:
        self.schedule: CopySchedule | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"schedule": None}  # it knows the weights by identity

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.schedule = None if self._parameters is None else CopySchedule(self._parameters)

    def attach(
        self, parameters: Mapping[str, Tensor], directions: Directions, *, seed: int, reach: float = 0.01
    ) -> None:
        """Take these weights, as they are, for the unperturbed ones; see :meth:`Perturb.attach`."""
        if directions.couples_tensors:
            raise UsageError(
                f"{directions!r} gives one tensor directions that depend on the others, and in_forward perturbs a few "
                "tensors at a time: use perturb='in_place'."
            )
        super().attach(parameters, directions, seed=seed, reach=reach)
        if self.schedule is None or not self.schedule.serves(parameters):
            self.schedule = CopySchedule(parameters)

    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Evaluate the closure at each point, with perturbed copies in place of the weights."""
        return self.losses_of([(closure, offsets) for offsets in points], step=step)

    def losses_of(self, requests: Sequence[tuple[Closure, Offsets]], *, step: int) -> list[float]:
        """Return the loss of each closure at a point of its own, as losses of several batches are taken.

        Args:
            requests: Closures, each with the offsets of the directions of the step.
            step: Step of the run.
        """
        seed, schedule = self.weights.seed, self.schedule
        assert schedule is not None
        if not schedule.learned:
            schedule.prepare(self.weights.directions, seed=seed)
        losses = []
        for closure, offsets in requests:
            with Perturbed(schedule, self.weights.directions, Point(offsets, seed, step)):
                losses.append(loss_value(closure()))
            if not schedule.learned:
                schedule.finish()
                schedule.prepare(self.weights.directions, seed=seed)
        return losses


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
        for key in keys:
            name = self.places[key].name
            self.places[key] = place_all({name: self.parameters[name].data})[0]  # which is not intercepted
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


class Perturbed(Intercepted):
    """Context in which operations read perturbed copies of the trained parameters.

    Args:
        schedule: What is copied when.
        directions: The family of random directions.
        point: Where the loss is taken.
    """

    def __init__(self, schedule: CopySchedule, directions: Directions, point: Point):
        super().__init__(schedule.parameters.values(), self.run)
        self.schedule, self.directions, self.point = schedule, directions, point
        self.copies: dict[int, Tensor] = {}
        targets = [torch.empty_like(place.local) for place in schedule.copy_small.places]
        if targets:
            schedule.copy(self.directions, schedule.copy_small, targets, self.point)
        self.fixed = dict(zip(schedule.small, targets))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on perturbed copies of the parameters among its arguments."""
        self.schedule.touched = True
        special = _SPECIAL.get(func)
        if special is not None:
            result = special(self, *args, **kwargs)
            if result is not None:
                return result
        low, places = func in LOW_PRECISION, self.schedule.places
        # Parameters may be in lists, as a recurrent layer's are; mostly they are not.
        nested = bool(kwargs) or any(isinstance(value, (list, tuple, dict)) for value in args)
        values, structure = _flatten((args, kwargs)) if nested else (list(args), None)
        large = [value for value in values if id(value) in places and id(value) not in self.fixed]
        # One stretch is held at a time, so operands that may be of several are set aside.
        clones = {id(value): self.copy(value, low).clone() for value in large} if len(large) > 1 else {}
        read = [clones[id(value)] if id(value) in clones else self.copy(value, low) for value in values]
        args, kwargs = (read, {}) if structure is None else _unflatten(read, structure)
        result = func(*args, **kwargs)
        # A view of the scratch buffer would change under its holder's hands.
        return result.clone() if large and isinstance(result, Tensor) and self._is_scratch(result) else result

    def copy(self, value: Any, low: bool) -> Any:
        """Return the perturbed copy of a trained parameter; anything else as it is."""
        key = id(value)
        if key not in self.schedule.places:
            return value
        if key in self.fixed:
            return self.fixed[key]
        dtype = self.dtype(value, low)
        copy = self.copies.get(key)
        if copy is None or copy.dtype != dtype:
            self._make(key, dtype)
            copy = self.copies[key]
        return copy

    def dtype(self, weight: Tensor, low: bool) -> torch.dtype:
        """Return the type in which an operation reads a weight."""
        device = weight.device.type
        if low and weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            return dtype if dtype == torch.bfloat16 else weight.dtype
        return weight.dtype

    def _make(self, key: int, dtype: torch.dtype) -> None:
        schedule = self.schedule
        if not schedule.learned:
            schedule.used.append((key, dtype))
        is_grouped = schedule.dtypes.get(key) == dtype
        keys = schedule.stretches[schedule.stretch_of[key]] if is_grouped else [key]
        copier = schedule.copier(keys)
        sizes = [place.numel for place in copier.places]
        flat = schedule.buffer(dtype, sum(sizes), copier.places[0].local.device)
        targets = [part.view(place.shape) for part, place in zip(flat.split(sizes), copier.places)]
        schedule.copy(self.directions, copier, targets, self.point)
        # The buffer holds these now, and nothing else of their type.
        self.copies = {k: copy for k, copy in self.copies.items() if copy.dtype != dtype}
        self.copies |= dict(zip(keys, targets))

    def _is_scratch(self, result: Tensor) -> bool:
        address = result.untyped_storage().data_ptr() if result.layout == torch.strided else 0
        return any(copy.untyped_storage().data_ptr() == address for copy in self.copies.values())


def _embedding(mode: Perturbed, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Look up perturbed rows: only those that occur are made."""
    if id(weight) not in mode.schedule.places or id(weight) in mode.fixed:
        return None
    # A GPU makes a row anew wherever it occurs sooner than it tells how many rows there are.
    repeats_rows = on_gpu(mode.directions.backend, weight)
    rows, inverse = (input.reshape(-1), None) if repeats_rows else torch.unique(input, return_inverse=True)
    values = torch.empty(rows.numel(), weight.shape[1], dtype=weight.dtype, device=weight.device)
    mode.schedule.copy_rows(mode.directions, mode.schedule.places[id(weight)], rows, values, mode.point)
    return values.view(*input.shape, -1) if inverse is None else F.embedding(inverse, values)


def _linear(mode: Perturbed, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Multiply by a matrix, which is what models do most; by one larger than a stretch, piece by piece."""
    if id(weight) not in mode.schedule.places or id(input) in mode.schedule.places:
        return None
    if weight.numel() <= mode.schedule.stretch or type(mode.directions) not in BY_POSITION:
        return F.linear(input, mode.copy(weight, low=True), mode.copy(bias, low=True))
    dtype = mode.dtype(weight, low=True)
    mode.copies = {key: copy for key, copy in mode.copies.items() if copy.dtype != dtype}
    pieces = []
    for copier in mode.schedule.pieces(id(weight), max(1, mode.schedule.stretch // weight.shape[1])):
        local = copier.places[0].local
        piece = mode.schedule.buffer(dtype, local.numel(), local.device).view(local.shape)
        mode.schedule.copy(mode.directions, copier, [piece], mode.point)
        pieces.append(F.linear(input, piece))
    result = torch.cat(pieces, -1)
    return result if bias is None else result + mode.copy(bias, low=False)


_SPECIAL: dict[Any, Callable[..., Tensor | None]] = {F.embedding: _embedding, F.linear: _linear}
