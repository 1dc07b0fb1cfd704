r"""Perturbed weights of several copies of a batch, or of its examples: how each differs from the weights themselves.

Small tensors are held K times.  A change of a large matrix is a product of two thin matrices, or one matrix that all
share, flipped by signs: neither takes memory like the weights.

Shapes: K copies, O and I rows and columns of a matrix, R rank of a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zokernel.directions import Directions, Flipout, LowRank
from zokernel.directions.placement import Placement, place_all
from zokernel.directions.terms import Factors
from zokernel.errors import UsageError
from zokernel.estimators.base import Offsets
from zokernel.readable import readable_bytes

# A copy of a tensor with fewer elements is cheaper than looking for its factors.
SMALL = 1 << 16


@dataclass(frozen=True)
class Copies:
    """A tensor's perturbed copies, (K, ...)."""

    copies: Tensor


@dataclass(frozen=True)
class Thin:
    """A matrix and its changes ``left @ right``, (K, O, R) and (K, R, I)."""

    left: Tensor
    right: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Type in which a layer computes with it."""
        return self.left.dtype

    @property
    def nbytes(self) -> int:
        """Memory that the changes take."""
        return self.left.nbytes + self.right.nbytes


@dataclass(frozen=True)
class Flipped:
    """A matrix and its changes: one matrix for all, whose rows (K, O, 1) and columns (K, 1, I) each copy scales.

    Attributes:
        shared: Makes the matrix, (O, I), which is as large as the weights and kept no longer than a layer needs it.
    """

    rows: Tensor
    columns: Tensor
    shared: Callable[[], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Type in which a layer computes with it."""
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Memory that the changes take, without the matrix that they share."""
        return self.rows.nbytes + self.columns.nbytes


Change = Copies | Thin | Flipped


def stackable(
    parameters: Mapping[str, Tensor],
    directions: Directions,
    copies: int,
    max_bytes: int = 1 << 28,
    *,
    points: Sequence[Offsets] = ({0: 1.0},),
) -> bool:
    """Return whether the trained tensors, perturbed, fit into ``max_bytes`` for so many copies.

    Args:
        parameters: Trained tensors by name.
        directions: The family of random directions.
        copies: How many copies there are at a time.
        max_bytes: Bound on what they take.
        points: Points of a step; along one direction each when not given.
    """
    together = [point for point in points if point][:copies]
    size = _size(parameters, _thin(parameters, directions, together, seed=0, step=0), len(together))
    return size * copies <= max_bytes * len(together)


def stack(
    parameters: Mapping[str, Tensor],
    directions: Directions,
    points: Sequence[Offsets],
    max_bytes: int,
    buffers: dict[str, Tensor],
    *,
    seed: int,
    step: int,
) -> dict[int, Change]:
    """Return the perturbed copies of every trained tensor, by its identity; none where no point is perturbed.

    ``buffers`` hold the copies from step to step: sweeps over the same memory are prepared only once.

    Raises:
        UsageError: If they would take more than ``max_bytes``.
    """
    if not any(points):
        return {}
    thin = _thin(parameters, directions, points, seed=seed, step=step)
    remaining = {name: tensor for name, tensor in parameters.items() if name not in thin}
    size = _size(parameters, thin, len(points))
    if size > max_bytes:
        raise UsageError(
            f"{len(points)} perturbed copies take {readable_bytes(size)}, more than {readable_bytes(max_bytes)}: train "
            "an adapter, use low-rank directions (lozo, subzero), or perturb='in_place'."
        )
    copies = {name: _repeat(tensor, len(points), buffers, name) for name, tensor in remaining.items()}
    for k, offsets in enumerate(points):
        at_k = {name: tensor[k] for name, tensor in copies.items()}
        if offsets and at_k:
            directions.add_(at_k, list(offsets.values()), seed=seed, step=step, index=list(offsets))
    by_name: dict[str, Change] = {**thin, **{name: Copies(tensor) for name, tensor in copies.items()}}
    return {id(tensor): by_name[name] for name, tensor in parameters.items()}


def _size(parameters: Mapping[str, Tensor], thin: Mapping[str, Thin | Flipped], copies: int) -> int:
    """Return the bytes of so many perturbed copies: of thin changes, and of the copies of all other tensors."""
    remaining = sum(tensor.nbytes for name, tensor in parameters.items() if name not in thin)
    return copies * remaining + sum(change.nbytes for change in thin.values())


def _repeat(tensor: Tensor, count: int, buffers: dict[str, Tensor], name: str) -> Tensor:
    buffer = buffers.get(name)
    kind = (tensor.shape, tensor.dtype, tensor.device)
    if buffer is None or len(buffer) < count or (buffer.shape[1:], buffer.dtype, buffer.device) != kind:
        buffer = buffers[name] = tensor.new_empty(count, *tensor.shape)
    return buffer[:count].copy_(tensor.detach())


def _thin(
    parameters: Mapping[str, Tensor], directions: Directions, points: Sequence[Offsets], *, seed: int, step: int
) -> dict[str, Thin | Flipped]:
    """Return the changes of large matrices whose directions are low-rank, by name."""
    large = {name: t for name, t in parameters.items() if t.ndim == 2 and t.numel() > SMALL}
    if not large or directions.couples_tensors:
        return {}
    places = [place for place in place_all(large) if tuple(place.local.shape) == place.shape]
    one_each = all(len(offsets) <= 1 for offsets in points)
    if one_each and (isinstance(directions, Flipout) or (isinstance(directions, LowRank) and directions.refresh == 0)):
        return _separate_changes(places, directions, points, seed=seed, step=step)
    drawn: dict[int, dict[str, Factors]] = {}
    for index in sorted({index for offsets in points for index in offsets}):
        terms = directions.terms(places, seed=seed, step=step, index=index)
        drawn[index] = {
            place.name: term
            for place, term in zip(places, terms)
            # Refolded factors are those of another matrix.
            if isinstance(term, Factors) and (term.left.shape[0], term.right.shape[1]) == place.shape
        }
    names = set.intersection(*(set(terms) for terms in drawn.values())) if drawn else set()
    return {
        name: _changes([terms[name] for terms in drawn.values()], list(drawn), points, large[name].dtype)
        for name in names
    }


def _separate_changes(
    places: Sequence[Placement],
    directions: LowRank | Flipout,
    points: Sequence[Offsets],
    *,
    seed: int,
    step: int,
) -> dict[str, Thin | Flipped]:
    """Return changes of which each is along one direction of its own, or none; their parts are drawn once for all."""
    if isinstance(directions, LowRank):
        places = [place for place in places if directions.shape(place.shape)[:2] == place.shape]
    if not places:
        return {}
    device, stored = places[0].local.device, places[0].local.dtype
    low = stored == torch.float32 and torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if low else stored
    indices, offsets = zip(*(next(iter(point.items()), (0, 0.0)) for point in points))
    blocks = (directions.blocks if isinstance(directions, LowRank) else directions.flips)(
        places, seed=seed, step=step, indices=indices, dtype=dtype
    )
    scales = torch.tensor(offsets, device=device)[:, None, None]
    changes: dict[str, Thin | Flipped] = {}
    for place in places:
        left, right = blocks[place.name]
        if isinstance(directions, LowRank):
            changes[place.name] = Thin(left * (scales / math.sqrt(left.shape[2])).to(dtype), right)
        else:
            shared = partial(_as_type, partial(directions.shared, place, seed=seed, step=step), dtype)
            changes[place.name] = Flipped(left * scales.to(dtype), right, shared)
    return changes


def _as_type(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return make().to(dtype)


def _changes(factors: list[Factors], indices: list[int], points: Sequence[Offsets], dtype: torch.dtype) -> Thin:
    # The most directions that one point combines decide the rank; usually that is one.
    width = max(1, *(len(offsets) for offsets in points))
    rank = factors[0].left.shape[1]
    left = factors[0].left.new_zeros(len(points), factors[0].left.shape[0], width * rank)
    right = factors[0].right.new_zeros(len(points), width * rank, factors[0].right.shape[1])
    for k, offsets in enumerate(points):
        for slot, (index, offset) in enumerate(offsets.items()):
            term = factors[indices.index(index)]
            columns = slice(slot * rank, (slot + 1) * rank)
            torch.mul(term.left, offset * term.gain, out=left[k, :, columns])
            right[k, columns] = term.right
    return Thin(left.to(dtype), right.to(dtype))
