"""The order of training examples as a pure function of (seed, epoch), as directions are of (seed, step, index).

transformers draws the order of ``group_by_length`` from the global random state.  A run resumed in its second epoch
would find another state there, and so another order, than the run it continues.  And it puts long examples first: of
fifty batches each is shorter than the one before, so that a short run would see them sorted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

ORDER_VERSION = 2  # raised whenever the same settings come to mean another order, so that no run continues with it


class EpochSeededSampler(LengthGroupedSampler):
    """Batches of examples of similar length, in an order that depends on nothing but the seed and the epoch.

    The batch with the longest example comes first, so that a lack of memory shows at once; the others are shuffled.

    Args:
        batch_size: Examples per optimizer step of one process.
        seed: Seed of the run.
        processes: Processes that take batches in turn; theirs of one step stay together, and so of similar length.
        **kwargs: As for ``LengthGroupedSampler``.

    Example:
        >>> sampler = EpochSeededSampler(2, seed=3, lengths=[5, 1, 4, 2, 3, 6])
        >>> first = list(sampler)
        >>> sampler.set_epoch(1); second = list(sampler)
        >>> sampler.set_epoch(0); list(sampler) == first != second
        True
    """

    def __init__(self, batch_size: int, *, seed: int, processes: int = 1, **kwargs: Any):
        super().__init__(batch_size, **kwargs)
        self.seed, self.epoch, self.processes = seed, 0, processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the coming iteration; the data loader calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        size = self.batch_size * self.processes
        indices = get_length_grouped_indices(self.lengths, size, generator=generator)
        steps = [indices[first : first + size] for first in range(0, len(indices), size)]
        # The first has the longest example, and only the last can be smaller.
        order = [0, *(1 + torch.randperm(max(0, len(steps) - 2), generator=generator)).tolist(), len(steps) - 1]
        return itertools.chain.from_iterable(steps[number] for number in dict.fromkeys(order))
