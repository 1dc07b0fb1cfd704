"""Parameters that hold the matrices of several experts in one tensor, and short names for what repeats."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# The kinds of modules that peft adapts.
ADAPTABLE = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding")


def stacked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold one matrix for every expert or head, which are no modules, by name.

    Example:
        >>> import torch
        >>> experts = nn.Module()
        >>> experts.up, experts.bias = nn.Parameter(torch.ones(3, 4, 2)), nn.Parameter(torch.ones(1, 1, 2))
        >>> list(stacked_parameters(nn.ModuleDict({"experts": experts, "mix": nn.Conv1d(2, 2, 2)})))
        ['experts.up']
    """
    return {
        f"{name}.{own}" if name else own: parameter
        for name, module in model.named_modules()
        if not type(module).__name__.startswith(ADAPTABLE)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1
    }


def short_names(names: Iterable[str], *, parts: int = 1) -> list[str]:
    """Return the last parts of names, each once, without the numbers of layers."""
    ends = (".".join([part for part in name.split(".") if not part.isdigit()][-parts:]) for name in names)
    return list(dict.fromkeys(end for end in ends if end))
