r"""``in_forward`` for weights that are streamed: all points of a step share one pass over the blocks.

The losses at the points :math:`\theta + \sum_i offsets_i z_i` are taken by forwards that walk through the model
together (:mod:`zokernel.offload.lockstep`).  When a block is there, each forward runs it with perturbed copies of its
weights, made as :class:`~zokernel.perturb.InForward` makes them, so the losses are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.directions import Directions
from zokernel.directions.weights.copy import Unmoved
from zokernel.directions.weights.copy_perturbed import Copier
from zokernel.directions.weights.restore import Draw
from zokernel.estimators.base import Offsets
from zokernel.offload.blocks import Blocks, check_visited, outside
from zokernel.offload.lockstep import Lockstep
from zokernel.offload.store import Store
from zokernel.offload.units import Stop, Unit
from zokernel.perturb.base import Closure
from zokernel.perturb.copy_schedule import Point
from zokernel.perturb.in_forward import InForward, Perturbed
from zokernel.perturb.in_place import loss_value
from zokernel.perturb.intercept import Intercepted
from zokernel.process_memory import release_heap


class StreamedForward(InForward):
    r"""Take the losses of a step in one pass over streamed weights.

    Args:
        blocks: The blocks of the model.
        model: The model as it is called, with the adapter around it if there is one.
        trained: The store of the blocks, if their weights are trained themselves; None if an adapter is.
        max_together: Points that share a pass; their activations between two blocks are held together.

    Raises:
        UsageError: When attached, if the directions or the weights do not suit in_forward.
    """

    def __init__(self, blocks: Blocks, model: nn.Module, trained: Store | None = None, *, max_together: int = 64):
        super().__init__()
        self._outside = outside(model, blocks)
        self.blocks, self.trained, self.max_together = blocks, trained, max_together

    def attach(
        self, parameters: Mapping[str, Tensor], directions: Directions, *, seed: int, reach: float = 0.01
    ) -> None:
        """Take these weights, as they are, for the unperturbed ones; see :meth:`zokernel.perturb.Perturb.attach`."""
        super().attach(parameters, directions, seed=seed, reach=reach)
        assert self.schedule is not None
        unit_of = {id(tensor): unit for unit in self.blocks.units for tensor in unit.tensors.values()}
        keys = [key for key in self.schedule.places if key in unit_of]
        self.schedule.group_of = {key: unit_of[key].name for key in keys}
        # Vectors of a unit are copied when the unit is there.
        small = [key for key in self.schedule.small if key in unit_of]
        self._keys = {unit.name: [key for key in keys if unit_of[key] is unit] for unit in self.blocks.units}
        self.schedule.small = [key for key in self.schedule.small if key not in unit_of]
        self.schedule.copy_small = Copier([self.schedule.places[key] for key in self.schedule.small])
        self._small = {unit.name: [key for key in small if unit_of[key] is unit] for unit in self.blocks.units}
        self._copiers = {name: self._copier(members) for name, members in self._small.items()}
        if self.trained is not None:
            self.weights = StreamedWeights(directions, parameters, seed=seed, blocks=self.blocks)

    def losses_of(self, requests: Sequence[tuple[Closure, Offsets]], *, step: int) -> list[float]:
        """Return the loss of each closure at its point, all together."""
        losses: list[float] = []
        for begin in range(0, len(requests), self.max_together):
            losses += self._joint_losses(requests[begin : begin + self.max_together], step)
        return losses

    def _joint_losses(self, requests: Sequence[tuple[Closure, Offsets]], step: int) -> list[float]:
        schedule, blocks = self.schedule, self.blocks
        assert schedule is not None
        forwards = self._forwards([offsets for _, offsets in requests], step)
        fixed = [forward.fixed for forward in forwards]
        running = forwards[0]

        def turn(number: int, stop: Stop | None) -> None:
            nonlocal running
            running.copies = {}  # the buffer is to hold those of another point
            running = forwards[number]
            copies = self._small_copies(running, stop.unit) if stop is not None and stop.unit.is_block else {}
            running.fixed = fixed[number] | copies

        def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return running.run(func, args, kwargs)

        lockstep: Lockstep[float, Stop] = Lockstep(self._arrive, turn, self._outside)

        def pause(stop: Stop) -> bool:
            if lockstep.active:
                lockstep.pause(stop)
            return lockstep.active

        with Intercepted(schedule.parameters.values(), run):
            previous, blocks.pause = blocks.pause, pause
            try:
                losses = lockstep.run([partial(_loss_of, closure) for closure, _ in requests])
            finally:
                blocks.pause = previous
        release_heap()  # the heap of every thread keeps some room, more with every pass
        if self.trained is not None:
            check_visited(blocks)
        if not schedule.learned:
            schedule.finish()
            if not blocks.store.moves:
                schedule.prepare(self.weights.directions, seed=self.weights.seed)
        return losses

    def _forwards(self, points: Sequence[Offsets], step: int) -> list[Perturbed]:
        """Return a forward for each point, with perturbed copies of the weights outside of all blocks."""
        schedule, directions, seed, store = self.schedule, self.weights.directions, self.weights.seed, self.blocks.store
        assert schedule is not None
        if not (schedule.learned or store.moves):
            schedule.prepare(directions, seed=seed)
        forwards = [Perturbed(schedule, directions, Point(offsets, seed, step)) for offsets in points]
        for unit in self.blocks.units:
            if not unit.is_block:  # a few weights that anything may use at any time
                store.settle(unit)
                for forward in forwards:
                    forward.fixed |= self._small_copies(forward, unit)
        return forwards

    def _arrive(self, stop: Stop) -> None:
        """Bring in the block that all forwards wait for."""
        self.blocks.visit(stop)
        if self.blocks.store.moves and stop.unit.is_block:
            assert self.schedule is not None
            self.schedule.relocate(self._keys[stop.unit.name])
            self._copiers[stop.unit.name] = self._copier(self._small[stop.unit.name])

    def _copier(self, keys: Sequence[int]) -> Copier:
        assert self.schedule is not None
        return Copier([self.schedule.places[key] for key in keys])

    def _small_copies(self, forward: Perturbed, unit: Unit) -> dict[int, Tensor]:
        keys, copier = self._small[unit.name], self._copiers[unit.name]
        targets = [torch.empty_like(place.local) for place in copier.places]
        if targets:
            point = forward.point
            copier(forward.directions, targets, point.offsets, seed=point.seed, step=point.step)
        return dict(zip(keys, targets, strict=True))


def _loss_of(closure: Closure) -> float:
    return loss_value(closure())


class StreamedWeights(Unmoved):
    """Weights of streamed blocks, whose updates are made when they are read next.

    Args:
        directions: Random directions.
        tensors: Weights by name.
        seed: Seed of the run.
        blocks: The blocks of the model.
    """

    stay = False  # a block has other memory whenever it is read

    def __init__(self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, blocks: Blocks):
        super().__init__(directions, tensors, seed=seed)
        self._blocks, self._updates = blocks, blocks.store.updates
        blocks.settle_all()  # what waits is for the tensors that were trained until now
        self._updates.train(directions, self.tensors, seed=seed, units=blocks.units)

    def restore(self) -> None:
        """Make every update that waits, so that the tensors are the weights."""
        self._blocks.settle_all()

    def copies_at(self, step: int, offsets: Any) -> dict[str, Tensor]:
        """Return copies of the weights at a point, in memory."""
        self._blocks.settle_all()
        return super().copies_at(step, offsets)

    def _commit(self, step: int, update: dict[str, dict[Draw, float]], decay: float | Mapping[str, float]) -> None:
        self._updates.note(step, update, decay)
