r"""The micro-batches of a step, whose losses are averaged into the loss of the batch they make up.

Each loss is a mean over the terms of its micro-batch (examples, or scored tokens), so the average is weighted by their
numbers :math:`w_m`:

.. math:: L = \sum_m w_m L_m \Big/ \sum_m w_m
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.perturb.per_example import Examples

Batch = dict[str, Any]


class MicroBatches:
    """Collects the micro-batches of the coming step and takes its losses.

    Args:
        loss: Returns the loss of a micro-batch, a scalar.
        stacked: ``stacked(batch, copies)`` returns the losses of copies of a micro-batch in one forward: (copies,).
        weight: Returns how many terms the loss of a micro-batch is a mean over.
        example_terms: Returns each example's sum of losses, and how many terms that is over: (B, 2).

    Example:
        >>> batches = MicroBatches(lambda batch: batch["x"].mean(), None, lambda batch: len(batch["x"]))
        >>> batches.add({"x": torch.tensor([1.0, 2.0, 3.0])})
        >>> batches.add({"x": torch.tensor([10.0])})
        >>> batches.loss(), batches.weight()
        (tensor(4.), 4.0)
    """

    def __init__(
        self,
        loss: Callable[[Batch], Tensor],
        stacked: Callable[[Batch, int], Tensor] | None,
        weight: Callable[[Batch], float],
        example_terms: Callable[[Batch], Tensor] | None = None,
    ):
        self._loss, self._stacked, self._weight, self._example_terms = loss, stacked, weight, example_terms
        self._batches: list[Batch] = []
        self._weights: list[float] = []

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch) -> None:
        """Add a micro-batch."""
        self._batches.append(batch)
        self._weights.append(float(self._weight(batch)))

    def clear(self) -> None:
        """Forget the micro-batches, once the step is taken."""
        self._batches, self._weights = [], []

    def loss(self) -> Tensor:
        """Return the loss of all micro-batches together."""
        return weighted_mean([self._loss(batch) for batch in self._batches], self._weights)

    def stacked(self, copies: int) -> Tensor:
        """Return the loss of all micro-batches together for every copy: (copies,)."""
        assert self._stacked is not None
        return weighted_mean([self._stacked(batch, copies) for batch in self._batches], self._weights)

    def examples(self) -> list[Examples]:
        """Return the micro-batches by example: the mean of all examples' losses is the loss of the whole batch."""
        terms_of, terms = self._example_terms, self.weight()
        assert terms_of is not None
        total = sum(len(batch["labels"]) for batch in self._batches)

        def losses_of(batch: Batch) -> Callable[[], Tensor]:
            return lambda: terms_of(batch)[:, 0] * (total / terms)

        return [Examples(len(batch["labels"]), losses_of(batch), rows_of(batch)) for batch in self._batches]

    def weight(self) -> float:
        """Return how many terms the loss of all micro-batches together is a mean over."""
        return sum(self._weights)


def rows_of(batch: Batch) -> list[int] | None:
    """Return the example of every row, where options have rows of their own and not equally many of each example."""
    if "cells" not in batch or len(batch["cells"]) == len(batch["labels"]):
        return None
    examples = batch["cells"][:, 0] // batch["option_mask"].shape[1]
    counts = torch.bincount(examples)
    return None if bool((counts == counts[0]).all()) else examples.tolist()


def copy_batch(batch: Any) -> Any:
    """Return a batch from which ``compute_loss`` may remove entries; its tensors are shared."""
    kind: Any = type(batch)
    return kind(dict(batch)) if isinstance(batch, Mapping) else batch


def scalar_loss(loss: Any, owner: str) -> Tensor:
    """Return a loss of one number as a scalar.

    Args:
        loss: What ``compute_loss`` returned.
        owner: The class whose ``compute_loss`` it is.

    Raises:
        UsageError: If it is something else.

    Example:
        >>> scalar_loss(torch.ones(1), "Own").shape
        torch.Size([])
        >>> scalar_loss(None, "Own")
        Traceback (most recent call last):
        zokernel.errors.UsageError: Own.compute_loss returned None: it must return the batch's loss, a scalar tensor.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(())
    if isinstance(loss, Tensor):
        value = f"a tensor of shape {tuple(loss.shape)}"
    else:
        value = "None" if loss is None else f"a {type(loss).__name__}"
    raise UsageError(f"{owner}.compute_loss returned {value}: it must return the batch's loss, a scalar tensor.")


def weighted_mean(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the mean of losses (scalars, or vectors elementwise) weighted by ``weights``."""
    stacked = torch.stack(list(losses))
    if len(set(weights)) == 1:
        return stacked.mean() if stacked.ndim == 1 else stacked.mean(0)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    # On the CPU, since some accelerators have no float64.
    return torch.tensordot(shares, stacked.cpu().double(), dims=1).to(stacked)


def mean_weight(weights: Sequence[float], gather: Callable[[Tensor], Any], device: torch.device) -> Tensor | None:
    """Return the mean weight of a step's micro-batches on all processes, or None if all weigh the same.

    Args:
        weights: Weights of this process's micro-batches.
        gather: Concatenates a tensor of every process.
        device: Where the processes exchange tensors.
    """
    own = torch.tensor([sum(weights) / len(weights), min(weights), max(weights)], device=device)
    means, least, most = gather(own).view(-1, 3).T
    return None if least.min() == most.max() else means.mean()
