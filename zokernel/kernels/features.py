r"""Jacobian features: the linear model that a network is to first order around its present weights.

.. math:: f(x; \theta) \approx f(x; \theta_0) + J(x)(\theta - \theta_0)

With the offset :math:`f(x; \theta_0)` this is the tangent model of the network.  Without it the linear model starts
from :math:`J(x)\theta_0`, another function (equal only for models homogeneous of degree one in their weights).  The
code of Zhang et al. (2026), arXiv:2603.21169, leaves it out, so both are offered (docs/theory.md, "B.2 Errata").
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from zokernel.errors import UsageError
from zokernel.kernels import checks
from zokernel.kernels.batches import examples
from zokernel.kernels.jacobians import example_jacobian, flatten
from zokernel.kernels.model import FunctionalModel, Model, Params, wrap
from zokernel.readable import readable_bytes

logger = logging.getLogger(__name__)

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
    model: Model,
    x: Tensor,
    *,
    params: Mapping[str, Tensor] | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    check: bool = True,
) -> Linearization:
    """Linearize a model at its present weights.

    Args:
        model: A module (use ``model.eval()``: dropout and batch statistics have no Jacobian), or ``f(params, x)``
            returning (N,) or (N, V).
        x: Inputs, first axis the examples.
        params: Weights to differentiate by name; for a module all that require a gradient, when not given.
        normalize: Scale every Jacobian row to length one, as the synthetic network experiment of Zhang et al.
            does (the result is then not the network's own tangent model).
        chunk_size: Examples differentiated at once; chosen from the number of parameters when not given.
        memory_budget: Bytes that the Jacobian may take.
        check: Probe the model for pitfalls first.

    Returns:
        The linearization; features of a single output are (n, d).

    Raises:
        UsageError: If the Jacobian would not fit, no parameter is trainable, the model is random or couples examples,
            or outputs are not finite or have the wrong shape.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> jacobian_features(layer, torch.tensor([[3.0, 4.0]])).features.tolist()
        [[3.0, 4.0, 1.0]]
    """
    model = wrap(model, params=params)
    checks.check_not_empty(x)
    if check:
        checks.check_modes(model)
    weights = model.params
    names = tuple((name, tuple(weight.shape)) for name, weight in weights.items())
    theta = torch.cat([weight.reshape(-1) for weight in weights.values()])
    outputs = model.logits(x)
    if len(outputs) != len(x):
        raise UsageError(f"The model must return (N,) or (N, V) for N = {len(x)} inputs, not {tuple(outputs.shape)}.")
    if not outputs.isfinite().all():
        raise UsageError("The model's outputs are not finite: check its weights and inputs.")
    size = outputs.numel() * theta.numel() * theta.element_size()
    if size > memory_budget:
        raise UsageError(
            f"The Jacobian of {outputs.numel():,} outputs in {theta.numel():,} parameters needs "
            f"{readable_bytes(size)} (allowed: {readable_bytes(memory_budget)}): use fewer examples, or choose fewer "
            "parameters with params=."
        )
    if check:
        checks.validate(model, x, reverse=True)
    chunk = chunk_size or max(1, min(len(x), 2**25 // max(1, theta.numel())))
    rows = _rows(model, x, chunk).detach()
    if outputs.shape[1] == 1:
        rows, outputs = rows.squeeze(1), outputs.squeeze(1)
    if normalize:
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return Linearization(rows, outputs, theta, names)


def _rows(model: FunctionalModel, x: Tensor, chunk: int) -> Tensor:
    """Return the Jacobian (n, V, d): of many examples at once where torch can batch the model, else one by one."""

    def single(parameters: Params, one: Tensor) -> Tensor:
        return model(parameters, one.unsqueeze(0)).squeeze(0)

    try:
        jacobian = vmap(jacrev(single), in_dims=(None, 0), chunk_size=chunk)(model.params, x)
        return torch.cat([jacobian[name].flatten(start_dim=2) for name in model.params], dim=-1)
    except RuntimeError as error:  # recurrent layers, for one, write in place to a state without an axis for vmap
        logger.info("The examples are differentiated one by one: %s", error)
        return torch.stack([flatten(example_jacobian(model, example)) for example in examples(x)])
