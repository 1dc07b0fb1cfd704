"""The order of training examples as a pure function of (seed, epoch), as directions are of (seed, step, index).

transformers draws the order of ``group_by_length`` from the global random state.  A run resumed in its second epoch
would find another state there, and so another order, than the run it continues.  And it puts long examples first: of
fifty batches each is shorter than the one before, so that a short run would see them sorted.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
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


class ReseedingSampler(torch.utils.data.Sampler):
    """Another sampler's order, with the random state set anew for each example by seed, epoch and example.

    A data set that augments its examples, or a collator that masks tokens, draws from the global random state when a
    batch is made.  With this sampler, what it draws depends on nothing but the seed, the epoch and the batch, so that a
    resumed run sees the batches that the run it continues would have seen.  Workers of a loader (``num_workers``) have
    random states of their own, which are not set.

    Args:
        sampler: Whose order it is; a random one is made to depend on seed and epoch alone.
        seed: Seed of the run.

    Example:
        >>> sampler = ReseedingSampler(torch.utils.data.RandomSampler(range(5)), seed=3)
        >>> draws = [(index, torch.rand(1).item()) for index in sampler]
        >>> draws == [(index, torch.rand(1).item()) for index in sampler]
        True
        >>> sampler.set_epoch(1)
        >>> draws == [(index, torch.rand(1).item()) for index in sampler]
        False
    """

    def __init__(self, sampler: Any, *, seed: int):
        if type(sampler) is torch.utils.data.RandomSampler:
            sampler = SeedableRandomSampler(
                sampler.data_source,
                replacement=sampler.replacement,
                num_samples=sampler.num_samples,
                generator=torch.Generator(),
                data_seed=seed,
            )
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the coming iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.epoch)
        for index in self.sampler:
            digest = hashlib.blake2b(f"{self.seed} {self.epoch} {index}".encode(), digest_size=4).digest()
            set_random_state(int.from_bytes(digest, "little"))
            yield index


def set_random_state(seed: int) -> None:
    """Set the random states of Python, numpy, torch and the accelerator, as ``transformers.set_seed`` does.

    That function, once per example, would cost more than the example: ``torch.manual_seed`` formats the call stack for
    every kind of device that is not there.

    Example:
        >>> set_random_state(3); first = torch.rand(1)
        >>> _ = torch.manual_seed(3); torch.equal(first, torch.rand(1))
        True
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    device = torch.get_device_module()  # the accelerator's, or torch.cpu, which has no state of its own
    seed_device = getattr(device, "manual_seed_all", None) or getattr(device, "manual_seed", None)
    if seed_device is not None:
        seed_device(seed)
