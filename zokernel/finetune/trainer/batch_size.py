"""The largest batch that fits, found before the first step and without changing what a step is.

A zeroth-order step needs the memory of one forward, so a forward on the longest examples decides.  Where the batch
asked for does not fit, it is split into micro-batches whose losses are averaged: the same step, in less memory.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import find_executable_batch_size

from zokernel.errors import RunError

if TYPE_CHECKING:
    from zokernel.finetune.trainer.zo_trainer import ZOTrainer

logger = logging.getLogger(__name__)


@torch.no_grad()
def fit_batch_size(trainer: ZOTrainer) -> int:
    """Split the training batch until a forward on the longest examples fits, and set the trainer accordingly.

    Args:
        trainer: A trainer before training; its batch size and accumulation steps are changed if they must be.

    Returns:
        Examples a device and micro-batch.

    Raises:
        RunError: If not even one example fits.
    """
    args: Any = trainer.args
    dataset: Any = trainer.train_dataset
    wanted = size = args.per_device_train_batch_size
    longest = dataset.longest(wanted) if hasattr(dataset, "longest") else dataset
    assert trainer.data_collator is not None

    def split() -> int:
        nonlocal size
        # The next smaller divisor, so that micro-batches add up to the batch.
        size = next((n for n in range(size - 1, 0, -1) if wanted % n == 0), 0)
        return size

    def fits(batch_size: int) -> int:
        items = [longest[number] for number in range(min(batch_size, len(longest)))]
        batch = trainer._prepare_inputs(trainer.data_collator(items))
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, batch)  # type: ignore[arg-type]
        return batch_size

    assert trainer.model is not None
    trainer.model.eval()
    try:
        found = find_executable_batch_size(fits, starting_batch_size=wanted, reduce_batch_size_fn=split)()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        raise RunError(
            "Not even one example fits in memory: lower --max_length, use a smaller model, or --dtype bfloat16."
        ) from error
    # Every process of a distributed run takes what fits on all of them.
    everywhere: Any = trainer.accelerator.gather(torch.tensor([found], device=args.device))
    found = int(everywhere.min())
    if found < wanted:
        logger.info(
            "Batches of %d do not fit; each is split into %d of %d, whose losses are averaged.",
            wanted,
            wanted // found,
            found,
        )
        args.per_device_train_batch_size = trainer._train_batch_size = found
        args.gradient_accumulation_steps *= wanted // found
        if args.perturb == "auto":
            args.perturb = "in_place"  # no memory for several copies of a batch in one forward
    return found
