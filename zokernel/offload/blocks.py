r"""The blocks of a model whose weights are elsewhere: each is brought in just before it runs, the next one meanwhile.

:mod:`zokernel.offload.units` says what a block is, :mod:`zokernel.offload.store` where it is between its uses.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import nn

from zokernel.errors import RunError
from zokernel.offload.store import Store
from zokernel.offload.units import Stop, Unit
from zokernel.without_adapter import without_adapter

_ATTRIBUTE = "zokernel_streamed_blocks"


class Blocks:
    """The units of a model, brought in in the order in which the model runs them.

    Args:
        model: The model; its parameters are the tensors of the units.
        units: Its units, placed in the store.
        store: Where they are between their uses.

    Attributes:
        bytes_read: Bytes of all units that were brought in so far.
        passes: How often each unit was visited, by name.
        pause: Called with the stop that a forward comes to; returns whether it has seen to the unit being there.
    """

    def __init__(self, model: nn.Module, units: list[Unit], store: Store):
        self.units, self.store = units, store
        self.bytes_read = 0
        self.passes = dict.fromkeys((unit.name for unit in units), 0)
        self.pause: Callable[[Stop], bool] = lambda stop: False
        self._current: Unit | None = None
        self._next: dict[str, Unit] = {}
        self._reader = ThreadPoolExecutor(1, "zokernel-reader")
        self._prefetch: tuple[Unit, Future[None]] | None = None
        for unit in units:
            for module in unit.modules:
                module.register_forward_pre_hook(self._hook(Stop(unit, module)))
        model.register_state_dict_pre_hook(lambda *_: self.settle_all())
        setattr(model, _ATTRIBUTE, self)

    @property
    def nbytes(self) -> int:
        """Bytes of all units."""
        return sum(unit.nbytes for unit in self.units)

    def visit(self, stop: Stop) -> None:
        """Bring a unit in, let go of the one before it, and begin to fetch the one that came after it last time."""
        unit, store = stop.unit, self.store
        previous, self._current = self._current, unit
        if previous is unit:
            store.settle(unit)
            return
        prefetched = self._take_prefetched(unit)
        rows = stop.reads_rows and store.lazy
        if not rows:
            if store.fetches(unit):
                if not prefetched:
                    store.fetch(unit)
                self.bytes_read += unit.nbytes
            self.passes[unit.name] += 1
        if previous is not None:
            store.leave(previous)
            self._next[previous.name] = unit
        store.arrive(unit)
        store.settle(unit)
        following = self._next.get(unit.name)
        if following is not None and following is not unit and following.is_block and store.fetches(following):
            self._prefetch = following, self._reader.submit(store.fetch, following)

    def settle_all(self) -> None:
        """Bring every unit up to date, before its tensors are read from outside of a forward.

        Raises:
            RunError: If an update could not be written.
        """
        self._take_prefetched(None)
        if self._current is not None:
            self.store.leave(self._current)
            self._current = None
        for unit in self.units:
            self.store.keep(unit)
        self.store.wait()

    def _take_prefetched(self, unit: Unit | None) -> bool:
        """Return whether it was this unit that was fetched ahead, once it is there; let go of another."""
        prefetch, self._prefetch = self._prefetch, None
        if prefetch is None:
            return False
        prefetch[1].result()
        if prefetch[0] is not unit:
            self.store.leave(prefetch[0])
        return prefetch[0] is unit

    def _hook(self, stop: Stop) -> Callable[..., None]:
        def visit_first(*_: Any) -> None:
            if not self.pause(stop):
                self.visit(stop)

        return visit_first


def streamed_blocks(model: nn.Module) -> Blocks | None:
    """Return the blocks of a model whose weights are streamed; None if they are in memory for good.

    Args:
        model: A model, or one with an adapter around it.
    """
    return getattr(without_adapter(model), _ATTRIBUTE, None)


def outside(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """Return the modules of a model that are in none of its blocks, and the blocks themselves."""
    block_modules = {module for unit in blocks.units if unit.is_block for module in unit.modules}
    modules, stack = [], [model]
    while stack:
        module = stack.pop()
        modules.append(module)
        stack += [] if module in block_modules else module.children()
    return modules


def check_visited(blocks: Blocks) -> None:
    """Refuse a model that uses a block without calling it: nobody would bring it up to date.

    Raises:
        RunError: If there is such a block.
    """
    missed = [unit.name for unit in blocks.units if unit.is_block and not blocks.passes[unit.name]]
    if missed:
        raise RunError(
            f"The model never called {missed[0]} as a module, so its weights cannot be streamed: leave out --offload, "
            "or freeze it."
        )
