r"""Jacobian features: the linear model that a network is to first order around its present weights.

.. math:: f(x; \theta) \approx f(x; \theta_0) + J(x)(\theta - \theta_0)

With the offset :math:`f(x; \theta_0)` this is the tangent model of the network.  Without it the linear model starts
from :math:`J(x)\theta_0`, another function (equal only for models homogeneous of degree one in their weights); the
paper's code does that, so both are offered (theory B.2.8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from zokernel.errors import UsageError

# Shape suffixes: N examples, V outputs, D parameters.

MEMORY_BUDGET = 8 * 2**30  # bytes that the Jacobian may take unless the caller allows more


@dataclass(frozen=True)
class Linearization:
    r"""A model to first order around its present weights.

    Attributes:
        features: Jacobian rows, (n, d) for one output, (n, V, d) for several.
        outputs: The model's own outputs :math:`f(x; \theta_0)`, (n,) or (n, V).
        theta: The weights :math:`\theta_0`, flattened in the order of ``names``, (d,).
        names: Names of the parameters behind the columns, with their shapes.
    """

    features: Tensor
    outputs: Tensor
    theta: Tensor
    names: tuple[tuple[str, tuple[int, ...]], ...]

    def initial_predictions(self, offset: bool = True) -> Tensor:
        r"""Return where the linear model starts: :math:`f(x; \theta_0)`, or :math:`J \theta_0` without the offset."""
        return self.outputs if offset else self.features @ self.theta

    def predict(self, theta: Tensor, offset: bool = True) -> Tensor:
        r"""Return the linear model's predictions at weights :math:`\theta` (d,)."""
        return self.initial_predictions(offset) + self.features @ (theta - self.theta)


def jacobian_features(
    model: nn.Module | Callable[[Mapping[str, Tensor], Any], Tensor],
    x: Tensor,
    *,
    params: Mapping[str, Tensor] | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Linearization:
    """Linearize a model at its present weights.

    Args:
        model: A module (use ``model.eval()``: dropout and batch statistics have no Jacobian), or ``f(params, x)``
            returning (N,) or (N, V).
        x: Inputs, first axis the examples.
        params: Weights to differentiate by name; for a module all that require a gradient, when not given.
        normalize: Scale every Jacobian row to length one, as the paper's synthetic network experiment does (the
            result is then not the network's own tangent model).
        chunk_size: Examples differentiated at once; chosen from the number of parameters when not given.
        memory_budget: Bytes that the Jacobian may take.

    Returns:
        The linearization; features of a single output are (n, d).

    Raises:
        UsageError: If the Jacobian would not fit, no parameter is trainable, the model is in training mode with
            layers that behave differently there, or outputs are not finite.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> jacobian_features(layer, torch.tensor([[3.0, 4.0]])).features.tolist()
        [[3.0, 4.0, 1.0]]
    """
    call, weights = _functional(model, params)
    names = tuple((name, tuple(weight.shape)) for name, weight in weights.items())
    theta = torch.cat([weight.reshape(-1) for weight in weights.values()])
    with torch.no_grad():
        outputs = call(weights, x)
    if outputs.ndim not in (1, 2) or len(outputs) != len(x):
        raise UsageError(f"The model must return (N,) or (N, V) for N = {len(x)} inputs, not {tuple(outputs.shape)}.")
    if not outputs.isfinite().all():
        raise UsageError("The model's outputs are not finite: check its weights and inputs.")
    needed = outputs.numel() * theta.numel() * theta.element_size()
    if needed > memory_budget:
        raise UsageError(
            f"The Jacobian of {outputs.numel():,} outputs in {theta.numel():,} parameters needs "
            f"{needed / 2**30:.1f} GiB (allowed: {memory_budget / 2**30:.1f}): use fewer examples, or choose fewer "
            "parameters with params=."
        )

    def single(parameters: Mapping[str, Tensor], one: Tensor) -> Tensor:
        return call(parameters, one.unsqueeze(0)).squeeze(0)

    chunk = chunk_size or max(1, min(len(x), 2**25 // max(1, theta.numel())))
    jacobian = vmap(jacrev(single), in_dims=(None, 0), chunk_size=chunk)(weights, x)
    rows = torch.cat([jacobian[name].flatten(start_dim=outputs.ndim) for name in weights], dim=-1).detach()
    if outputs.ndim == 2 and outputs.shape[1] == 1:
        rows, outputs = rows.squeeze(1), outputs.squeeze(1)
    if normalize:
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return Linearization(rows, outputs, theta, names)


def _functional(
    model: nn.Module | Callable[[Mapping[str, Tensor], Any], Tensor], params: Mapping[str, Tensor] | None
) -> tuple[Callable[[Mapping[str, Tensor], Any], Tensor], dict[str, Tensor]]:
    if not isinstance(model, nn.Module):
        if params is None:
            raise UsageError("A function f(params, x) has no weights of its own: pass params=.")
        return model, {name: weight.detach() for name, weight in params.items()}
    for name, module in model.named_modules():
        if module.training and isinstance(module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)):
            raise UsageError(f"{type(module).__name__} {name!r} is in training mode: call model.eval() first.")
    chosen = params or {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not chosen:
        raise UsageError("The model has no trainable parameters: set requires_grad, or pass params=.")
    frozen = {name: weight.detach() for name, weight in model.named_parameters() if name not in chosen}
    frozen |= {name: buffer.detach() for name, buffer in model.named_buffers()}

    def call(parameters: Mapping[str, Tensor], inputs: Any) -> Tensor:
        return functional_call(model, {**frozen, **parameters}, (inputs,))

    return call, {name: weight.detach() for name, weight in chosen.items()}
