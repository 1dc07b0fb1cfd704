"""What is trained: parameters with names, and which of them decay."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.directions.placement import place_all
from zokernel.directions.weights.restore import memory_of
from zokernel.errors import UsageError
from zokernel.optim.layers import NORMS
from zokernel.optim.options import constructor_options
from zokernel.values import check_shares, is_number, plain_number

Params = nn.Module | Iterable[Any]
TORCH_SETTINGS = {"betas", "dampening", "maximize", "momentum", "nesterov"}  # of torch's own optimizers, by group


class Origin:
    """The module that an optimizer was made from, which knows the names of tensors that are added later.

    Args:
        params: The optimizer's ``params``; only a module is remembered, and it is not kept alive.
    """

    def __init__(self, params: Any = None):
        self._module = weakref.ref(params) if isinstance(params, nn.Module) else None

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of a parameter of the module; None if it is none of its."""
        module = None if self._module is None else self._module()
        parameters = () if module is None else module.named_parameters()
        return next((name for name, parameter in parameters if parameter is tensor), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        module = None if self._module is None else self._module()
        return Origin(memo.get(id(module)))

    def __reduce__(self) -> tuple[type[Origin], tuple[()]]:
        return Origin, ()


def trainable(params: Params) -> Any:
    """Return ``params`` in a form that ``torch.optim.Optimizer`` takes, with names where there are any.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.

    Returns:
        The parameters; of a module, those with ``requires_grad``.

    Raises:
        UsageError: If there is nothing to train.
    """
    if isinstance(params, nn.Module):
        params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
    if isinstance(params, Tensor):
        raise UsageError("params must be a module or an iterable of tensors, not a single tensor: pass [tensor].")
    params = list(params)
    if not params:
        raise UsageError("There is nothing to train: no parameter has requires_grad=True.")
    return params


def trainable_group(group: dict[str, Any], earlier: Sequence[dict[str, Any]], origin: Origin) -> dict[str, Any]:
    """Return a parameter group in a form that ``torch.optim.Optimizer`` takes, named as the groups before it are.

    Args:
        group: Its ``params`` may be a module.
        earlier: The groups that the optimizer has already.
        origin: Names tensors that come without a name, or in a part of the module that the optimizer was made from.

    Raises:
        UsageError: If it holds nothing to train, only some or other tensors have names, or one is trained already.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise UsageError("A parameter group is a dictionary with 'params', as in {'params': layer, 'lr': 1e-5}.")
    params = group["params"]
    members = trainable([params] if isinstance(params, Tensor) else params)
    pairs = [member if isinstance(member, tuple) else (None, member) for member in members]
    for _, tensor in pairs:
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise UsageError(f"params must be tensors, (name, tensor) pairs or a module, and one is a {kind}.")
        if any(tensor is trained for other in earlier for trained in other["params"]):
            raise UsageError(
                "A tensor of this parameter group is trained already, in another group: leave it out of one."
            )
    if earlier and "param_names" in earlier[0]:
        of_module = isinstance(params, nn.Module)
        pairs = [(origin.name_of(p) or name if of_module or name is None else name, p) for name, p in pairs]
        if any(name is None for name, _ in pairs):
            raise UsageError(
                "The parameters of this optimizer have names, and a tensor of the new group has none: pass (name, "
                "tensor) pairs, as in {'params': head.named_parameters(prefix='head')}."
            )
    elif earlier and isinstance(params, nn.Module):
        pairs = [(None, tensor) for _, tensor in pairs]
    named = [name is not None for name, _ in pairs]
    if any(named) and (not all(named) or (earlier and "param_names" not in earlier[0])):
        raise UsageError("Some parameters have names and others none: give (name, tensor) pairs for all or for none.")
    return group | {"params": pairs if all(named) else [tensor for _, tensor in pairs]}


def check_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a parameter group's settings as Python's own; refuse those that are out of range.

    A tensor of one element, which torch allows for ``lr``, stays one.

    Raises:
        UsageError: If one is.
    """
    settings = {name: group[name] for name in ("lr", "weight_decay", "momentum") if name in group}
    check_shares(momentum=settings.get("momentum", 0.0))
    for name, value in settings.items():
        is_tensor = isinstance(value, Tensor) and value.numel() == 1
        number = value.item() if is_tensor else plain_number(name, value)
        if not (is_number(number) and number >= 0):
            raise UsageError(f"{name} must be a finite number >= 0, not {value!r}.")
        settings[name] = value if is_tensor else number
    return settings


def check_group_settings(group: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse settings that a parameter group cannot have for itself, and that would be ignored.

    Args:
        group: The group.  Keys that no optimizer knows are the user's own, and stay.  So do settings that do nothing,
            such as a momentum of zero, which groups of other optimizers and old journals have.
        optimizer: The optimizer, whose ``defaults`` are what groups may have.

    Raises:
        UsageError: If it has an option of the optimizer, or a setting of torch's optimizers, that holds for all groups.
    """
    known = constructor_options(type(optimizer)).keys() | {name for name in TORCH_SETTINGS if group.get(name)}
    for name in sorted(group.keys() & known - optimizer.defaults.keys()):
        raise UsageError(
            f"A parameter group of {type(optimizer).__name__} has no {name} of its own, only "
            f"{', '.join(optimizer.defaults)}: leave it out of the group."
        )


def name_parameters(param_groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return every parameter by name: its own, or its position as text when the groups carry no names.

    Args:
        param_groups: Groups as ``torch.optim.Optimizer`` keeps them.

    Returns:
        Name to tensor, in order; of several tensors that are the same memory (tied weights) only the first.

    Raises:
        UsageError: If two parameters share a name or some of their memory, or one is quantized, made under
            inference mode or has no memory, which cannot be perturbed.
    """
    named = _all_names(param_groups)
    return {place.name: named[place.name] for place in place_all(named)}


def tied_names(param_groups: list[dict[str, Any]]) -> dict[str, str]:
    """Return the names that :func:`name_parameters` leaves out, each with the one that its memory is trained under.

    Example:
        >>> import torch
        >>> weight = torch.ones(2)
        >>> tied_names([{"params": [weight, weight.view(2)], "param_names": ["embed", "head"]}])
        {'head': 'embed'}
    """
    named, first = _all_names(param_groups), name_parameters(param_groups)
    by_memory = {memory_of(tensor): name for name, tensor in first.items()}
    return {name: by_memory[memory_of(tensor)] for name, tensor in named.items() if name not in first}


def check_tied_groups(param_groups: list[dict[str, Any]], settings: Iterable[str]) -> None:
    """Refuse tied weights in parameter groups with different settings, of which only the first would count.

    Args:
        param_groups: Groups as ``torch.optim.Optimizer`` keeps them.
        settings: Names of the settings that groups have.

    Raises:
        UsageError: If there are any.
    """
    numbers = [number for number, group in enumerate(param_groups) for _ in group["params"]]
    number_of = dict(zip(_all_names(param_groups), numbers))
    for name, first in tied_names(param_groups).items():
        one, other = number_of[first], number_of[name]
        for setting in settings:
            values = param_groups[one][setting], param_groups[other][setting]
            if values[0] != values[1]:
                raise UsageError(
                    f"Parameters {first!r} and {name!r} have the same memory, and their parameter groups {one} and "
                    f"{other} have different {setting} ({values[0]} and {values[1]}): put both into one group, or give "
                    "the groups the same settings."
                )


def _all_names(param_groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for group in param_groups:
        names = group.get("param_names")
        for position, tensor in enumerate(group["params"]):
            name = names[position] if names else str(len(named))
            if name in named:
                raise UsageError(
                    f"Two parameters are named {name!r}, and directions are keyed by name: give one another name, as "
                    "head.named_parameters(prefix='head') does."
                )
            if not tensor.is_floating_point():
                raise UsageError(
                    f"Parameter {name!r} is stored as {tensor.dtype}, which cannot be perturbed: "
                    "dequantize the model, or train a LoRA adapter on top of it."
                )
            if tensor.is_inference():
                raise UsageError(
                    f"Parameter {name!r} was made under torch.inference_mode() and cannot be trained: make or load the "
                    "model outside of it."
                )
            if tensor.is_meta:
                raise UsageError(f"Parameter {name!r} has no memory (device meta): load the weights first.")
            named[name] = tensor
    return named


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a module's trainable parameters into one group that decays and one that does not.

    Matrices (two or more dimensions) of any module decay; biases and other vectors, and everything that belongs to a
    normalisation layer, do not.  The owner's type decides, not the parameter's name, so LLaMA's ``model.norm`` or a
    layer called ``bias_net`` come out right.  Layers count as normalisation when they are one of torch's, or their
    class is called ``...Norm`` as the RMS norms of transformers are.

    Args:
        module: The model.
        weight_decay: Decay of the first group.

    Returns:
        Parameter groups for an optimizer, named; empty ones are left out.

    Example:
        >>> groups = decay_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.1)
        >>> [(group["weight_decay"], [name for name, _ in group["params"]]) for group in groups]
        [(0.1, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
    """
    owners: dict[int, nn.Module] = {}
    for owner in module.modules():
        for tensor in owner.parameters(recurse=False):
            owners.setdefault(id(tensor), owner)
    decaying: list[tuple[str, Tensor]] = []
    resting: list[tuple[str, Tensor]] = []
    for name, tensor in module.named_parameters():
        if tensor.requires_grad:
            decays = tensor.ndim >= 2 and not is_norm(owners[id(tensor)])
            (decaying if decays else resting).append((name, tensor))
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": resting, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation layer.

    Example:
        >>> is_norm(nn.RMSNorm(4)), is_norm(nn.Linear(4, 4))
        (True, False)
    """
    return isinstance(module, NORMS) or type(module).__name__.lower().endswith("norm")
