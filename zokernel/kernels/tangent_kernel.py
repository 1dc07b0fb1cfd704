r"""The empirical tangent kernel of first-order training, :math:`K(x_o, x_u) = J_o J_u^T` (ZO-eNTK eq. 3).

One gradient step on :math:`x_u` moves the logits of :math:`x_o` by :math:`-\eta K G`; ``K[i, j]`` is the inner product
of the gradients of logit i at :math:`x_o` and logit j at :math:`x_u`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.kernels import blocks, checks
from zokernel.kernels.jacobians import example_jacobian, inner_products, rows_per_example
from zokernel.kernels.lm_head import find_head, head_kernel
from zokernel.kernels.model import Batch, FunctionalModel, examples, wrap
from zokernel.theory.kernel_error import KernelMoments

logger = logging.getLogger(__name__)

METHODS = ("auto", "contraction", "ntk_vp", "lm_head")
# Jacobians up to this size are held without asking; beyond it the methods that hold none are faster to finish.
CONTRACTION_BUDGET = 4 * 2**30


def entk(
    model,
    x_o: Batch,
    x_u: Batch,
    *,
    outputs=None,
    method: str = "auto",
    params=None,
    chunk_size: int | None = None,
    check: bool = True,
) -> Tensor:
    r"""Return the exact tangent kernel between two inputs.

    ``contraction`` forms Jacobians; ``ntk_vp`` needs none (one vjp and one jvp for each output); ``lm_head`` uses
    :math:`K = \langle h_o, h_u\rangle I + W K_h W^T` (plus tied-embedding terms), h instead of V products; ``auto``
    takes the first if the Jacobians fit its budget, then the third if there is a head, then the second.

    Args:
        model: An ``nn.Module`` (plain, Hugging Face, PEFT), or ``f(params, x) -> (N, V)`` with ``params``.
        x_o: Observed input: a tensor (N_o, ...), or a dict for Hugging Face models.
        x_u: Updated input.
        outputs: Candidate outputs (classes, token ids) to keep on both sides.
        method: ``auto``, ``contraction``, ``ntk_vp`` or ``lm_head``.
        params: Parameters of a bare function.
        chunk_size: Rows in flight at once; by default as many as fit 512 MB.
        check: Probe the model for silent pitfalls first (one extra pass forward and back on one example).

    Returns:
        K: (V, V) for one example on each side, else (N_o, V, N_u, V); rows of sequences count as examples.

    Raises:
        UsageError: If the model cannot be differentiated as it is; the message says what to change.
        RunError: If the kernel does not fit in memory; sizes are logged before anything is allocated.

    Example:
        >>> model = torch.nn.Linear(2, 3, bias=False)
        >>> entk(model, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.,  0.,  0.],
                [ 0., 11.,  0.],
                [ 0.,  0., 11.]])
    """
    if method not in METHODS:
        raise UsageError(f"There is no method {method!r}: choose one of {', '.join(METHODS)}.")
    model = wrap(model, params=params, outputs=outputs)
    method = choose_method(model, x_o, x_u) if method == "auto" else method
    if check:
        checks.validate(model, x_u, forward=method != "contraction", reverse=True)
    rows_o, rows_u = model.logits(x_o).shape, model.logits(x_u).shape
    checks.announce(
        f"eNTK block {rows_o.numel():,} x {rows_u.numel():,} by {method}",
        rows_o.numel() * rows_u.numel() * model.itemsize + _method_bytes(model, x_o, x_u, method, rows_u[-1]),
        "restrict outputs= to the candidates of interest, or use method='lm_head' through head_kernel, whose norms "
        "and products need no V x V matrix",
    )
    if method == "lm_head":
        kernel = _pairwise(lambda o, u: head_kernel(model, o, u, chunk_size=chunk_size).dense(), x_o, x_u)
    else:
        compute = blocks.contract if method == "contraction" else blocks.stream
        kernel = compute(model, x_o, x_u, chunk_size=chunk_size)
    return shape_block(kernel, rows_o, rows_u)


def choose_method(model: FunctionalModel, x_o: Batch, x_u: Batch) -> str:
    """Return what ``auto`` means for this model and these inputs, and log why."""
    num_outputs = model.logits(x_u).shape[-1]
    needed = blocks.block_bytes(model, x_o, x_u, num_outputs, rows_per_example(model, x_u))
    if needed <= min(CONTRACTION_BUDGET, checks.available_bytes() // 2):
        method = "contraction"
    elif find_head(model) is not None and num_outputs > find_head(model).hidden_size:  # type: ignore[union-attr]
        method = "lm_head"
    else:
        method = "ntk_vp"
    logger.info("eNTK method: %s (Jacobians would take %s)", method, checks.human_bytes(needed))
    return method


def kernel_moments(
    model, x_o: Batch, x_u: Batch, *, outputs=None, params=None, diagonal: bool = True, check: bool = True
) -> KernelMoments:
    r"""Return :math:`\|J_o\|^2, \|J_u\|^2, \|K\|^2, D` and d of one pair, exactly: all that the error laws need.

    Args:
        model: As in :func:`entk`.
        x_o: Observed input; its examples count as one stacked Jacobian.
        x_u: Updated input.
        outputs: Candidate outputs to keep.
        params: Parameters of a bare function.
        diagonal: Also compute D (needed for Rademacher directions).
        check: As in :func:`entk`.

    Returns:
        The moments.

    Example:
        >>> round(kernel_moments(torch.nn.Linear(2, 3, bias=False), torch.ones(1, 2), torch.ones(1, 2)).rho, 6)
        0.57735
    """
    model = wrap(model, params=params, outputs=outputs)
    if check:
        checks.validate(model, x_u, reverse=True)
    num_outputs, rows = model.logits(x_u).shape[-1], rows_per_example(model, x_u)
    checks.announce(
        f"Jacobians of {model.dim:,} parameters",
        blocks.block_bytes(model, x_o, x_u, num_outputs, rows),
        "restrict outputs= to the candidates of interest, or use head_kernel(...).moments",
    )
    observed = [example_jacobian(model, example) for example in examples(x_o)]
    updated = observed if x_o is x_u else [example_jacobian(model, example) for example in examples(x_u)]
    norm_o = norm_u = overlap = 0.0
    kernel: Tensor | float = 0.0
    for name in model.params:
        left = torch.cat([jac[name].flatten(1) for jac in observed])
        right = left if x_o is x_u else torch.cat([jac[name].flatten(1) for jac in updated])
        norm_o += left.square().sum(dtype=torch.float64).item()
        norm_u += right.square().sum(dtype=torch.float64).item()
        kernel = kernel + inner_products(left, right)
        if diagonal:
            overlap += torch.sum(left.square().sum(0) * right.square().sum(0), dtype=torch.float64).item()
    assert isinstance(kernel, Tensor)
    return KernelMoments(norm_o, norm_u, kernel.square().sum().item(), overlap if diagonal else None, model.dim)


def layer_contributions(
    model, x_o: Batch, x_u: Batch, *, outputs=None, params=None, group: Callable[[str], str] | None = None
) -> dict[str, Tensor]:
    """Return each layer's share of the kernel; the shares add up to :func:`entk`.

    Args:
        model: As in :func:`entk`.
        x_o: Observed input.
        x_u: Updated input.
        outputs: Candidate outputs to keep.
        params: Parameters of a bare function.
        group: From a parameter's name to its layer's; by default the name without its last part.

    Returns:
        ``{layer: K_l}``, each shaped as :func:`entk` shapes the kernel.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
        >>> list(layer_contributions(net, torch.ones(1, 2), torch.ones(1, 2)))
        ['0', '2']
    """
    model = wrap(model, params=params, outputs=outputs)
    checks.validate(model, x_u, reverse=True)
    group = group or (lambda name: name.rpartition(".")[0] or name)
    rows_o, rows_u = model.logits(x_o).shape, model.logits(x_u).shape
    shares: dict[str, Tensor] = {}
    for name, share in blocks.contract_by_parameter(model, x_o, x_u).items():
        layer = group(name)
        shares[layer] = shares[layer] + share if layer in shares else share
    dtype = next(iter(model.params.values())).dtype
    return {layer: shape_block(share.to(dtype), rows_o, rows_u) for layer, share in shares.items()}


def shape_block(kernel: Tensor, rows_o: torch.Size, rows_u: torch.Size) -> Tensor:
    """Return a block (R_o V, R_u V) as (V, V) for single rows, else as (R_o, V, R_u, V)."""
    if rows_o[0] == rows_u[0] == 1:
        return kernel
    return kernel.reshape(*rows_o, *rows_u)


def _pairwise(compute: Callable[[Batch, Batch], Tensor], x_o: Batch, x_u: Batch) -> Tensor:
    return torch.cat([torch.cat([compute(o, u) for u in examples(x_u)], dim=1) for o in examples(x_o)])


def _method_bytes(model: FunctionalModel, x_o: Batch, x_u: Batch, method: str, num_outputs: int) -> int:
    if method == "contraction":
        return blocks.block_bytes(model, x_o, x_u, num_outputs, rows_per_example(model, x_u))
    return 4 * model.dim * model.itemsize
