"""An encoder that runs once per example, though the decoder has several rows for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.without_adapter import without_adapter


def refuse_trained_embeddings(model: nn.Module) -> None:
    """Refuse to give rows of a forward weights of their own where embeddings are trained.

    T5 looks up its relative positions once for all rows, which cannot be told from tokens of several copies.

    Raises:
        UsageError: If an embedding of the model is trained.
    """
    if any(isinstance(module, nn.Embedding) and module.weight.requires_grad for module in model.modules()):
        raise UsageError(
            "The losses of a sequence-to-sequence model cannot be stacked while its embeddings are trained, nor can "
            "examples have directions of their own: train an adapter, or leave out perturb stacked and per_example."
        )


class SharedEncoder:
    """Context in which a model's encoder computes each example once.

    The model is called with a row per option, as its own forward expects; hooks on its encoder leave out the repeated
    rows, and repeat the hidden states.

    Args:
        model: A sequence-to-sequence model of transformers, or a peft wrapper of one.
        examples_R: The example of each row, in order.

    Example:
        >>> import transformers
        >>> sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
        >>> model = transformers.T5ForConditionalGeneration(
        ...     transformers.T5Config(**sizes, decoder_start_token_id=0)
        ... ).eval()
        >>> ids = torch.tensor([[1, 2], [1, 2], [3, 4]])
        >>> with SharedEncoder(model, torch.tensor([0, 0, 1])):
        ...     shared = model(input_ids=ids, decoder_input_ids=ids).logits
        >>> torch.allclose(shared, model(input_ids=ids, decoder_input_ids=ids).logits, atol=1e-6)
        True
    """

    def __init__(self, model: nn.Module, examples_R: Tensor):
        self._encoder: nn.Module = without_adapter(model).get_encoder()
        new = torch.ones_like(examples_R, dtype=torch.bool)
        new[1:] = examples_R[1:] != examples_R[:-1]
        self._first_B, self._place_R = new.nonzero()[:, 0], new.cumsum(0) - 1

    def __enter__(self) -> None:
        self._handles = [
            self._encoder.register_forward_pre_hook(self._select, with_kwargs=True),
            self._encoder.register_forward_hook(self._repeat),
        ]

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _select(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(self._once, args)), {name: self._once(value) for name, value in kwargs.items()}

    def _once(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == len(self._place_R):
            return value[self._first_B]
        return value

    def _repeat(self, module: nn.Module, args: Any, output: Any) -> Any:
        return with_hidden(output, output[0][self._place_R])


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return the output of a backbone or an encoder with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})
