"""Refuses saved states of other parameters, which would fail, or train something else, steps later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.estimators.base import Estimator
from zokernel.estimators.per_example import PerExample
from zokernel.readable import plural

_REMEDY = "make the optimizer as it was."


def estimator_kind(estimator: Estimator) -> str:
    """Return what kind of estimator this is, whatever its settings.

    Example:
        >>> from zokernel.estimators import TwoPoint
        >>> estimator_kind(PerExample(TwoPoint(1e-2)))
        'PerExample(TwoPoint)'
    """
    kind = type(estimator).__name__
    return f"{kind}({estimator_kind(estimator.inner)})" if isinstance(estimator, PerExample) else kind


def shapes_of(parameters: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the shapes of parameters by name, as a saved state holds them."""
    return {name: list(tensor.shape) for name, tensor in parameters.items()}


def check_parts(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Refuse a state of other parts; parts that an earlier version did not name are taken to be the same.

    Raises:
        UsageError: If a part differs.

    Example:
        >>> check_parts({"estimator": "TwoPoint"}, {"estimator": "Smoothed"})
        Traceback (most recent call last):
        zokernel.errors.UsageError: This state was saved with estimator 'TwoPoint', and this optimizer has ...
    """
    for kind, part in own.items():
        if saved.get(kind, part) != part:
            raise UsageError(
                f"This state was saved with {kind} {saved[kind]!r}, and this optimizer has {part!r}: {_REMEDY}"
            )


def check_shapes(saved: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]) -> None:
    """Refuse a state of parameters of other names or shapes, or in another order.

    Args:
        saved: Shapes by name, of the state.
        own: Those of the optimizer.

    Raises:
        UsageError: If they differ.

    Example:
        >>> check_shapes({"weight": [3, 2]}, {"weight": [4, 2]})
        Traceback (most recent call last):
        zokernel.errors.UsageError: This state was saved with parameter 'weight' of shape (3, 2), and this optimizer ...
    """
    if len(saved) != len(own):
        raise UsageError(
            f"This state was saved with {plural(len(saved), 'parameter')}, and this optimizer has {len(own)}: {_REMEDY}"
        )
    for (name, shape), (own_name, own_shape) in zip(saved.items(), own.items()):
        if name != own_name:
            raise UsageError(
                f"This state was saved with parameter {name!r} where this optimizer has {own_name!r}: {_REMEDY}"
            )
        if tuple(shape) != tuple(own_shape):
            raise UsageError(
                f"This state was saved with parameter {name!r} of shape {tuple(shape)}, and this optimizer has it with "
                f"shape {tuple(own_shape)}: {_REMEDY}"
            )


def check_groups(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a state of other parameter groups.

    Raises:
        UsageError: If their number or sizes differ.

    Example:
        >>> check_groups([{"params": [0, 1]}], [{"params": [0]}, {"params": [1]}])
        Traceback (most recent call last):
        zokernel.errors.UsageError: This state was saved with parameter groups of 2 tensors, and this optimizer ...
    """
    sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in (saved, own))
    if sizes != own_sizes:
        raise UsageError(
            f"This state was saved with parameter groups of {' + '.join(map(str, sizes))} tensors, and this optimizer "
            f"has groups of {' + '.join(map(str, own_sizes))}: {_REMEDY}"
        )


def check_first_order_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state that a first-order optimizer cannot continue from; it holds no shapes but those of its tensors.

    Raises:
        UsageError: If another optimizer saved it, or it is of other parameters.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    is_other = any((setting in group) != (setting in own[0]) for group in saved for setting in ("momentum", "betas"))
    if "zeroth_order" in state or is_other:
        raise UsageError(
            f"This state was not saved by {type(optimizer).__name__}: load it into the optimizer that saved it."
        )
    check_groups(saved, own)
    names = [group.get("param_names", [str(identity) for identity in group["params"]]) for group in saved]
    tensors = [tensor for group in own for tensor in group["params"]]
    identities = [identity for group in saved for identity in group["params"]]
    for name, identity, tensor in zip([name for group in names for name in group], identities, tensors):
        for value in state["state"].get(identity, {}).values():
            if isinstance(value, Tensor) and value.ndim:  # a number of steps has no dimension
                check_shapes({name: value.shape}, {name: tensor.shape})
