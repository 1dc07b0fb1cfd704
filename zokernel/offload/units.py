r"""Units: the weights of a model that are read together.

A *unit* is a block (an element of the model's outermost module lists) or a layer outside of all blocks, such as the
embeddings and the head.  Tied weights are one unit with several modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.offload.mapping import MappedFile


@dataclass(eq=False)
class Unit:
    """Weights that are read together.

    Attributes:
        name: Name of its first module.
        modules: Modules that use the weights: one, or several if they are tied.
        names: Names of its parameters in the model.
        is_block: Whether it is an element of a module list.
        parts: Where its bytes are in files: file, first and last offset.
        tensors: Its parameters by name, once they are there.
    """

    name: str
    modules: list[nn.Module]
    names: list[str]
    is_block: bool
    parts: list[tuple[MappedFile, int, int]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

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


def find_units(model: nn.Module) -> list[Unit]:
    """Return the units of a model in the order of its modules; their tensors are not there yet.

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
        parameters = list(module.named_parameters(prefix=name, recurse=is_block))
        if not parameters:
            continue
        shared = {id(owner[id(p)]): owner[id(p)] for _, p in parameters if id(p) in owner}
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
                owner |= {key: unit for key, current in owner.items() if current is other}
        else:
            unit = Unit(name, [module], [], is_block)
            units.append(unit)
        for key, parameter in parameters:
            if id(parameter) not in owner:
                owner[id(parameter)] = unit
                unit.names.append(key)
    return units


def _pieces(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield blocks, and the modules outside of them that hold parameters themselves."""
    yield name, module, False
    for key, child in module.named_children():
        inner = f"{name}.{key}" if name else key
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield inner, child, True
        else:
            yield from _pieces(child, inner)
