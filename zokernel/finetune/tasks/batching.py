"""What every collator builds on: lists of encoded examples, and rows padded to one length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

Example = TypeVar("Example")


class Examples(torch.utils.data.Dataset, Generic[Example], ABC):
    """A list of encoded examples as the dictionaries that a collator takes.

    Args:
        examples: The examples, whose fields are the items unless a subclass says otherwise.
    """

    def __init__(self, examples: Sequence[Example]):
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return vars(self.examples[position])

    def longest(self, count: int) -> Self:
        """Return the ``count`` longest examples, the longest first."""
        return type(self)(sorted(self.examples, key=lambda example: -self._size(example))[:count])

    @abstractmethod
    def _size(self, example: Example) -> int:
        """Return the length of an example in tokens."""


def right_padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    """Return rows as one tensor, filled up to a length with a value.

    Example:
        >>> right_padded([[1, 2], [3]], 3, 0).tolist()
        [[1, 2, 0], [3, 0, 0]]
    """
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def left_padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    """Return rows as one tensor, with a value in front of those that are shorter than a length.

    Example:
        >>> left_padded([[1, 2], [3]], 3, 0).tolist()
        [[0, 1, 2], [0, 0, 3]]
    """
    return torch.tensor([[*[value] * (length - len(row)), *row] for row in rows])
