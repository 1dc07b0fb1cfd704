r"""Two exact ways to a block :math:`K = J_o J_u^T` of the tangent kernel, for any differentiable model.

``contract`` holds the Jacobian of the updated examples and streams the rows of the observed ones: about 4VF
operations and V d numbers, best when V is small.  ``stream`` holds no Jacobian: each row of :math:`J_u` is pulled back,
then pushed through every observed example (vjp, then jvp): about 5VF operations and a few d numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap

from zokernel.kernels.batches import Batch, examples, num_examples, slice_batch
from zokernel.kernels.jacobians import example_jacobian, inner_products, jacobian_rows
from zokernel.kernels.model import FunctionalModel, Params

# Shape suffixes: N examples, R rows (N, or N L for sequences), V outputs; a block is (R_o V) x (R_u V).


def contract(model: FunctionalModel, x_o: Batch, x_u: Batch, *, chunk_size: int | None = None) -> Tensor:
    """Return the block by Jacobian contraction, parameter by parameter.

    Args:
        model: The model.
        x_o: Observed examples.
        x_u: Updated examples.
        chunk_size: Rows pulled back at once.

    Returns:
        K (R_o V, R_u V).
    """
    shares = contract_by_parameter(model, x_o, x_u, chunk_size=chunk_size)
    return torch.stack(list(shares.values())).sum(0).to(next(iter(model.params.values())).dtype)


def contract_by_parameter(
    model: FunctionalModel, x_o: Batch, x_u: Batch, *, chunk_size: int | None = None
) -> dict[str, Tensor]:
    """Return each parameter tensor's share of the block; the shares add up to it.

    Args:
        model: The model.
        x_o: Observed examples.
        x_u: Updated examples.
        chunk_size: Rows pulled back at once.

    Returns:
        ``{name: (R_o V, R_u V)}``, in float64.
    """
    updated = [example_jacobian(model, example, chunk_size=chunk_size) for example in examples(x_u)]
    if x_o is x_u:
        observed = [[rows] for rows in updated]
    else:
        observed = [[rows for _, rows in jacobian_rows(model, e, chunk_size=chunk_size)] for e in examples(x_o)]
    return {
        name: torch.cat(
            [
                torch.cat([inner_products(rows[name].flatten(1), jac[name].flatten(1)) for jac in updated], dim=1)
                for chunks in observed
                for rows in chunks
            ]
        )
        for name in model.params
    }


def stream(model: FunctionalModel, x_o: Batch, x_u: Batch, *, chunk_size: int | None = None) -> Tensor:
    """Return the block by products with the kernel (vjp at u, then jvp at o), without holding a Jacobian.

    Args:
        model: The model; it must support forward mode.
        x_o: Observed examples.
        x_u: Updated examples.
        chunk_size: Rows in flight at once; each takes d numbers several times over.

    Returns:
        K (R_o V, R_u V).
    """
    columns = [
        push(rows)
        for push in [pusher(model, x_o)]
        for example in examples(x_u)
        for _, rows in jacobian_rows(model, example, chunk_size=chunk_size)
    ]
    return torch.cat(columns).T.contiguous()


def pusher(model: FunctionalModel, batch: Batch) -> Callable[[Params], Tensor]:
    """Return a function from C tangents ``{name: (C, *shape)}`` to :math:`J u` (C, R V) at all of ``batch``."""

    def push_one(tangent: Params) -> Tensor:
        return jvp(lambda params: model(params, batch), (model.params,), (tangent,))[1].flatten()

    def push(tangents: Params) -> Tensor:
        count = next(iter(tangents.values())).shape[0]
        with torch.no_grad():
            if count == 1:
                return push_one({name: tensor[0] for name, tensor in tangents.items()})[None]
            return vmap(push_one)(tangents)

    return push


def block_bytes(model: FunctionalModel, x_o: Batch, x_u: Batch) -> int:
    """Return the bytes that ``contract`` holds at its peak: the Jacobians of both sides and one copy in flight."""
    rows, num_outputs = model.output_shape(slice_batch(x_u, 0, 1))
    count = num_examples(x_u) + (0 if x_o is x_u else num_examples(x_o)) + 1
    return count * rows * num_outputs * model.dim * model.itemsize


def shape_block(block: Tensor, shape_o: torch.Size, shape_u: torch.Size) -> Tensor:
    """Return a block of kernel entries in the shape that every kernel function returns.

    One row on each side gives (V_o, V_u); anything else gives (R_o, V_o, R_u, V_u), where each scored position of a
    sequence is a row.  This is the one place that decides it.

    Args:
        block: (R_o V_o, R_u V_u).
        shape_o: (R_o, V_o).
        shape_u: (R_u, V_u).

    Returns:
        The same entries.

    Example:
        >>> shape_block(torch.zeros(6, 3), torch.Size([2, 3]), torch.Size([1, 3])).shape
        torch.Size([2, 3, 1, 3])
    """
    return block if shape_o[0] == shape_u[0] == 1 else block.reshape(*shape_o, *shape_u)
