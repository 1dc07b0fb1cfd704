r"""The tangent kernel of a model that ends in a vocabulary-sized linear head, without a V x V matrix.

With logits :math:`z = W h + b` and the kernel of the hidden state :math:`K_h = J_{h,o} J_{h,u}^T` (h x h),

.. math:: K = (\langle h_o, h_u\rangle + 1) I + W K_h W^T + S_u R_u W^T + W R_o^T S_o^T

The first term is the head's own weight (and bias), exactly; the last two appear when the head is tied to the input
embedding, and live on the tokens of the prompts only: row v of :math:`R_u` is the derivative of :math:`h_u` when the
embedding of token v moves along :math:`h_o`.  V pull-backs become h of them, and norms and products of K cost
:math:`O(V h)` memory: ``K = scale I + L core R^T`` with ``L = [W, S_u]`` and ``R = [W, S_o]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp

from zokernel.errors import UsageError
from zokernel.kernels import blocks, checks
from zokernel.kernels.batches import Batch
from zokernel.kernels.model import FunctionalModel
from zokernel.theory.kernel_error import KernelMoments
from zokernel.without_adapter import without_adapter

# Shape suffixes: V vocabulary, H hidden size, T distinct tokens of a prompt, P directions.


@dataclass(frozen=True)
class Head:
    """The linear head of a model.

    Attributes:
        module: The head, with ``weight`` (V, H).
        weight_name: Name of its weight among the trainable parameters; ``None`` when it is frozen.
        bias_name: The same for the bias.
        tied: Whether the weight is also the input embedding.
    """

    module: nn.Linear
    weight_name: str | None
    bias_name: str | None
    tied: bool

    @property
    def hidden_size(self) -> int:
        """Width h of the hidden state."""
        return self.module.weight.shape[1]


@dataclass(frozen=True)
class HeadKernel:
    """A tangent kernel in factored form.

    Attributes:
        scale: What multiplies the identity.
        weight_VH: W.
        body_HH: Kernel of the hidden state.
        tokens_o: Distinct tokens of the observed prompt; empty unless the head is tied.
        tied_o_TH: Rows of :math:`R_o`, one per token.
        tokens_u: Distinct tokens of the updated prompt.
        tied_u_TH: Rows of :math:`R_u`.
    """

    scale: float
    weight_VH: Tensor
    body_HH: Tensor
    tokens_o: Tensor
    tied_o_TH: Tensor
    tokens_u: Tensor
    tied_u_TH: Tensor

    @property
    def core(self) -> Tensor:
        """The small matrix between the two factors."""
        hidden, count_u, count_o = len(self.body_HH), len(self.tokens_u), len(self.tokens_o)
        core = self.body_HH.new_zeros(hidden + count_u, hidden + count_o, dtype=torch.float64)
        core[:hidden, :hidden] = self.body_HH
        core[hidden:, :hidden] = self.tied_u_TH
        core[:hidden, hidden:] = self.tied_o_TH.T
        return core

    def left_product(self, values_VP: Tensor) -> Tensor:
        """Return :math:`L^T` times columns of vocabulary size, (H + T_u, P)."""
        return torch.cat([self.weight_VH.T @ values_VP, values_VP[self.tokens_u]]).double()

    def right_product(self, values_VP: Tensor) -> Tensor:
        """Return :math:`R^T` times columns of vocabulary size, (H + T_o, P)."""
        return torch.cat([self.weight_VH.T @ values_VP, values_VP[self.tokens_o]]).double()

    def _gram(self, tokens_left: Tensor, tokens_right: Tensor) -> Tensor:
        """Return [W, S_left]^T [W, S_right]."""
        weight = self.weight_VH
        same = (tokens_left[:, None] == tokens_right[None, :]).double()
        top = torch.cat([(weight.T @ weight).double(), weight[tokens_right].T.double()], dim=1)
        return torch.cat([top, torch.cat([weight[tokens_left].double(), same], dim=1)])

    def trace(self) -> float:
        """Return tr K; for a pair of equal inputs it is the squared Frobenius norm of J."""
        return self.scale * len(self.weight_VH) + torch.sum(self.core * self._gram(self.tokens_u, self.tokens_o)).item()

    def squared_norm(self) -> float:
        r"""Return :math:`\|K\|_F^2` without forming K."""
        core = self.core
        gram_u = self._gram(self.tokens_u, self.tokens_u)
        gram_o = self._gram(self.tokens_o, self.tokens_o)
        low_rank = torch.sum((gram_u @ core) * (core @ gram_o)).item()
        cross = torch.sum(core * self._gram(self.tokens_u, self.tokens_o)).item()
        return self.scale**2 * len(self.weight_VH) + 2 * self.scale * cross + low_rank

    def matvec(self, values_VP: Tensor) -> Tensor:
        """Return K times columns of vocabulary size, (V, P)."""
        inner = (self.core @ self.right_product(values_VP)).to(values_VP.dtype)
        hidden = self.weight_VH.shape[1]
        out = self.scale * values_VP + self.weight_VH @ inner[:hidden]
        return out.index_add(0, self.tokens_u, inner[hidden:])

    def bilinear(self, left_VP: Tensor, right_VP: Tensor) -> Tensor:
        """Return :math:`a_p^T K b_p` of paired columns, (P,), in float64."""
        straight = torch.sum(left_VP.double() * right_VP.double(), dim=0)
        return self.scale * straight + torch.sum(
            self.left_product(left_VP) * (self.core @ self.right_product(right_VP)), 0
        )

    def dense(self, outputs: Tensor | None = None) -> Tensor:
        """Return K, or its rows and columns ``outputs``, as a matrix."""
        outputs = torch.arange(len(self.weight_VH), device=self.weight_VH.device) if outputs is None else outputs
        weight = self.weight_VH[outputs]
        pick_u = (outputs[:, None] == self.tokens_u[None, :]).to(weight)
        pick_o = (outputs[:, None] == self.tokens_o[None, :]).to(weight)
        kernel = torch.cat([weight, pick_u], 1) @ self.core.to(weight) @ torch.cat([weight, pick_o], 1).T
        return kernel + self.scale * (outputs[:, None] == outputs[None, :]).to(weight)


def find_head(model: FunctionalModel) -> Head | None:
    """Return the linear head of a language model; ``None`` for a bare function or a LoRA-adapted head."""
    if model.module is None:
        return None
    base = without_adapter(model.module)
    get_head = getattr(base, "get_output_embeddings", None)
    module = get_head() if get_head is not None else getattr(base, "lm_head", None)
    if type(module) is not nn.Linear:
        return None
    names = {id(p): name for name, p in model.module.named_parameters() if name in model.params}
    get_embedding = getattr(base, "get_input_embeddings", None)
    embedding = get_embedding() if get_embedding is not None else None
    tied = embedding is not None and getattr(embedding, "weight", None) is module.weight
    bias = None if module.bias is None else names.get(id(module.bias))
    return Head(module, names.get(id(module.weight)), bias, tied)


def body_model(model: FunctionalModel, head: Head) -> FunctionalModel:
    """Return the model up to the input of its head, as a function of the same parameters: h (R, H)."""

    def hidden(params, batch: Batch) -> Tensor:
        inputs: list[Tensor] = []
        handle = head.module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        try:
            model._forward(params, batch)
        finally:
            handle.remove()
        return model._select(inputs[-1], batch)

    return FunctionalModel(hidden, params=model.params)


def head_kernel(
    model: FunctionalModel, x_o: Batch, x_u: Batch, *, chunk_size: int | None = None, check: bool = True
) -> HeadKernel:
    """Return the kernel between two single rows in factored form, over the whole vocabulary or the model's ``outputs``.

    Args:
        model: A :class:`FunctionalModel` of a language model.
        x_o: One observed example.
        x_u: One updated example.
        chunk_size: Rows of the hidden state's Jacobian in flight at once.
        check: Probe the model first (see :func:`zokernel.kernels.checks.validate`).

    Returns:
        The factors.

    Raises:
        UsageError: If the model is random or couples examples, has no plain linear head, or transforms the logits
            after it.
    """
    head = find_head(model)
    if head is None:
        raise UsageError("No plain linear head was found: use method='ntk_vp', or 'contraction' with outputs=.")
    if check:
        checks.validate(model, x_u, x_o, reverse=True)
    body = body_model(model, head)
    hidden_o, hidden_u = body.logits(x_o), body.logits(x_u)
    if len(hidden_o) != 1 or len(hidden_u) != 1:
        raise UsageError(
            "The head's factorisation is for one scored position on each side: pass one example at a time."
        )
    full = model.with_outputs(None)
    _check_linear(full.logits(x_o), nn.functional.linear(hidden_o, head.module.weight, head.module.bias))
    fits = blocks.block_bytes(body, x_o, x_u) <= min(4 * 2**30, checks.available_bytes() // 2)
    compute = blocks.contract if fits else blocks.stream
    scale = torch.sum(hidden_o.double() * hidden_u.double()).item() if head.weight_name else 0.0
    weight = head.module.weight.detach()
    none = torch.empty(0, dtype=torch.long, device=weight.device), weight.new_zeros(0, head.hidden_size)
    tied = head.tied and head.weight_name is not None
    tokens_o, tied_o = _tied_rows(body, head, x_o, hidden_u[0]) if tied else none
    tokens_u, tied_u = _tied_rows(body, head, x_u, hidden_o[0]) if tied else none
    kernel = HeadKernel(
        scale=scale + (1.0 if head.bias_name else 0.0),
        weight_VH=weight,
        body_HH=compute(body, x_o, x_u, chunk_size=chunk_size),
        tokens_o=tokens_o,
        tied_o_TH=tied_o,
        tokens_u=tokens_u,
        tied_u_TH=tied_u,
    )
    return kernel if model.outputs is None else _restrict(kernel, model.outputs)


def head_moments(model: FunctionalModel, x_o: Batch, x_u: Batch) -> tuple[HeadKernel, KernelMoments]:
    """Return the factored kernel of a pair and its exact moments (without D), over the whole vocabulary."""
    kernel = head_kernel(model, x_o, x_u)
    norm_o = head_kernel(model, x_o, x_o, check=False).trace()
    norm_u = head_kernel(model, x_u, x_u, check=False).trace()
    return kernel, KernelMoments(norm_o, norm_u, kernel.squared_norm(), dim=model.dim)


def _tied_rows(body: FunctionalModel, head: Head, example: Batch, direction_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct tokens of an example and the derivative of its hidden state along each one's embedding."""
    assert isinstance(example, Mapping)
    assert head.weight_name is not None
    name = head.weight_name
    tokens = torch.unique(example["input_ids"])
    rows = []
    for token in tokens:
        tangent = torch.zeros_like(body.params[name])
        tangent[token] = direction_H
        with torch.no_grad():
            derivative = jvp(lambda w: body({**body.params, name: w}, example), (body.params[name],), (tangent,))[1]
        rows.append(derivative[0])
    return tokens, torch.stack(rows)


def _restrict(kernel: HeadKernel, outputs: Tensor) -> HeadKernel:
    """Return the kernel of some outputs, in the same form."""

    def keep(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        places = [(int((outputs == t).nonzero()[0, 0]), i) for i, t in enumerate(tokens) if bool((outputs == t).any())]
        index = torch.tensor([i for _, i in places], dtype=torch.long)
        return torch.tensor([place for place, _ in places], dtype=torch.long), rows[index]

    tokens_o, tied_o = keep(kernel.tokens_o, kernel.tied_o_TH)
    tokens_u, tied_u = keep(kernel.tokens_u, kernel.tied_u_TH)
    return HeadKernel(kernel.scale, kernel.weight_VH[outputs], kernel.body_HH, tokens_o, tied_o, tokens_u, tied_u)


def _check_linear(logits: Tensor, recomputed: Tensor) -> None:
    scale = logits.abs().max().clamp_min(1e-12)
    if (logits - recomputed).abs().max() > 1e-3 * scale:
        raise UsageError(
            "The logits are not W h + b of the head found (soft-capping, scaling or a second head): "
            "use method='ntk_vp', or 'contraction' with outputs=."
        )
