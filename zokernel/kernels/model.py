r"""One view of every model: ``f(params, batch) -> (R, V)`` logits, with only the trainable parameters as arguments.

A row R is one scored position: one per example, or one per token of a sequence scored by teacher forcing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zokernel.errors import UsageError
from zokernel.kernels.batches import (
    POSITIONS,
    Batch,
    first_tensor,
    gather_positions,
    has_examples,
    num_examples,
    slice_batch,
)
from zokernel.without_adapter import without_adapter

# Shape suffixes: N examples, T tokens, L scored positions, R = N or N L rows, V outputs.

Params = dict[str, Tensor]
Outputs: TypeAlias = Sequence[int] | Tensor
"""Candidate outputs (classes or token ids) to keep, in this order."""
Model: TypeAlias = "nn.Module | FunctionalModel | Callable[[Params, Any], Tensor]"
"""A module (plain, Hugging Face or PEFT), a :class:`FunctionalModel`, or ``f(params, batch) -> (R, V)``."""


class FunctionalModel:
    """A model as a function of its trainable parameters.

    Hugging Face models take tensors by name (a dict or a ``BatchEncoding``).  A causal LM is scored at the last
    attended token of each row, a masked LM at the positions given as ``batch["positions"]``, shape (N,) or (N, L); only
    those positions reach the LM head when the model supports it.  Caches are off, so that evaluating the model never
    changes it.  The shape of the logits is learned once per kind of input, from any forward pass.

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
        params: Mapping[str, Tensor] | None = None,
        outputs: Outputs | None = None,
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
        self._shapes: dict[tuple[Any, ...], tuple[int, int]] = {}  # kind of input -> rows per example, outputs

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
            self.module is not None
            and hasattr(without_adapter(self.module), "config")
            and hasattr(without_adapter(self.module), "dtype")
        )

    def with_outputs(self, outputs: Outputs | None) -> FunctionalModel:
        """Return the same model restricted to other candidate outputs (sharing parameters)."""
        model = self.module if self.module is not None else self.function
        assert model is not None
        return FunctionalModel(model, params=self.params, outputs=outputs)

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (R, V) of ``batch`` at ``params``."""
        logits = self._select(self._forward(params, batch), batch)
        if self.outputs is not None:
            logits = logits[:, self.outputs.to(logits.device)]
        self._shapes[self._kind(batch)] = (logits.shape[0] // num_examples(batch), logits.shape[1])
        return logits

    def output_shape(self, batch: Batch) -> torch.Size:
        """Return the shape (R, V) of the logits of ``batch``.

        The first input of a kind costs one forward on its first example, unless the model has been called on that kind
        before; later ones cost nothing.

        Args:
            batch: Input.

        Returns:
            Rows (examples, or scored positions of all sequences) and outputs.

        Example:
            >>> FunctionalModel(nn.Linear(3, 2)).output_shape(torch.zeros(1000, 3))
            torch.Size([1000, 2])
        """
        if num_examples(batch) == 0:
            raise UsageError("A batch has no examples, so there is no kernel: pass at least one.")
        kind = self._kind(batch)
        if kind not in self._shapes:
            self.logits(slice_batch(batch, 0, 1))
        rows, num_outputs = self._shapes[kind]
        return torch.Size((num_examples(batch) * rows, num_outputs))

    def _kind(self, batch: Batch) -> tuple[Any, ...]:
        """Return what the shape of an example's logits depends on: of token ids, only how many are scored."""
        if not isinstance(batch, Mapping):
            return tuple(tensor.shape[1:] for tensor in ((batch,) if isinstance(batch, Tensor) else batch))
        if self.is_hugging_face:
            return ("scored", *(batch[POSITIONS].shape[1:] if POSITIONS in batch else ()))
        return tuple((name, tensor.shape[1:]) for name, tensor in batch.items())

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
        if self.module is not None and type(without_adapter(self.module)).__name__.endswith("ForMaskedLM"):
            raise UsageError(
                "A masked language model needs to know where to look: put the index of each row's mask token in "
                "batch['positions'], shape (N,)."
            )
        ids = batch["input_ids"] if "input_ids" in batch else first_tensor(batch)
        mask = batch.get("attention_mask")
        num_examples, length = ids.shape[:2]
        if mask is None:
            return torch.full((num_examples,), length - 1, dtype=torch.long, device=ids.device)
        return length - 1 - mask.flip(-1).long().argmax(-1)

    def _select(self, logits: Tensor, batch: Batch) -> Tensor:
        """Reduce logits of any layout to (R, V)."""
        if logits.ndim == 1:  # one output of N examples, or V outputs of one example
            of_examples = has_examples(batch) and len(logits) == num_examples(batch)
            return logits[:, None] if of_examples else logits[None]
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


def wrap(
    model: Model, *, params: Mapping[str, Tensor] | None = None, outputs: Outputs | None = None
) -> FunctionalModel:
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


def _signature(module: nn.Module | None) -> set[str]:
    assert module is not None
    return set(inspect.signature(without_adapter(module).forward).parameters)
