"""Private APIs of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to load
    from torch import Tensor, nn

write_count = attrgetter("_version")
"""Returns how often a tensor was written to in place, in any way that torch sees.

Private: ``Tensor._version``.  Autograd counts these writes, and a comparison of values would need a copy of all.
An assignment to ``tensor.data`` is not among them: it gives the tensor other memory.
"""


def note_step(optimizer: Any) -> None:
    """Let a learning rate schedule know that its optimizer took a step other than by ``step``.

    Private: ``Optimizer._opt_called``.  A schedule warns of steps that it has not seen, and watches ``step`` alone.
    """
    optimizer._opt_called = True


def standard_gamma(shape_parameters: Tensor, generator: Any) -> Tensor:
    """Return draws of Gamma(k, 1) for each k in ``shape_parameters``, with a generator of one's own.

    Private: ``torch._standard_gamma``.  ``torch.distributions.Gamma`` calls it with the global generator only.
    """
    import torch

    return torch._standard_gamma(shape_parameters, generator=generator)


def flatten_and_unflatten() -> tuple[Callable[[Any], tuple[list[Any], Any]], Callable[[list[Any], Any], Any]]:
    """Return ``flatten(tree)``, the (leaves, structure) of nested containers, and ``unflatten(leaves, structure)``.

    Private: ``torch.utils._pytree``.  These are the containers that torch's own functions take, named tuples included,
    and torch has no public name for it.
    """
    from torch.utils._pytree import tree_flatten, tree_unflatten

    return tree_flatten, tree_unflatten


def shard_offset(tensor: Any) -> tuple[int, ...]:
    """Return where the shard of this process begins in the whole of a ``DTensor``, in every dimension.

    Private: ``torch.distributed.tensor._utils.compute_local_shape_and_global_offset``.  A ``DTensor`` gives away its
    mesh and placements only, from which uneven shards would have to be worked out again.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def extension_file() -> str:
    """Return the file of torch's own extension module, through which the libraries it is linked with are found.

    Private: ``torch._C``.  Another copy of OpenMP, found in any other way, would start threads of its own.
    """
    import torch

    return torch._C.__file__


def keep_in_place(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Let ``module.to(...)`` and its kind move everything in a module except some of its parameters.

    Private: ``Module._apply``, by which torch moves and converts modules.  A trainer moves the whole model to its
    device, and nothing public exempts weights that are copied there one block at a time.
    """
    fixed = {id(tensor) for tensor in tensors}

    def apply_to_rest(inner: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        parameters = dict(inner._parameters)
        for name, parameter in parameters.items():
            if id(parameter) in fixed:
                del inner._parameters[name]
        try:
            return type(inner)._apply(inner, fn, recurse)
        finally:
            moved = dict(inner._parameters)
            inner._parameters.clear()
            inner._parameters.update({name: moved.get(name, parameter) for name, parameter in parameters.items()})

    for inner in module.modules():
        if any(id(parameter) in fixed for parameter in inner.parameters(recurse=False)):
            vars(inner)["_apply"] = partial(apply_to_rest, inner)


class ModuleState:
    """The hooks, the replaced ``forward`` and the training flag of modules, as they are now.

    Private: the dictionaries of a module's hooks.  Forwards that take turns each add and remove hooks of their own, and
    nothing public exchanges them.

    Args:
        modules: The modules.
    """

    _HOOKS = (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    )

    def __init__(self, modules: Sequence[nn.Module]):
        # The dictionaries themselves: a hook is removed from the dictionary that it was added to.
        keys = (*self._HOOKS, "training", "forward")
        self._states = [
            (vars(module), {key: vars(module)[key] for key in keys if key in vars(module)}) for module in modules
        ]

    def copy(self) -> ModuleState:
        """Return the same state with hooks that can be added and removed without changing this one."""
        state = ModuleState(())
        state._states = [
            (module, {key: value.copy() if key in self._HOOKS else value for key, value in attributes.items()})
            for module, attributes in self._states
        ]
        return state

    def install(self) -> None:
        """Give the modules this state."""
        for module, attributes in self._states:
            module.pop("forward", None)
            module.update(attributes)
