r"""Jacobians of the logits, :math:`J = \partial z / \partial\theta \in R^{V \times d}`, and products with them.

Products never form J: :math:`J u` is one forward-mode pass, :math:`J^T v` one reverse-mode pass.  Rows of J are pulled
back one example at a time (a batched pull-back would spend N examples on each row), several rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from zokernel.kernels import checks
from zokernel.kernels.batches import Batch, examples
from zokernel.kernels.model import FunctionalModel, Model, Outputs, Params, wrap

# Shape suffixes: N examples, R rows (N, or N L when whole sequences are scored), V outputs, C rows pulled back at once.

CHUNK_BYTES = 512 * 2**20
INNER_LENGTH = 2**18


def jacobian_vector_product(model: Model, batch: Batch, tangent: Params) -> Tensor:
    r"""Return :math:`J u`, exact, in one forward-mode pass.

    Args:
        model: A module, a function, or a :class:`FunctionalModel`.
        batch: Its input.
        tangent: u, by parameter name.

    Returns:
        Derivatives of the logits along u, (R, V).

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> jacobian_vector_product(model, torch.tensor([[3.0, 4.0]]), {"weight": torch.tensor([[1.0, 0.0]])})
        tensor([[3.]])
    """
    model = wrap(model)
    with torch.no_grad():
        return jvp(lambda params: model(params, batch), (model.params,), (tangent,))[1]


def vector_jacobian_product(model: Model, batch: Batch, cotangent_RV: Tensor) -> Params:
    r"""Return :math:`J^T v` in one reverse-mode pass.

    Args:
        model: A module, a function, or a :class:`FunctionalModel`.
        batch: Its input.
        cotangent_RV: v, shaped as the logits.

    Returns:
        A gradient by parameter name.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> vector_jacobian_product(model, torch.tensor([[3.0, 4.0]]), torch.ones(1, 1))["weight"]
        tensor([[3., 4.]])
    """
    model = wrap(model)
    _, pullback, *_ = vjp(lambda params: model(params, batch), model.params)
    return pullback(cotangent_RV)[0]


def jacobian_rows(
    model: FunctionalModel, example: Batch, *, chunk_size: int | None = None
) -> Iterator[tuple[slice, Params]]:
    """Yield rows of the Jacobian of one example, a chunk at a time, by parameter name.

    Args:
        model: The model.
        example: A batch of one example.
        chunk_size: Rows pulled back at once; by default as many as fit 512 MB.

    Yields:
        ``(rows, {name: (C, *shape)})`` with ``rows`` indexing the flattened logits (R V) of the example.
    """
    logits, pullback, *_ = vjp(lambda params: model(params, example), model.params)
    total = logits.numel()
    chunk_size = chunk_size or max(1, CHUNK_BYTES // (model.dim * model.itemsize))
    for start in range(0, total, chunk_size):
        rows = slice(start, min(start + chunk_size, total))
        one_hots = torch.zeros(rows.stop - rows.start, total, dtype=logits.dtype, device=logits.device)
        one_hots[torch.arange(len(one_hots)), torch.arange(rows.start, rows.stop)] = 1
        cotangents = one_hots.reshape(-1, *logits.shape)
        if len(cotangents) == 1:
            yield rows, {name: tensor[None] for name, tensor in pullback(cotangents[0])[0].items()}
        else:
            yield rows, vmap(lambda cotangent: pullback(cotangent)[0])(cotangents)


def example_jacobian(model: FunctionalModel, example: Batch, *, chunk_size: int | None = None) -> Params:
    """Return the whole Jacobian of one example by parameter name, each ``(R V, *shape)``."""
    chunks = [rows for _, rows in jacobian_rows(model, example, chunk_size=chunk_size)]
    if len(chunks) == 1:
        return chunks[0]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def jacobian(
    model: Model, batch: Batch, *, outputs: Outputs | None = None, chunk_size: int | None = None, check: bool = True
) -> Tensor:
    r"""Return the dense Jacobian of the logits with respect to all trainable parameters.

    Args:
        model: A module, a function, or a :class:`FunctionalModel`.
        batch: Its input.
        outputs: Candidate outputs to keep; all of them when ``None``.
        chunk_size: Rows pulled back at once.
        check: Probe the model first (see :func:`zokernel.kernels.checks.validate`).

    Returns:
        J (R, V, d), parameters flattened in the order of ``named_parameters``.

    Raises:
        RunError: If it does not fit in memory; the size is logged before anything is allocated.

    Example:
        >>> jacobian(torch.nn.Linear(2, 3), torch.ones(4, 2)).shape
        torch.Size([4, 3, 9])
    """
    model = wrap(model, outputs=outputs)
    if check:
        checks.validate(model, batch, reverse=True)
    shape = model.output_shape(batch)
    checks.announce(
        f"Jacobian {shape[0]} x {shape[1]} x {model.dim:,}",
        2 * shape.numel() * model.dim * model.itemsize,
        "restrict outputs= to the candidates of interest, or use a product (jvp, vjp) instead of the matrix",
    )
    blocks = []
    for example in examples(batch):
        rows = example_jacobian(model, example, chunk_size=chunk_size)
        blocks.append(flatten(rows))
    return torch.cat(blocks).reshape(*shape, model.dim)


def flatten(rows: Params) -> Tensor:
    """Return ``{name: (C, *shape)}`` as one matrix (C, d)."""
    return torch.cat([tensor.flatten(1) for tensor in rows.values()], dim=1)


def inner_products(left_AD: Tensor, right_BD: Tensor) -> Tensor:
    """Return all inner products of rows, (A, B) in float64, accurate for rows of any length.

    A single float32 product loses 0.3% over 3e7 coordinates and 3% over 1e8; summing pieces in float64 loses neither.

    Args:
        left_AD: Rows.
        right_BD: Rows of the same length.

    Returns:
        The inner products.

    Example:
        >>> inner_products(torch.ones(1, 3), torch.ones(2, 3)).tolist()
        [[3.0, 3.0]]
    """
    total = torch.zeros(len(left_AD), len(right_BD), dtype=torch.float64, device=left_AD.device)
    for left, right in zip(left_AD.split(INNER_LENGTH, dim=1), right_BD.split(INNER_LENGTH, dim=1), strict=True):
        total += (left @ right.T).double()
    return total


def dot(left: Params, right: Params) -> float:
    """Return the inner product of two vectors in parameter space, accumulated in float64."""
    return sum(torch.sum(left[name].double() * right[name].double()).item() for name in left)


def squared_norm(vector: Params) -> float:
    """Return the squared norm of a vector in parameter space, accumulated in float64."""
    return dot(vector, vector)
