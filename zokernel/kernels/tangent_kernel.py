r"""The empirical tangent kernel of first-order training, :math:`K(x_o, x_u) = J_o J_u^T`.

One gradient step on :math:`x_u` moves the logits of :math:`x_o` by :math:`-\eta K G`; ``K[i, j]`` is the inner product
of the gradients of logit i at :math:`x_o` and logit j at :math:`x_u`.  (Jacot et al. (2018), arXiv:1806.07572; for one
step on a loss, Li et al. (2026), arXiv:2605.03373, eq. 3.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.kernels import blocks, checks
from zokernel.kernels.batches import Batch, examples
from zokernel.kernels.blocks import shape_block
from zokernel.kernels.jacobians import example_jacobian, inner_products
from zokernel.kernels.lm_head import find_head, head_kernel
from zokernel.kernels.model import FunctionalModel, Model, Outputs, wrap
from zokernel.theory.kernel_error import KernelMoments

logger = logging.getLogger(__name__)

METHODS = ("auto", "contraction", "ntk_vp", "lm_head")
# Jacobians up to this size are held without asking; beyond it the methods that hold none are faster to finish.
CONTRACTION_BUDGET = 4 * 2**30


def entk(
    model: Model,
    x_o: Batch,
    x_u: Batch,
    *,
    outputs: Outputs | None = None,
    method: str = "auto",
    params: Mapping[str, Tensor] | None = None,
    chunk_size: int | None = None,
    check: bool = True,
) -> Tensor:
    r"""Return the exact tangent kernel between two inputs.

    ``contraction`` forms Jacobians; ``ntk_vp`` needs none (one vjp and one jvp per output); ``lm_head`` uses
    :math:`K = \langle h_o, h_u\rangle I + W K_h W^T` (plus tied-embedding terms), h instead of V products; ``auto``
    takes the first if the Jacobians fit its budget, then the third if there is a head, then the second.

    Args:
        model: An ``nn.Module`` (plain, Hugging Face, PEFT), or ``f(params, x) -> (N, V)`` with ``params``.
        x_o: Observed input: a tensor (N_o, ...), or tensors by name for Hugging Face models.
        x_u: Updated input.
        outputs: Candidate outputs (classes, token ids) to keep on both sides.
        method: ``auto``, ``contraction``, ``ntk_vp`` or ``lm_head``.
        params: Parameters of a bare function.
        chunk_size: Rows in flight at once; by default as many as fit 512 MB.
        check: Probe the model for silent pitfalls first: a few passes over one example and its neighbours.

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
    if check:
        checks.validate(model, x_u, x_o)
    method = choose_method(model, x_o, x_u) if method == "auto" else method
    if check:
        checks.check_derivatives(model, x_u, forward=method != "contraction", reverse=True)
    shape_o, shape_u = model.output_shape(x_o), model.output_shape(x_u)
    working_bytes = blocks.block_bytes(model, x_o, x_u) if method == "contraction" else 4 * model.dim * model.itemsize
    checks.announce(
        f"eNTK block {shape_o.numel():,} x {shape_u.numel():,} by {method}",
        shape_o.numel() * shape_u.numel() * model.itemsize + working_bytes,
        "restrict outputs= to the candidates of interest, or use method='lm_head' through head_kernel, whose norms "
        "and products need no V x V matrix",
    )
    if method == "lm_head":
        kernel = _pairwise(lambda o, u: head_kernel(model, o, u, chunk_size=chunk_size, check=False).dense(), x_o, x_u)
    else:
        compute = blocks.contract if method == "contraction" else blocks.stream
        kernel = compute(model, x_o, x_u, chunk_size=chunk_size)
    return shape_block(kernel, shape_o, shape_u)


def choose_method(model: FunctionalModel, x_o: Batch, x_u: Batch) -> str:
    """Return what ``auto`` means for this model and these inputs, and log why."""
    jacobian_bytes, head = blocks.block_bytes(model, x_o, x_u), find_head(model)
    if jacobian_bytes <= min(CONTRACTION_BUDGET, checks.available_bytes() // 2):
        method = "contraction"
    elif head is not None and model.output_shape(x_u)[1] > head.hidden_size:
        method = "lm_head"
    else:
        method = "ntk_vp"
    logger.info("eNTK method: %s (Jacobians would take %s)", method, checks.human_bytes(jacobian_bytes))
    return method


def kernel_moments(
    model: Model,
    x_o: Batch,
    x_u: Batch,
    *,
    outputs: Outputs | None = None,
    params: Mapping[str, Tensor] | None = None,
    diagonal: bool = True,
    check: bool = True,
) -> KernelMoments:
    r"""Return :math:`\|J_o\|^2, \|J_u\|^2, \|K\|^2, D` and d of one pair, exactly: all that the exact errors need.

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
        checks.validate(model, x_u, x_o, reverse=True)
    checks.announce(
        f"Jacobians of {model.dim:,} parameters",
        blocks.block_bytes(model, x_o, x_u),
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
    model: Model,
    x_o: Batch,
    x_u: Batch,
    *,
    outputs: Outputs | None = None,
    params: Mapping[str, Tensor] | None = None,
    group: Callable[[str], str] | None = None,
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
    checks.validate(model, x_u, x_o, reverse=True)
    group = group or (lambda name: name.rpartition(".")[0] or name)
    shape_o, shape_u = model.output_shape(x_o), model.output_shape(x_u)
    shares: dict[str, Tensor] = {}
    for name, share in blocks.contract_by_parameter(model, x_o, x_u).items():
        layer = group(name)
        shares[layer] = shares[layer] + share if layer in shares else share
    dtype = next(iter(model.params.values())).dtype
    return {layer: shape_block(share.to(dtype), shape_o, shape_u) for layer, share in shares.items()}


def _pairwise(compute: Callable[[Batch, Batch], Tensor], x_o: Batch, x_u: Batch) -> Tensor:
    return torch.cat([torch.cat([compute(o, u) for u in examples(x_u)], dim=1) for o in examples(x_o)])
