"""The factors of many directions of one step, drawn together: a direction for every example takes hundreds of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from zokernel.directions.backends import dispatch
from zokernel.directions.base import Directions, Sweep
from zokernel.directions.families.factors import ALIGNMENT, Draw
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job, Noise, Rule, Term


class Blocks(NamedTuple):
    """Factors of K directions on one matrix: (K, m, r) and (K, r, n)."""

    left: Tensor
    right: Tensor


class FactorBlocks:
    """Draws the factors of K directions of all matrices in one sweep, into memory that is used again in the next step.

    Args:
        sides: Returns the draws of U and V of one direction on a matrix; those of consecutive indices are consecutive
            rows of one stream.
    """

    def __init__(self, sides: Callable[[Placement, int, int, int], tuple[Draw, Draw]]):
        self._sides = sides
        self._flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._blocks: dict[torch.dtype, dict[str, Blocks]] = {}
        self._key: tuple[object, ...] = ()
        self._indices: list[int] = []

    def __getstate__(self) -> dict[str, object]:
        return {"_sides": self._sides, "_flat": {}, "_blocks": {}, "_key": (), "_indices": []}

    def __call__(
        self,
        places: Sequence[Placement],
        backend: str,
        *,
        seed: int,
        step: int,
        indices: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Blocks]:
        """Return the factors of some directions on some matrices, which stay until others are drawn.

        Every direction is drawn once, however often it is requested: by both members of an antithetic pair, and by the
        update after the losses.

        Args:
            places: The matrices, all on one device.
            backend: Which backend draws.
            seed: Seed of the run.
            step: Step of the run.
            indices: Which directions of that step, K of them.
            dtype: Type of the factors, which are drawn in float32.

        Returns:
            The factors by name.
        """
        key = (seed, step, *((place.name, place.shape, place.local.device) for place in places))
        if key != self._key or not set(indices) <= set(self._indices):
            self._key, self._indices = key, sorted(set(indices))
            self._blocks = {torch.float32: self._draw_blocks(places, backend, seed, step, self._indices)}
        if dtype not in self._blocks:
            self._blocks[dtype] = self._cast(dtype)
        by_name = self._blocks[dtype]
        if list(indices) == self._indices:
            return by_name
        numbers = {index: number for number, index in enumerate(self._indices)}
        rows = torch.tensor([numbers[index] for index in indices], device=places[0].local.device)
        return {name: Blocks(blocks.left[rows], blocks.right[rows]) for name, blocks in by_name.items()}

    def _draw_blocks(
        self, places: Sequence[Placement], backend: str, seed: int, step: int, indices: Sequence[int]
    ) -> dict[str, Blocks]:
        # Runs of consecutive indices, each one piece of a stream.
        runs = [[index for _, index in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
        starts = [[self._sides(place, seed, step, run[0]) for run in runs] for place in places]
        sides = [draw for own in starts for draw in own[0]]
        sizes = [-(-len(indices) * draw.rows * draw.columns // ALIGNMENT) * ALIGNMENT for draw in sides]
        room = self._room(sides[0].device, torch.float32, sum(sizes))
        blocks, jobs = [], []
        for number, (draw, piece) in enumerate(zip(sides, room.split(sizes))):
            which, side = divmod(number, 2)
            block = piece[: len(indices) * draw.rows * draw.columns].view(len(indices), draw.rows, draw.columns)
            begin = 0
            for run, drawn in zip(runs, starts[which], strict=True):
                own = drawn[side]
                rows = block[begin : begin + len(run)].view(-1, draw.columns)
                noise = Noise(own.distribution, own.key, own.step, own.number)
                jobs.append(
                    Job(Placement("", rows, rows, tuple(rows.shape), (own.first, 0)), (noise,), (1.0,), decay=0.0)
                )
                begin += len(run)
            blocks.append(block)
        dispatch.sweep(jobs, backend)
        return {place.name: Blocks(*blocks[2 * i : 2 * i + 2]) for i, place in enumerate(places)}

    def _cast(self, dtype: torch.dtype) -> dict[str, Blocks]:
        """Return the drawn factors in another type, all converted at once."""
        drawn = self._blocks[torch.float32]
        first = next(iter(drawn.values())).left
        wide = self._flat[first.device, torch.float32]
        narrow = self._room(first.device, dtype, wide.numel())
        narrow.copy_(wide)

        def convert(block: Tensor) -> Tensor:
            offset = block.storage_offset()
            return narrow[offset : offset + block.numel()].view(block.shape)

        return {name: Blocks(convert(blocks.left), convert(blocks.right)) for name, blocks in drawn.items()}

    def _room(self, device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
        """Return memory for all factors: sweeps over the same memory are prepared only once."""
        memory = self._flat.get((device, dtype))
        if memory is None or memory.numel() != size:
            memory = self._flat[device, dtype] = torch.zeros(size, dtype=dtype, device=device)
        return memory


def adds_in_float32(places: Sequence[Placement], sweep: Sweep) -> bool:
    """Return whether several directions of one step may be summed in float32 before they are added to some tensors."""
    rules = set(sweep.rule.values()) if isinstance(sweep.rule, Mapping) else {sweep.rule}
    steps, devices = {step for step, _ in sweep.draws}, {place.local.device for place in places}
    fits_float32 = all(place.local.dtype != torch.float64 for place in places)
    is_sum = len(sweep.draws) > 1 and len(steps) == len(devices) == 1
    return fits_float32 and is_sum and sweep.old_scale is None and rules == {Rule.NEAREST}


class SummedTerms(Directions):
    """Adds, to each tensor, one term that is already the sum of several.

    Args:
        sums: One term for each tensor, by name.
        backend: Which backend adds them.
    """

    def __init__(self, sums: Mapping[str, Term], backend: str):
        super().__init__(backend)
        self.sums = sums

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the sums; see :meth:`Directions.terms`."""
        return [self.sums[place.name] for place in places]

    def sweep_once(self, places: Sequence[Placement], sweep: Sweep) -> dict[str, float]:
        """Carry out a sweep of several directions whose scaled sum is known."""
        return self._sweep_places(places, sweep._replace(scale=1.0, draws=sweep.draws[:1]))
