r"""Batches of inputs: a tensor, several tensors, or tensors by name, with one row per example.

Anything with the methods of a mapping counts as tensors by name, so the ``BatchEncoding`` of a transformers tokenizer
needs no conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokernel.errors import UsageError

# Shape suffixes: N examples, T tokens, L scored positions, X features.

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
POSITIONS = "positions"


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
    return first_tensor(batch).shape[0] if has_examples(batch) else 1


def has_examples(batch: Batch) -> bool:
    """Return whether a batch has an axis of examples; a one-dimensional tensor is one example without it."""
    return first_tensor(batch).ndim > 1


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Return examples ``start`` to ``stop`` of a batch."""
    if not has_examples(batch):
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
        same_kind = all(isinstance(b, Tensor) and b.ndim > 1 and b.shape[1:] == first.shape[1:] for b in batches)
        return torch.cat(list(batches)) if same_kind else None  # type: ignore[arg-type]
    named = isinstance(first, Mapping)
    keys: Any = list(first.keys()) if named else range(len(first))
    if any(isinstance(b, Tensor) or isinstance(b, Mapping) != named or len(b) != len(first) for b in batches):
        return None
    if named and any(set(b) != set(keys) for b in batches):
        return None
    concatenated: dict[Any, Any] = {key: concatenate([b[key] for b in batches]) for key in keys}
    if any(value is None for value in concatenated.values()):
        return None
    return concatenated if named else tuple(concatenated.values())


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


def first_tensor(batch: Batch) -> Tensor:
    """Return the tensor that decides how many examples there are."""
    if isinstance(batch, Tensor):
        return batch
    return next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
