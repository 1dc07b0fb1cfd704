"""``--perturb auto``: whether the losses of a step are stacked into one forward, or taken in place or in_forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.directions.weights.restore import LOW_PRECISION
from zokernel.errors import UsageError
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.zo_arguments import PERTURB
from zokernel.finetune.trainer.processes import true_on_all
from zokernel.optim import ZerothOrder
from zokernel.perturb import InForward, PerExampleRows, Stacked, make_perturb, matches_in_place, stackable
from zokernel.perturb.agreement import one_of_each_kind
from zokernel.perturb.base import Closure, Perturb
from zokernel.perturb.parallel import Parallel
from zokernel.perturb.per_example import Examples

logger = logging.getLogger(__name__)

# At larger batches a forward is all multiplication, and stacking gains nothing (docs/results/speed.md).
STACK_UP_TO = 4


def stack_or_share(
    optimizer: ZerothOrder,
    model: nn.Module,
    args: ZOConfig,
    *,
    stacked: Callable[[int], Tensor] | None,
    parallel: Parallel | None,
    trial: Callable[[int], Tensor] | None = None,
    examples: Callable[[], Sequence[Examples]] | None = None,
    short_rows: bool = True,
) -> str:
    """Stack the losses of a step if that is requested or pays, and let the processes of a run share them.

    Args:
        optimizer: The optimizer of the run.
        model: The model.
        args: The settings of the run.
        stacked: Returns the losses of several copies of the batch; None if its loss cannot be taken in this way.
        parallel: How processes share losses; None if there is one process.
        trial: Returns the losses of several copies of a fixed batch, to see whether the model's layers can be stacked.
        examples: Returns the batch by example; None if its losses are not known that way.
        short_rows: Whether few examples make a short forward; ``auto`` stacks no other.

    Returns:
        How the run perturbs; ``auto`` if that is still open.

    Raises:
        UsageError: If losses are to be stacked that cannot be.
    """
    sizes = {"batch": args.per_device_train_batch_size, "eval_batch": args.per_device_eval_batch_size}
    name, perturb = args.perturb, optimizer.perturb
    if perturb.name == "per_example":
        if examples is None:
            raise UsageError(
                f"Method {args.method} needs the loss of each example, and this trainer's loss is one number for the "
                "batch: use the command line or ZOTrainer with their cross entropy, or another method."
            )
        set_perturb(optimizer, PerExampleRows(examples), parallel)
        return perturb.name
    if name == "auto" and not args.torch_compile:
        pays = stacked is not None and short_rows and stacking_pays(optimizer, model, trial, **sizes)
        name = "stacked" if true_on_all(pays, args.device) else name
    if name == "stacked":
        if stacked is None:
            raise UsageError(
                "perturb='stacked' needs the loss of each example, and this trainer's loss is one number for the "
                "batch: leave it out."
            )
        perturb = Stacked(stacked, max_copies=max(2, max_copies(**sizes)))
    if perturb is not optimizer.perturb or parallel is not None:
        set_perturb(optimizer, perturb, parallel)
    return name


def settle(optimizer: ZerothOrder, args: ZOConfig, trial_loss: Closure, parallel: Parallel | None) -> str:
    """Decide whether ``in_forward`` suits the model, now that it is ready to run; else it is ``in_place``.

    Weights in bf16 and fp16, which ``in_place`` would not restore, are perturbed ``in_place:copy`` else.

    Args:
        optimizer: The optimizer of the run, before its first step.
        args: The settings of the run.
        trial_loss: Returns the loss of a fixed batch.
        parallel: How processes share losses; None if there is one process.

    Returns:
        How the run perturbs.
    """
    prefers_copies = args.device.type == "cpu" and args.bf16 and not args.torch_compile
    is_chosen = type(innermost(optimizer.perturb)) is InForward
    if is_chosen or (prefers_copies and perturbs_in_place(optimizer)):
        is_low_precision = any(tensor.dtype in LOW_PRECISION for tensor in optimizer.named_params.values())
        otherwise = "in_place:copy" if is_low_precision else "in_place"
        suits = in_forward_suits(optimizer, trial_loss, partial(true_on_all, device=args.device), otherwise=otherwise)
        set_perturb(optimizer, make_perturb("in_forward" if suits else otherwise), parallel)
    name = optimizer.perturb.name
    return name if name in PERTURB else "in_place"  # of tangents, which perturb nothing


def max_copies(batch: int, eval_batch: int) -> int:
    """Return how many copies of a training batch take the memory of an evaluation batch.

    Example:
        >>> max_copies(4, 32), max_copies(64, 32)
        (8, 1)
    """
    return max(1, eval_batch // batch)


def stacking_pays(
    optimizer: ZerothOrder,
    model: nn.Module,
    trial: Callable[[int], Tensor] | None = None,
    *,
    batch: int,
    eval_batch: int,
) -> bool:
    """Return whether several losses should be taken in one forward: of adapters, at small batches.

    Args:
        optimizer: The optimizer of the run.
        model: The model.
        trial: Returns the losses of several copies of a fixed batch; it is taken once, for two points.
        batch: Examples per micro-batch.
        eval_batch: Examples per evaluation batch, which fits in memory.
    """
    copies = min(max_copies(batch, eval_batch), optimizer.forwards_per_step)
    if copies < 2 or batch > STACK_UP_TO or not perturbs_in_place(optimizer) or not only_trains_lora(model):
        return False
    if not fits_stacked(optimizer, copies):
        return False
    reason = "" if trial is None else reason_not_to_stack(optimizer, trial)
    if reason:
        logger.info("perturb: one loss after the other, since they cannot be stacked here. %s", reason)
        return False
    logger.info(
        "perturb: stacked, since an adapter is trained on small batches: up to %d losses per forward "
        "(perturb in_place takes one after the other).",
        copies,
    )
    return True


def fits_stacked(optimizer: ZerothOrder, copies: int) -> bool:
    """Return whether so many copies of the trained tensors, perturbed as the coming step is, fit into memory."""
    points = optimizer.estimator.points(seed=optimizer.seed, step=optimizer.step_count)
    return stackable(optimizer.named_params, optimizer.directions, copies, points=points)


def reason_not_to_stack(optimizer: ZerothOrder, losses: Callable[[int], Tensor]) -> str:
    """Try two losses of the coming step in one forward, and return why that is refused; empty if it is not.

    Args:
        optimizer: The optimizer of the run.
        losses: Returns the losses of several copies of a fixed batch, (copies,).
    """
    try:
        perturb = Stacked(losses)
        perturb.attach(optimizer.named_params, optimizer.directions, seed=optimizer.seed)
        points = list(islice(optimizer.estimator.points(seed=optimizer.seed, step=optimizer.step_count), 2))
        with torch.no_grad():
            perturb.losses(lambda: losses(1).sum(), points, step=optimizer.step_count)
    except UsageError as error:
        return str(error)
    return ""


def in_forward_suits(
    optimizer: ZerothOrder, closure: Closure, holds_on_all: Callable[[bool], bool], *, otherwise: str
) -> bool:
    """Check with one loss taken both ways whether a run may use ``in_forward``, and log why.

    Args:
        optimizer: The optimizer of the run, before its first step.
        closure: Returns the loss of a fixed batch.
        holds_on_all: Returns whether something holds on every process.
        otherwise: How the run perturbs if it may not.  Where that takes a copy of the weights, only the first weight of
            each kind is moved for the check, which then takes less.
    """
    takes_copy = otherwise == "in_place:copy"
    parameters = one_of_each_kind(optimizer.named_params) if takes_copy else optimizer.named_params
    try:
        points = optimizer.estimator.points(seed=optimizer.seed, step=optimizer.step_count)
        offsets = next(offsets for offsets in points if offsets)
        suits, reason = matches_in_place(parameters, optimizer.directions, closure, offsets, seed=optimizer.seed)
    except (UsageError, StopIteration) as error:
        suits, reason = False, str(error)
    if holds_on_all(suits):
        gain = "keeps no copy of weights below fp32" if takes_copy else "is faster on a CPU under bf16 autocast"
        logger.info("perturb: in_forward, which %s (%s).", gain, reason)
        return True
    reason = reason if not suits else "in_forward does not suit another process"
    level = logging.WARNING if takes_copy else logging.INFO
    logger.log(level, "perturb: %s%s (%s).", otherwise, ", which keeps a copy of the weights" * takes_copy, reason)
    return False


def perturbs_in_place(optimizer: ZerothOrder) -> bool:
    """Return whether an optimizer moves the weights and restores them up to rounding, as it does by default."""
    return innermost(optimizer.perturb).name == "in_place"


def innermost(perturb: Perturb) -> Perturb:
    """Return how each process perturbs."""
    return perturb.inner if isinstance(perturb, Parallel) else perturb


def set_perturb(optimizer: ZerothOrder, perturb: Perturb, parallel: Parallel | None) -> None:
    """Let an optimizer perturb in another way, shared by the processes of a distributed run."""
    if parallel is None:
        optimizer.perturb = perturb
    else:
        parallel.release()
        parallel.inner = perturb
        optimizer.perturb = parallel


def only_trains_lora(model: nn.Module) -> bool:
    """Return whether all that is trained are the two matrices of LoRA's linear layers, which can surely be stacked."""
    layers = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
    trained: list[tuple[str, Any]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return all("lora_" in name and id(p) in layers for name, p in trained)
