"""Private APIs of accelerate."""

from __future__ import annotations

from functools import partial
from typing import Any


def compile_nothing(accelerator: Any) -> None:
    """Keep accelerate from compiling the whole model, as ``--torch_compile`` makes it do.

    Private: ``AcceleratorState.dynamo_plugin``.  transformers chooses the backend through the environment, before any
    public method of the trainer can change it.
    """
    from accelerate.utils import DynamoBackend

    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO


def cache_no_casts(accelerator: Any) -> None:
    """Keep autocast from caching the low-precision copies of weights.

    Private: ``Accelerator.autocast_handler``.  It is a public argument of the accelerator, which transformers makes and
    passes no such argument.
    """
    from accelerate.utils import AutocastKwargs

    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)


def synchronise_no_gradients(accelerator: Any) -> None:
    """Keep accelerate from wrapping models in ``DistributedDataParallel``.

    Private: that ``Accelerator.prepare`` calls ``prepare_model`` of the same object.  Its argument ``evaluation_mode``
    is public, but transformers calls ``prepare`` with the optimizer as well, and then leaves it out.
    """
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)


def deal_batches(loader: Any, processes: int, rank: int) -> bool:
    """Make a loader of accelerate read every ``processes``-th batch, beginning with number ``rank``.

    Private: ``BatchSamplerShard.num_processes`` and ``process_index``.  accelerate deals batches to all processes, and
    has no setting by which some of them read the same.

    Returns:
        Whether it is a loader whose batches are dealt; if not, it was left alone.
    """
    sampler: Any = getattr(loader, "batch_sampler", None)
    if not hasattr(sampler, "process_index"):
        return False
    sampler.num_processes, sampler.process_index = processes, rank
    return True
