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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zokernel.directions import Dense, Directions, LowRank, Subspace
from zokernel.directions.weights.copy_perturbed import on_gpu
from zokernel.errors import UsageError
from zokernel.estimators.base import Offsets
from zokernel.perturb.base import Closure, Perturb
from zokernel.perturb.copy_schedule import CopySchedule, Point
from zokernel.perturb.in_place import loss_value
from zokernel.perturb.intercept import Intercepted
from zokernel.private_apis import flatten_and_unflatten

_flatten, _unflatten = flatten_and_unflatten()

# Families whose directions on some rows do not depend on the other rows.
BY_POSITION = (Dense, LowRank, Subspace)
# Operations that autocast runs in low precision, on weights too.
LOW_PRECISION = {F.linear, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.mm, F.conv1d, F.conv2d}


class InForward(Perturb):
    r"""Leave the weights in place and let each layer read :math:`\theta + \epsilon z`, made just before it is needed.

    The closure must use the trained parameters themselves, by torch operations in its own thread: not views or copies
    made before, and no compiled, scripted or captured graph.  :func:`~zokernel.perturb.matches_in_place` tells.

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
        serves = self.schedule is not None and self.schedule.serves(parameters)
        schedule = self.schedule if serves else CopySchedule(parameters)
        super().attach(parameters, directions, seed=seed, reach=reach)
        self.schedule = schedule

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
        return self._kept(result) if large else result

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

    def _kept(self, result: Any) -> Any:
        """Return a result that stays as it is: a view of the scratch buffer would change under its holder's hands."""
        if isinstance(result, Tensor):
            return result.clone() if self._is_scratch(result) else result
        values, structure = _flatten(result)  # several, as of chunk, split and unbind
        return _unflatten([self._kept(value) if isinstance(value, Tensor) else value for value in values], structure)

    def _is_scratch(self, result: Tensor) -> bool:
        address = result.untyped_storage().data_ptr() if result.layout == torch.strided else 0
        return any(copy.untyped_storage().data_ptr() == address for copy in self.copies.values())


def _embedding(
    mode: Perturbed,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor | None:
    """Look up perturbed rows: only those that occur are made."""
    if id(weight) not in mode.schedule.places or id(weight) in mode.fixed or max_norm is not None:
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
    biases = None if bias is None else mode.copy(bias, low=True).expand(len(weight))
    result, end = input, 0
    for copier in mode.schedule.pieces(id(weight), max(1, mode.schedule.stretch // weight.shape[1])):
        local = copier.places[0].local
        piece = mode.schedule.buffer(dtype, local.numel(), local.device).view(local.shape)
        mode.schedule.copy(mode.directions, copier, [piece], mode.point)
        begin, end = end, end + len(piece)
        part = F.linear(input, piece, None if biases is None else biases[begin:end])
        if not begin:  # only now the type is known; a list of parts and their concatenation would be held together
            result = part.new_empty(*part.shape[:-1], weight.shape[0])
        result[..., begin:end] = part
    return result


_SPECIAL: dict[Any, Callable[..., Tensor | None]] = {F.embedding: _embedding, F.linear: _linear}
