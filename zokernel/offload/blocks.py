r"""The blocks of a model whose weights are in files: each is read just before it runs, the next one meanwhile.

A *unit* is a block (an element of the model's outermost module lists) or a layer outside of all blocks, such as the
embeddings and the head.  Its tensors are views of mapped files (:mod:`zokernel.offload.mapping`), so that reading it
means nothing but bringing its pages in, and they are let go of when the next unit has begun.

Tied weights are one unit with several modules.  Embeddings are not read as a whole: the system reads the rows that are
looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from zokernel.errors import RunError, UsageError
from zokernel.offload.mapping import MappedFile

_ATTRIBUTE = "zokernel_streamed_blocks"


@dataclass(eq=False)
class Unit:
    """Weights that are read together.

    Attributes:
        name: Name of its first module.
        modules: Modules that use the weights: one, or several if they are tied.
        names: Names of its parameters in the model.
        is_block: Whether it is an element of a module list.
        parts: Where its bytes are: file, first and last offset.
        tensors: Its parameters by name, once they are mapped.
    """

    name: str
    modules: list[nn.Module]
    names: list[str]
    is_block: bool
    parts: list[tuple[MappedFile, int, int]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that one read of it takes."""
        return sum(end - begin for _, begin, end in self.parts)

    def populate(self) -> None:
        """Bring all of its pages in."""
        for file, begin, end in self.parts:
            file.populate(begin, end)

    def drop(self) -> None:
        """Let go of its pages."""
        for file, begin, end in self.parts:
            file.drop(begin, end)


@dataclass(frozen=True, eq=False)
class Stop:
    """A module that is about to run, and the unit that it uses."""

    unit: Unit
    module: nn.Module

    @property
    def reads_rows(self) -> bool:
        """Whether the module looks up rows of its weights: an embedding, or a layer whose forward was replaced."""
        return isinstance(self.module, nn.Embedding) or "forward" in vars(self.module)


class Blocks:
    """The units of a model, read in the order in which the model runs them.

    Args:
        model: The model; its parameters are views of mapped files.
        units: Its units, mapped.

    Attributes:
        bytes_read: Bytes of all units that were brought in so far.
        passes: How often each unit was brought in, by name.
        settle: Called with a unit that was brought in, before it runs.
        pause: Called with the stop that a forward comes to; returns whether it has seen to the unit being there.
    """

    def __init__(self, model: nn.Module, units: list[Unit]):
        self.units = units
        self.bytes_read = 0
        self.passes = dict.fromkeys((unit.name for unit in units), 0)
        self.settle: Callable[[Unit], None] = lambda unit: None
        self.pause: Callable[[Stop], bool] = lambda stop: False
        self._current: Unit | None = None
        self._next: dict[str, Unit] = {}
        self._reader = ThreadPoolExecutor(1, "zokernel-reader")
        self._ahead: tuple[Unit, Future[None]] | None = None
        self._handles = [
            module.register_forward_pre_hook(self._hook(Stop(unit, module)))
            for unit in units
            for module in unit.modules
        ]
        self._handles.append(model.register_state_dict_pre_hook(lambda *_: self.settle_all()))
        setattr(model, _ATTRIBUTE, self)

    @property
    def nbytes(self) -> int:
        """Bytes of all units."""
        return sum(unit.nbytes for unit in self.units)

    def visit(self, stop: Stop) -> None:
        """Bring a unit in, let go of the one before it, and begin to read the one that came after it last time."""
        unit = stop.unit
        previous, self._current = self._current, unit
        if previous is unit:
            self.settle(unit)
            return
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].result()
        if not stop.reads_rows:
            if ahead is None or ahead[0] is not unit:
                unit.populate()
            self.bytes_read += unit.nbytes
            self.passes[unit.name] += 1
        if previous is not None:
            previous.drop()
            self._next[previous.name] = unit
        self.settle(unit)
        following = self._next.get(unit.name)
        if following is not None and following is not unit and following.is_block:
            self._ahead = following, self._reader.submit(following.populate)

    def settle_all(self) -> None:
        """Bring every unit up to date, before its tensors are read from outside of a forward."""
        for unit in self.units:
            self.settle(unit)
            unit.drop()

    def _hook(self, stop: Stop) -> Callable[..., None]:
        def before(*_: Any) -> None:
            if not self.pause(stop):
                self.visit(stop)

        return before


def streamed_blocks(model: nn.Module) -> Blocks | None:
    """Return the blocks of a model whose weights are streamed; None if they are in memory.

    Args:
        model: A model, or one with an adapter around it.
    """
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    return getattr(base, _ATTRIBUTE, None)


def find_units(model: nn.Module) -> list[Unit]:
    """Return the units of a model in the order of its modules; their tensors are not mapped yet.

    Raises:
        UsageError: If blocks share weights with something else.

    Example:
        >>> model = nn.Sequential(nn.Embedding(4, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
        >>> [(unit.name, unit.is_block, len(unit.names)) for unit in find_units(model)]
        [('0', False, 1), ('1.0', True, 2), ('1.1', True, 2)]
    """
    owner: dict[int, Unit] = {}
    units: list[Unit] = []
    for name, module, is_block in _pieces(model, ""):
        held = list(module.named_parameters(prefix=name, recurse=is_block))
        if not held:
            continue
        shared = {id(owner[id(p)]): owner[id(p)] for _, p in held if id(p) in owner}
        if shared:
            unit, *others = shared.values()
            if is_block or any(other.is_block for other in shared.values()):
                raise UsageError(
                    f"{name} shares weights with {unit.name}, so they cannot be read block by block: leave out "
                    "--offload."
                )
            unit.modules.append(module)
            for other in others:  # a head that is tied to the embeddings by its matrix, and to its parent by its bias
                unit.modules += other.modules
                unit.names += other.names
                units.remove(other)
                owner |= {key: unit for key, held_by in owner.items() if held_by is other}
        else:
            unit = Unit(name, [module], [], is_block)
            units.append(unit)
        for key, parameter in held:
            if id(parameter) not in owner:
                owner[id(parameter)] = unit
                unit.names.append(key)
    return units


def outside(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """Return the modules of a model that are in none of its blocks, and the blocks themselves."""
    block = {module for unit in blocks.units if unit.is_block for module in unit.modules}
    found, waiting = [], [model]
    while waiting:
        module = waiting.pop()
        found.append(module)
        waiting += [] if module in block else module.children()
    return found


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


def _pieces(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield blocks, and the modules outside of them that hold parameters themselves."""
    yield name, module, False
    for key, child in module.named_children():
        inner = f"{name}.{key}" if name else key
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield inner, child, True
        else:
            yield from _pieces(child, inner)
