"""The order of training examples as a pure function of (seed, epoch), as directions are of (seed, step, index).

transformers draws the order of ``group_by_length`` from the global random state.  A run resumed in its second epoch
would find another state there, and so another order, than the run it continues.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class EpochSeededSampler(LengthGroupedSampler):
    """Batches of examples of similar length, in an order that depends on nothing but the seed and the epoch.

    Args:
        batch_size: Examples an optimizer step.
        seed: Seed of the run.
        **kwargs: As for ``LengthGroupedSampler``.

    Example:
        >>> sampler = EpochSeededSampler(2, seed=3, lengths=[5, 1, 4, 2, 3, 6])
        >>> first = list(sampler)
        >>> sampler.set_epoch(1); second = list(sampler)
        >>> sampler.set_epoch(0); list(sampler) == first != second
        True
    """

    def __init__(self, batch_size: int, *, seed: int, **kwargs: Any):
        super().__init__(batch_size, **kwargs)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the coming iteration; the data loader calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
