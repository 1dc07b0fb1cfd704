"""How a run takes the losses of a step: in place, in the forward, stacked into one forward, or by several processes."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.optim.zeroth_order import Evaluator, in_turn
from zokernel.perturb.in_forward import InForward
from zokernel.perturb.parallel import MODES, Parallel
from zokernel.perturb.stacked import Stacked, stackable

if TYPE_CHECKING:
    from zokernel.finetune.trainer.zo_trainer import ZOTrainer

logger = logging.getLogger(__name__)

# At larger batches a forward is all multiplication, and stacking gains nothing (docs/results/speed.md).
STACK_UP_TO = 4
PERTURB = ("auto", "in_place", "in_forward", "stacked")


def num_processes() -> int:
    """Return how many processes of torch.distributed take part in the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def make_evaluator(trainer: ZOTrainer) -> Evaluator:
    """Return what takes the losses of the trainer's optimizer: this process's share, if there are several.

    Raises:
        UsageError: If the settings ask for what this run cannot do.
    """
    if trainer.parallel is None:
        return choose_evaluator(trainer)
    trainer.parallel.inner = choose_evaluator(trainer)
    return trainer.parallel


def choose_evaluator(trainer: ZOTrainer) -> Evaluator:
    """Return how one process takes losses, and log why.

    Raises:
        UsageError: If the settings ask for what this run cannot do.
    """
    args = trainer.args
    if args.perturb == "in_forward":
        return InForward()
    if args.perturb == "in_place" or args.torch_compile:
        return in_turn
    # An evaluation batch fits in memory, so as many rows of copies do.
    copies = max(1, args.per_device_eval_batch_size // args.per_device_train_batch_size)
    if args.perturb == "stacked":
        return Stacked(trainer.stacked_losses, max_copies=max(2, copies))
    copies = min(copies, trainer.forwards_per_step) if args.per_device_train_batch_size <= STACK_UP_TO else 1
    if (
        copies < 2
        or not only_trains_lora(trainer.bare_model)
        or not trainer.can_stack
        or not stackable(trainer.bare_optimizer, copies)
    ):
        return in_turn
    logger.info("Up to %d losses are taken in one forward (--perturb in_place takes one after the other).", copies)
    return Stacked(trainer.stacked_losses, max_copies=copies)


def only_trains_lora(model: nn.Module) -> bool:
    """Return whether all that is trained are the two matrices of LoRA's linear layers, which can surely be stacked."""
    layers = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return all("lora_" in name and id(p) in layers for name, p in trained)


def make_parallel(args: Any) -> Parallel | None:
    """Return how the processes of a distributed run share its losses; None if there is only one.

    Raises:
        UsageError: If the processes cannot be arranged as asked.
    """
    if args.zo_parallel not in (None, *MODES):
        raise UsageError(f"zo_parallel must be one of {', '.join(MODES)}, not {args.zo_parallel!r}.")
    if num_processes() == 1:
        if args.zo_parallel is not None:
            logger.info("zo_parallel %s: there is one process only (start more with torchrun).", args.zo_parallel)
        return None
    mode = args.zo_parallel or "data"
    parallel = Parallel(mode, point_ranks=args.zo_point_ranks)
    logger.info(
        "%d processes: %d batches a step, each shared by %d; only losses travel.",
        num_processes(),
        parallel.data_ranks,
        parallel.point_ranks,
    )
    return parallel


def without_gradient_machinery(accelerator: Any) -> None:
    """Keep accelerate from wrapping models for gradient synchronisation: there are no gradients to synchronise."""
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)


def share_batches(loader: Any, parallel: Parallel) -> Any:
    """Make processes that share the points of a step read the same batches.

    Raises:
        UsageError: If the loader is not one whose batches are dealt out to processes.
    """
    dealt = getattr(loader, "batch_sampler", None)
    if dealt is None or not hasattr(dealt, "process_index"):
        raise UsageError("Training data without a length cannot be shared between processes: use a map-style dataset.")
    dealt.num_processes, dealt.process_index = parallel.data_ranks, parallel.data_rank
    return loader


def repeat_batch(batch: dict[str, Any], copies: int) -> dict[str, Any]:
    """Return a collated batch with its examples repeated, copy after copy."""
    repeated = {
        key: value.repeat(copies, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
        for key, value in batch.items()
    }
    if "cells" in batch:
        # Cells number the options of the whole batch.
        shift = torch.arange(copies, device=batch["cells"].device) * batch["option_mask"].numel()
        shift_RK = shift.repeat_interleave(batch["cells"].shape[0])[:, None]
        repeated["cells"] = torch.where(repeated["cells"] >= 0, repeated["cells"] + shift_RK, repeated["cells"])
    return repeated
