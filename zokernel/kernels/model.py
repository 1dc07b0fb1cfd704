r"""One view of every model: ``f(params, batch) -> (R, V)`` logits, with only the trainable parameters as arguments.

A row R is one scored position: one for each example, or one for each token of a sequence scored by teacher forcing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zokernel.errors import UsageError

# Shape suffixes: N examples, T tokens, L scored positions, R = N or N L rows, V outputs.

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
Params = dict[str, Tensor]
POSITIONS = "positions"


class FunctionalModel:
    """A model as a function of its trainable parameters.

    Hugging Face models take dicts.  A causal LM is scored at the last attended token of each row, a masked LM at the
    positions given as ``batch["positions"]``, shape (N,) or (N, L); only those positions reach the LM head when the
    model supports it.  Caches are off, so that evaluating the model never changes it.

    Args:
        model: An ``nn.Module`` (plain, Hugging Face or PEFT), or ``f(params, batch) -> (R, V)``.
        params: Parameters of a bare function by name; for a module, the trainable ones are taken.
        outputs: Candidate outputs (classes or token ids) to keep, in this order; all of them when ``None``.

    Attributes:
        params: Trainable parameters by name, detached; they share memory with the module.

    Raises:
        UsageError: If there is nothing to train, weights are quantized, or a bare function comes without ``params``.

    Example:
        >>> model = FunctionalModel(nn.Linear(3, 2), outputs=[1])
        >>> model(model.params, torch.zeros(5, 3)).shape, model.dim
        (torch.Size([5, 1]), 8)
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Params, Any], Tensor],
        *,
        params: Params | None = None,
        outputs: Sequence[int] | Tensor | None = None,
    ):
        self.module = model if isinstance(model, nn.Module) else None
        self.function = None if isinstance(model, nn.Module) else model
        if params is None:
            if self.module is None:
                raise UsageError("A function f(params, x) needs its parameters: pass params={name: tensor}.")
            params = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not params:
            raise UsageError(
                "The model has no trainable parameter, so every kernel is zero: set requires_grad=True on the weights "
                "to study, or load the adapter with is_trainable=True."
            )
        for name, tensor in params.items():
            if not tensor.is_floating_point():
                raise UsageError(
                    f"Parameter {name!r} is stored as {tensor.dtype}, which has no derivative: dequantize the model, "
                    "or study a LoRA adapter on top of it."
                )
        self.params: Params = {name: tensor.detach() for name, tensor in params.items()}
        self.outputs = None if outputs is None else torch.as_tensor(outputs, dtype=torch.long).flatten()

    @property
    def dim(self) -> int:
        """Number of trainable parameters d."""
        return sum(tensor.numel() for tensor in self.params.values())

    @property
    def itemsize(self) -> int:
        """Bytes of one number in the widest parameter."""
        return max(tensor.element_size() for tensor in self.params.values())

    @property
    def is_hugging_face(self) -> bool:
        """Whether the module is called with token ids, as transformers and PEFT models are."""
        return (
            self.module is not None and hasattr(_base(self.module), "config") and hasattr(_base(self.module), "dtype")
        )

    def with_outputs(self, outputs: Sequence[int] | Tensor | None) -> FunctionalModel:
        """Return the same model restricted to other candidate outputs (sharing parameters)."""
        model = self.module if self.module is not None else self.function
        assert model is not None
        return FunctionalModel(model, params=self.params, outputs=outputs)

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (R, V) of ``batch`` at ``params``."""
        logits = self._select(self._forward(params, batch), batch)
        if self.outputs is not None:
            logits = logits[:, self.outputs.to(logits.device)]
        return logits

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (R, V) of ``batch`` at the current weights, without a graph."""
        return self.logits_at(self.params, batch)

    def logits_at(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (R, V) of ``batch`` at ``params``, without a graph."""
        with torch.no_grad():
            return self(params, batch)

    def _forward(self, params: Params, batch: Batch) -> Tensor:
        if self.function is not None:
            return self.function(params, batch)
        assert self.module is not None
        if isinstance(batch, Mapping):
            kwargs = self._keywords(batch)
            out = functional_call(self.module, params, (), kwargs)
        else:
            args = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            out = functional_call(self.module, params, args)
        out = getattr(out, "logits", out)
        return out[0] if isinstance(out, tuple) else out

    def _keywords(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what the module is called with: no cache, no labels, and the head only where logits are needed."""
        if batch.get("past_key_values") is not None:
            raise UsageError("A batch with past_key_values depends on an earlier forward pass: pass the whole input.")
        kwargs: dict[str, Any] = {k: v for k, v in batch.items() if k not in (POSITIONS, "labels")}
        if self.is_hugging_face:
            accepted = _signature(self.module)
            if "use_cache" in accepted:
                kwargs["use_cache"] = False
            if "logits_to_keep" in accepted:
                kwargs["logits_to_keep"] = torch.unique(self.positions(batch))
        return kwargs

    def positions(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scored positions (N,) or (N, L) of a batch of token ids."""
        if POSITIONS in batch:
            return batch[POSITIONS]
        if self.module is not None and type(_base(self.module)).__name__.endswith("ForMaskedLM"):
            raise UsageError(
                "A masked language model needs to know where to look: put the index of each row's mask token in "
                "batch['positions'], shape (N,)."
            )
        ids = batch["input_ids"] if "input_ids" in batch else next(iter(batch.values()))
        mask = batch.get("attention_mask")
        num_examples, length = ids.shape[:2]
        if mask is None:
            return torch.full((num_examples,), length - 1, dtype=torch.long, device=ids.device)
        return length - 1 - mask.flip(-1).long().argmax(-1)

    def _select(self, logits: Tensor, batch: Batch) -> Tensor:
        """Reduce logits of any layout to (R, V)."""
        if logits.ndim == 1:
            return logits[None]
        if logits.ndim == 2:
            return logits
        if logits.ndim != 3:
            raise UsageError(
                f"The model returned logits of shape {tuple(logits.shape)}: (N, V) or (N, T, V) is needed."
            )
        if not isinstance(batch, Mapping):
            return logits[:, -1]
        positions = self.positions(batch)
        if self.is_hugging_face and "logits_to_keep" in _signature(self.module):
            positions = torch.searchsorted(torch.unique(positions), positions)
        return gather_positions(logits, positions)


def wrap(model: Any, *, params: Params | None = None, outputs: Sequence[int] | Tensor | None = None) -> FunctionalModel:
    """Return ``model`` as a :class:`FunctionalModel` (itself when it is one and nothing else is asked).

    Args:
        model: A module, a function ``f(params, batch)``, or a :class:`FunctionalModel`.
        params: Parameters of a bare function.
        outputs: Candidate outputs to keep.

    Returns:
        The functional view.
    """
    if isinstance(model, FunctionalModel):
        return model if outputs is None else model.with_outputs(outputs)
    return FunctionalModel(model, params=params, outputs=outputs)


def gather_positions(values_NTX: Tensor, positions: Tensor) -> Tensor:
    """Return rows (N, X) or (N L, X) of ``values_NTX`` at ``positions`` of shape (N,) or (N, L).

    Example:
        >>> gather_positions(torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[0, 2]]))
        tensor([[0., 1.], [4., 5.]])
    """
    rows = torch.arange(values_NTX.shape[0], device=values_NTX.device)
    if positions.ndim == 1:
        return values_NTX[rows, positions]
    return values_NTX[rows[:, None], positions].flatten(0, 1)


def examples(batch: Batch) -> Iterator[Batch]:
    """Yield the examples of a batch one by one, each as a batch of one.

    Example:
        >>> [tuple(x.shape) for x in examples(torch.zeros(2, 3))]
        [(1, 3), (1, 3)]
    """
    for n in range(num_examples(batch)):
        yield slice_batch(batch, n, n + 1)


def num_examples(batch: Batch) -> int:
    """Return the number of examples N of a batch (a one-dimensional tensor is one example)."""
    first = _first(batch)
    return 1 if first.ndim == 1 else first.shape[0]


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Return examples ``start`` to ``stop`` of a batch."""
    if _first(batch).ndim == 1:
        return batch
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: value[start:stop] for key, value in batch.items()}
    return tuple(value[start:stop] for value in batch)


def concatenate(batches: Sequence[Batch]) -> Batch | None:
    """Return all examples as one batch, or ``None`` when their shapes differ (they are then evaluated in turn).

    Example:
        >>> concatenate([torch.zeros(1, 3), torch.zeros(2, 3)]).shape
        torch.Size([3, 3])
        >>> concatenate([torch.zeros(1, 3), torch.zeros(1, 4)]) is None
        True
    """
    first: Any = batches[0]
    if isinstance(first, Tensor):
        alike = all(isinstance(b, Tensor) and b.ndim > 1 and b.shape[1:] == first.shape[1:] for b in batches)
        return torch.cat(list(batches)) if alike else None  # type: ignore[arg-type]
    keys: Any = first.keys() if isinstance(first, Mapping) else range(len(first))
    if any(type(b) is not type(first) or len(b) != len(first) for b in batches):
        return None
    joined: dict[Any, Any] = {key: concatenate([b[key] for b in batches]) for key in keys}
    if any(value is None for value in joined.values()):
        return None
    return joined if isinstance(first, Mapping) else tuple(joined.values())


def teacher_forcing(
    prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], *, pad_token_id: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    r"""Build the batch that scores whole sequences, :math:`\log\pi(y|x) = \sum_l \log\pi(y_l | x, y_{<l})`.

    Args:
        prompts: Token ids of each x; not empty.
        targets: Token ids of each y.
        pad_token_id: Fills shorter rows on the right; never attended.

    Returns:
        A batch whose logits at ``positions`` (N, L) predict the targets (N, L); rows with fewer tokens than L are
        padded with target -100, which the dynamics ignore.

    Raises:
        UsageError: If a prompt or a target is empty.

    Example:
        >>> batch, y = teacher_forcing([[5, 6], [7]], [[8], [9, 4]])
        >>> batch["positions"].tolist(), y.tolist()
        ([[1, 0], [0, 1]], [[8, -100], [9, 4]])
    """
    if any(len(x) == 0 for x in prompts) or any(len(y) == 0 for y in targets):
        raise UsageError("Every prompt and every target needs at least one token.")
    width = max(len(x) + len(y) for x, y in zip(prompts, targets, strict=True))
    longest = max(len(y) for y in targets)
    ids = torch.full((len(prompts), width), pad_token_id)
    mask, positions = torch.zeros_like(ids), torch.zeros(len(prompts), longest, dtype=torch.long)
    labels = torch.full((len(prompts), longest), -100)
    for row, (x, y) in enumerate(zip(prompts, targets, strict=True)):
        ids[row, : len(x) + len(y)] = torch.tensor([*x, *y])
        mask[row, : len(x) + len(y)] = 1
        positions[row, : len(y)] = torch.arange(len(x) - 1, len(x) - 1 + len(y))
        labels[row, : len(y)] = torch.tensor(list(y))
    return {"input_ids": ids, "attention_mask": mask, POSITIONS: positions}, labels


def _first(batch: Batch) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    return next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]


def _base(module: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or the module itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]


def _signature(module: nn.Module | None) -> set[str]:
    assert module is not None
    return set(inspect.signature(_base(module).forward).parameters)
