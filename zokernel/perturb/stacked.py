r"""All points of a step in one forward: the batch is repeated, and each copy sees its own perturbed weights.

The weights themselves are never touched.  Copy k of the rows passes through :math:`\theta + \Delta_k`, where the change
:math:`\Delta_k` is either held (small tensors: adapters, norms, biases) or a product of two thin matrices (low-rank
directions), so that a layer costs

.. math:: x_k (W + L_k R_k)^T = x_k W^T + (x_k R_k^T) L_k^T

and all copies share the one multiplication by W, its conversion to bf16 and everything else that a forward costs once.
That pays when a forward is short: at large batches the multiplication itself takes the time.

Shapes: K copies, B rows per copy (rows are copy-major: K*B), O and I outputs and inputs of a layer, R rank of a change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.estimators.base import Offsets
from zokernel.perturb.base import Closure, Perturb
from zokernel.perturb.changes import Change, Copies, Flipped, Thin, stack
from zokernel.perturb.intercept import Intercepted, attribute_of
from zokernel.private_apis import flatten_and_unflatten

_flatten, _unflatten = flatten_and_unflatten()


class RowsError(UsageError):
    """The rows that a layer sees are not those of as many copies, or examples, as there are perturbed weights.

    Attributes:
        examples: How many examples the batch has, if that is known.
    """

    def __init__(self, message: str, examples: int = 0):
        super().__init__(message)
        self.examples = examples


class Stacked(Perturb):
    r"""Take many losses in one forward, each row of the batch with perturbed weights of its own.

    Args:
        losses: ``losses(copies)`` evaluates the batch repeated ``copies`` times, copy after copy, and returns the mean
            loss of each copy: (copies,).
        max_copies: Copies in one forward, which bounds the memory of activations; more points take more forwards.
        max_bytes: Bound on the perturbed copies of one forward.

    Raises:
        UsageError: When losses are taken, if the trained tensors do not fit, or a layer uses one in an unknown way.

    Example:
        >>> import zokernel
        >>> layer, inputs = torch.nn.Linear(3, 1), torch.ones(4, 3)
        >>> def losses(copies):
        ...     return layer(inputs.repeat(copies, 1)).square().view(copies, -1).mean(1)
        >>> optimizer = zokernel.optim.MeZO(layer, lr=0.01, num_perturbations=4, perturb=Stacked(losses))
        >>> loss = optimizer.step(lambda: layer(inputs).square().mean())
    """

    name = "stacked"

    def __init__(self, losses: Callable[[int], Tensor], *, max_copies: int = 16, max_bytes: int = 1 << 28):
        self.batched_losses, self.max_copies, self.max_bytes = losses, max_copies, max_bytes
        self._buffers: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_buffers": {}}

    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Return the losses at ``points``; ``closure`` is not called."""
        parameters, results = self.weights.tensors, []
        draw = {"seed": self.weights.seed, "step": step}
        for begin in range(0, len(points), self.max_copies):
            chunk = points[begin : begin + self.max_copies]
            changes = stack(parameters, self.weights.directions, chunk, self.max_bytes, self._buffers, **draw)
            with StackedParameters(parameters.values(), changes, len(chunk)):
                losses = self.batched_losses(len(chunk))
            if losses.shape != (len(chunk),):
                raise UsageError(
                    f"losses({len(chunk)}) returned shape {tuple(losses.shape)}: return one loss per copy, (copies,)."
                )
            results += losses.tolist()
        return results


class StackedParameters(Intercepted):
    """Context in which layers apply to each copy of the rows its own weights.

    Args:
        parameters: Trained parameters.
        changes: Perturbed copies or changes of them, by the parameter's identity.
        copies: K.
    """

    def __init__(self, parameters: Iterable[Tensor], changes: Mapping[int, Change], copies: int):
        super().__init__([tensor for tensor in parameters if id(tensor) in changes], self.run)
        self.changes, self.copies = changes, copies
        self.rows: int | None = None  # K*B, once a layer has seen the batch

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out an operation that involves a perturbed parameter."""
        if self.copies == 1:
            values, structure = _flatten((args, kwargs))
            if not any(isinstance(self.changes.get(id(value)), (Thin, Flipped)) for value in values):
                args, kwargs = _unflatten([self._single(value) for value in values], structure)
                return func(*args, **kwargs)
        if func not in _LAYERS:
            attribute = attribute_of(func)
            use = f"passes a trained parameter to {func.__name__}"
            if attribute is not None:
                use = f"uses .{attribute} of a trained parameter"
            raise UsageError(
                f"The model {use}, which has no form for several copies of the weights: use perturb='in_place'."
            )
        return _LAYERS[func](self, *args, **kwargs)

    def _single(self, value: Any) -> Any:
        """Return the one perturbed copy of a parameter, anything else as it is."""
        change = self.changes.get(id(value))
        return change.copies[0] if isinstance(change, Copies) else value

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        """Return a vector (or its copies) so that it broadcasts over rows of ``like``, (K*B, ..., H)."""
        change = self.changes.get(id(value))
        if change is None:
            return value
        assert isinstance(change, Copies)
        rows = change.copies.repeat_interleave(like.shape[0] // self.copies, 0)
        return rows.view(rows.shape[0], *[1] * (like.ndim - 2), rows.shape[-1])

    def grouped(self, rows: Tensor) -> Tensor:
        """Return rows (K*B, ..., I) as (K, M, I).

        Raises:
            UsageError: If they are not copies of a batch.
        """
        if rows.shape[0] % self.copies:
            raise RowsError(
                f"A layer got {rows.shape[0]} rows for {self.copies} copies of the batch: use perturb='in_place'."
            )
        self.rows = self.rows or rows.shape[0]
        return rows.reshape(self.copies, -1, rows.shape[-1])

    def product(self, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """Return x W^T (or x W, if ``transposed``) with each copy's own W, as (K*B, ..., O)."""
        change = self.changes.get(id(weight))
        if change is None:
            return x @ (weight if transposed else weight.T)
        if not isinstance(change, Copies) and x.dtype != change.dtype:
            x = x.to(change.dtype)  # as autocast would, but once
        rows = self.grouped(x)
        if isinstance(change, Copies):
            result = torch.bmm(rows, change.copies if transposed else change.copies.mT)
            return result.view(*x.shape[:-1], -1)
        base = x @ weight if transposed else F.linear(x, weight)
        # In place, into what nobody else has seen yet: one more read and write of the result, whatever the rank.
        by_copy = base.view(self.copies, -1, base.shape[-1])
        if isinstance(change, Flipped):
            before, after = (change.rows.mT, change.columns) if transposed else (change.columns, change.rows.mT)
            matrix = change.shared()
            product = F.linear(rows * before, matrix.mT if transposed else matrix)
            by_copy.addcmul_(product.to(base.dtype), after.to(base.dtype))
            return base
        first, second = (change.left, change.right) if transposed else (change.right.mT, change.left.mT)
        inner = torch.bmm(rows, first).to(base.dtype)
        if inner.shape[-1] == 1:
            by_copy.addcmul_(inner, second.to(base.dtype))
        else:
            by_copy.baddbmm_(inner, second.to(base.dtype))
        return base


def _linear(mode: StackedParameters, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result = mode.product(input, weight, transposed=False)
    return result if bias is None else result + mode.spread(bias, result)


def _addmm(mode: StackedParameters, bias: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    result = mode.product(input, weight, transposed=True)
    return result + mode.spread(bias, result)


def _embedding(
    mode: StackedParameters,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if max_norm is not None:
        raise UsageError("An embedding with max_norm rewrites its weights as they are read: use perturb='in_place'.")
    change = mode.changes[id(weight)]
    if input.shape[0] == 1 and mode.rows:  # positions that all rows share
        input = input.expand(mode.rows, *input.shape[1:])
    ids = mode.grouped(input.unsqueeze(-1)).squeeze(-1)
    if isinstance(change, Copies):
        output = torch.stack([copy[rows] for copy, rows in zip(change.copies, ids)])
    elif isinstance(change, Flipped):
        flips = change.rows.gather(1, ids.unsqueeze(-1)) * F.embedding(ids, change.shared()) * change.columns
        output = F.embedding(ids, weight) + flips
    else:
        left_rows = change.left.gather(1, ids.unsqueeze(-1).expand(-1, -1, change.left.shape[-1]))
        output = torch.baddbmm(F.embedding(ids, weight), left_rows, change.right)
    return output.view(*input.shape, -1)


def _layer_norm(
    mode: StackedParameters,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    result = F.layer_norm(input, normalized_shape, None, None, eps)
    result = result if weight is None else result * mode.spread(weight, result)
    return result if bias is None else result + mode.spread(bias, result)


def _multiply(mode: StackedParameters, left: Tensor, right: Tensor) -> Tensor:
    like = right if id(left) in mode.changes else left
    return mode.spread(left, like) * mode.spread(right, like)


_LAYERS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    torch.mul: _multiply,
    torch.Tensor.mul: _multiply,
    torch.Tensor.__mul__: _multiply,
    torch.Tensor.__rmul__: _multiply,
}
