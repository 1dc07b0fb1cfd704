r"""The weighted iterate average of KerZOO's Algorithm 1, with or without storing it.

.. math:: \theta^{ag}_{t+1} = \tfrac{1}{\beta_t}\theta_{t+1} + (1 - \tfrac{1}{\beta_t})\,\theta^{ag}_t, \qquad
    \beta_t = 1 + t/6

Stored averages keep the *offset* :math:`D = \theta^{ag} - \theta`.  It is a hundred times smaller than the weights, so
eight bits resolve it where they could not resolve the average itself, and moving the weights to
:math:`\theta^{md} = \theta + (1 - 1/\beta) D` and back loses nothing to cancellation.  A step
:math:`\theta' = d\,\theta + u + k\,\theta_0` gives

.. math:: D' = (1 - \tfrac{1}{\beta}) \left(D + \theta - \theta'\right), \qquad \theta = (\theta' - u - k\theta_0) / d,

where :math:`u = \sum_i scale_i z_i` is regenerated.  The journal stores no tensor at all: every iterate is an affine
function of the last one and of the seeded directions, so the average is too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from zokernel.directions.backends import dispatch
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job, Noise
from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.optim.affine_move import AffineMove
from zokernel.optim.trained import Trained
from zokernel.optim.updates.averaging.int8_blocks import BLOCK, CHUNK, dequantize, quantize_
from zokernel.optim.updates.averaging.iterate_weights import (
    average_weight,
    coefficients_from_first,
    coefficients_from_last,
)
from zokernel.optim.updates.base import Update

TERMS_PER_SWEEP = 48


class IterateAverage(Update):
    """Keeps the averaged iterate of a run; the weights themselves go their own way."""

    def after_move(self, trained: Trained, estimate: Estimate, moves: Sequence[AffineMove]) -> Sequence[AffineMove]:
        """Take a step into account, after the weights have moved."""
        raise NotImplementedError

    def offset(self, trained: Trained, names: Sequence[str]) -> dict[str, Tensor]:
        r"""Return :math:`\theta^{ag} - \theta` for some parameters."""
        raise NotImplementedError

    def averaged_weights(self, trained: Trained) -> dict[str, Tensor]:
        r"""Return the averaged iterate :math:`\theta^{ag}` by parameter name, in the parameters' dtypes."""
        result = {}
        with torch.no_grad():
            names = list(trained.named_params)
            for batch in [names] if trained.directions.couples_tensors else [[name] for name in names]:
                for name, offset in self.offset(trained, batch).items():
                    weight = trained.named_params[name].detach()
                    result[name] = (weight + offset).to(weight.dtype)
        return result


class StoredAverage(IterateAverage):
    """The offset in fp32: one more copy of the parameters."""

    def after_move(self, trained: Trained, estimate: Estimate, moves: Sequence[AffineMove]) -> Sequence[AffineMove]:
        """Advance every offset by one step."""
        by_name = {name: move for move, (_, names) in zip(moves, trained.moving_groups()) for name in names}
        for batch in trained.batches(list(by_name)):
            self._advance_batch(trained, batch, by_name)
        for name in trained.frozen:
            offset = self.offset(trained, [name])
            offset[name].mul_(1.0 - average_weight(moves[0].step))
            self._store(trained, offset, moves[0].step)
        return moves

    def _advance_batch(self, trained: Trained, batch: list[str], by_name: Mapping[str, AffineMove]) -> None:
        offsets = self.offset(trained, batch)
        self._advance(trained, offsets, by_name)
        self._store(trained, offsets, next(iter(by_name.values())).step)

    def offset(self, trained: Trained, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the stored offsets themselves."""
        return trained.buffers("average_offset", names)

    def _advance(self, trained: Trained, offsets: dict[str, Tensor], by_name: Mapping[str, AffineMove]) -> None:
        step = next(iter(by_name.values())).step
        keep = 1.0 - average_weight(step)
        if keep == 0.0:
            for offset in offsets.values():
                offset.zero_()
            return
        scales = {name: [-keep * s / by_name[name].decay for s in by_name[name].scales.values()] for name in offsets}
        indices = list(next(iter(by_name.values())).scales)
        trained.directions.add_(offsets, scales, seed=trained.seed, step=step, index=indices, decay=keep)
        for name, offset in offsets.items():
            weight, move = trained.named_params[name], by_name[name]
            if move.decay != 1.0:
                offset.add_(weight, alpha=keep * (1.0 / move.decay - 1.0))
            if move.anchor:
                offset.add_(trained.state[weight]["initial"], alpha=-keep * move.anchor / move.decay)

    def _store(self, trained: Trained, offsets: dict[str, Tensor], step: int) -> None:
        """Keep advanced offsets; fp32 ones were advanced in place."""


class Int8Average(StoredAverage):
    """The offset in eight bits, in blocks of 256 with an fp32 scale each, rounded stochastically: about 1/4 fp32 copy.

    Offsets are unpacked a hundred thousand at a time.  Rounding is unbiased, so errors of different steps average out
    instead of freezing small changes.
    """

    def _advance_batch(self, trained: Trained, batch: list[str], by_name: Mapping[str, AffineMove]) -> None:
        """Advance offsets by one step, some rows of a tensor at a time."""
        if trained.directions.couples_tensors or trained.named_params[batch[0]].ndim == 0:
            super()._advance_batch(trained, batch, by_name)
        else:
            self._advance_rows(trained, batch[0], by_name[batch[0]])

    def _advance_rows(self, trained: Trained, name: str, move: AffineMove) -> None:
        weight = trained.named_params[name]
        codes, scales = self._storage(trained, name)
        shape, width = tuple(weight.shape), math.prod(weight.shape[1:])
        # Pieces start at a quantization block: whole rows, their elements a multiple of 256.
        unit = BLOCK // math.gcd(BLOCK, width) if width else 1
        height = max(unit, CHUNK // max(1, width) // unit * unit)
        keep = 1.0 - average_weight(move.step)
        generator = torch.Generator(weight.device)
        generator.manual_seed(_rounding_seed(trained.seed, move.step, name))
        for row in range(0, shape[0], height):
            piece_shape = (min(height, shape[0] - row), *shape[1:])
            piece = torch.zeros(piece_shape, dtype=torch.float32, device=weight.device)
            begin, end = row * width, row * width + piece.numel()
            blocks = scales[begin // BLOCK : math.ceil(end / BLOCK)]
            if keep > 0.0:
                dequantize(codes[begin:end], blocks, out=piece.view(-1))
                place = Placement(name, piece, piece, shape, (row, *(0 for _ in shape[1:])))
                draw = {"seed": trained.seed, "step": move.step}
                terms = [trained.directions.terms([place], index=i, **draw)[0] for i in move.scales]
                factors = tuple(-keep * scale / move.decay for scale in move.scales.values())
                parts = tuple(_of_elements(term, begin, end) for term in terms if term is not None)
                dispatch.sweep([Job(place, parts, factors, decay=keep)])
                rows = slice(row, row + height)
                if move.decay != 1.0:
                    piece.add_(weight[rows], alpha=keep * (1.0 / move.decay - 1.0))
                if move.anchor:
                    piece.add_(trained.state[weight]["initial"][rows], alpha=-keep * move.anchor / move.decay)
            quantize_(codes[begin:end], blocks, piece.view(-1), generator)

    def _storage(self, trained: Trained, name: str) -> tuple[Tensor, Tensor]:
        weight = trained.named_params[name]
        state = trained.state[weight]
        if "average_int8" not in state:
            blocks = math.ceil(weight.numel() / BLOCK)
            state["average_int8"] = torch.zeros(weight.numel(), dtype=torch.int8, device=weight.device)
            state["average_scale"] = torch.zeros(blocks, dtype=torch.float32, device=weight.device)
        return state["average_int8"], state["average_scale"]

    def offset(self, trained: Trained, names: Sequence[str]) -> dict[str, Tensor]:
        """Unpack the stored offsets."""
        offsets = {}
        for name in names:
            weight = trained.named_params[name]
            state = trained.state[weight]
            offsets[name] = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
            if "average_int8" in state:
                dequantize(state["average_int8"], state["average_scale"], out=offsets[name].view(-1))
        return offsets

    def _store(self, trained: Trained, offsets: dict[str, Tensor], step: int) -> None:
        for name, offset in offsets.items():
            codes, scales = self._storage(trained, name)
            generator = torch.Generator(offset.device)
            generator.manual_seed(_rounding_seed(trained.seed, step, name))
            quantize_(codes, scales, offset.view(-1), generator)


class JournalAverage(IterateAverage):
    """Scalars only: the average is rebuilt by regenerating the directions of the whole run, when it is needed."""

    def __init__(self) -> None:
        self.moves: list[list[AffineMove]] = []
        # Coefficients by parameter group and skipped moves, for a journal of the length they were computed at.
        self._cache: tuple[int, dict[tuple[int, tuple[int, ...]], tuple[float, list[float]]]] = (0, {})

    def after_move(self, trained: Trained, estimate: Estimate, moves: Sequence[AffineMove]) -> Sequence[AffineMove]:
        """Write the step down."""
        self.moves.append(list(moves))
        return moves

    def offset(self, trained: Trained, names: Sequence[str]) -> dict[str, Tensor]:
        """Rebuild the offsets by regenerating every direction of the run."""
        offsets: dict[str, Tensor] = {}
        scales: dict[str, list[float]] = {}
        for number, (_, group_names) in enumerate(trained.groups()):
            for name in set(group_names) & set(names):
                weight = trained.named_params[name]
                initial = trained.state[weight].get("initial")
                skipped = tuple(k for k, moves in enumerate(self.moves) if not _is_moved(moves, number, name))
                end, scales[name] = self._coefficients(number, skipped, from_first=initial is not None)
                if initial is None:
                    offsets[name] = weight.detach().to(_wide_dtype(weight), copy=True).mul_(end - 1.0)
                else:
                    offsets[name] = initial.to(_wide_dtype(weight), copy=True).mul_(end).sub_(weight)
        terms = [(move.step, index) for move, *_ in self.moves for index in move.scales]
        groups = [(number, set(names) & set(members)) for number, (_, members) in enumerate(trained.groups())]

        def moving(moves: list[AffineMove]) -> list[str]:
            return [name for number, members in groups for name in members if _is_moved(moves, number, name)]

        begin = 0
        # Where directions couple tensors, those of a step are made for the tensors that it moved.
        for moved_names, stretch in groupby(self.moves, moving):
            end = begin + sum(len(moves[0].scales) for moves in stretch)
            moved = {name: offsets[name] for name in moved_names}
            for start in range(begin, end if moved else begin, TERMS_PER_SWEEP):
                part = slice(start, min(start + TERMS_PER_SWEEP, end))
                steps, indices = map(list, zip(*terms[part]))
                by_name = {name: scales[name][part] for name in moved}
                trained.directions.add_(moved, by_name, seed=trained.seed, step=steps, index=indices)
            begin = end
        return offsets

    def _coefficients(self, group: int, skipped: tuple[int, ...], *, from_first: bool) -> tuple[float, list[float]]:
        """Factor on the last or the initial weights, and one on every direction of the run.

        Args:
            group: Number of the parameter group.
            skipped: Which moves of the run left the parameter alone.
            from_first: Whether the average is expressed by the initial weights.
        """
        if self._cache[0] != len(self.moves):
            self._cache = len(self.moves), {}
        if (group, skipped) not in self._cache[1]:
            omitted = set(skipped)
            run = [
                moves[group]
                if k not in omitted
                else AffineMove(moves[0].step, dict.fromkeys(moves[0].scales, 0.0), 1.0)
                for k, moves in enumerate(self.moves)
            ]
            end, updates = coefficients_from_first(run) if from_first else coefficients_from_last(run)
            flat = [factor * scale for move, factor in zip(run, updates) for scale in move.scales.values()]
            self._cache[1][group, skipped] = end, flat
        return self._cache[1][group, skipped]

    def state_dict(self) -> dict[str, Any]:
        """Return the journal as plain numbers."""
        return {"moves": [[_fields(move) for move in moves] for moves in self.moves]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a saved journal over."""
        self.moves, self._cache = [[AffineMove(*fields) for fields in moves] for moves in state["moves"]], (0, {})


STORAGES: dict[str, type[IterateAverage]] = {"fp32": StoredAverage, "int8": Int8Average, "journal": JournalAverage}


def iterate_average(storage: str = "journal") -> IterateAverage:
    """Return an average that is kept as ``fp32``, as ``int8``, or not at all (``journal``: rebuilt when needed).

    Raises:
        UsageError: If there is no such storage.

    Example:
        >>> type(iterate_average("int8")).__name__
        'Int8Average'
    """
    if storage not in list(STORAGES):
        raise UsageError(f"There is no averaging {storage!r}: choose one of none, {', '.join(STORAGES)}.")
    return STORAGES[storage]()


def _is_moved(moves: Sequence[AffineMove], group: int, name: str) -> bool:
    """Return whether a step moved a parameter: its group was there, and it was not frozen."""
    return group < len(moves) and name not in moves[group].frozen


def _fields(move: AffineMove) -> tuple[Any, ...]:
    fields = (move.step, dict(move.scales), move.decay, move.anchor)
    return (*fields, move.frozen) if move.frozen else fields


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _of_elements(term: Any, begin: int, end: int) -> Any:
    """Return a term of a whole tensor for some of its elements, whose mask has their bits only."""
    if not isinstance(term, Noise) or term.mask is None:
        return term
    assert begin % 8 == 0  # pieces begin at blocks
    return replace(term, mask=term.mask[begin // 8 : -(-end // 8)])


def _rounding_seed(seed: int, step: int, name: str) -> int:
    """Seed of one tensor's rounding at one step; a pure function, so that resumed runs round alike."""
    digest = hashlib.blake2b(f"average/{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
