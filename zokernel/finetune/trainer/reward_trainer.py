"""The trainer of rewards: a step's loss is what the answers of the model earn, whole populations at a time."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.finetune.rewards.objective import RewardObjective
from zokernel.finetune.trainer.choose_perturb import fits_stacked, innermost, max_copies, reason_not_to_stack
from zokernel.finetune.trainer.make_optimizer import make_optimizer
from zokernel.finetune.trainer.processes import true_on_all
from zokernel.finetune.trainer.zo_trainer import ZOTrainer
from zokernel.offload.blocks import streamed_blocks
from zokernel.perturb import Stacked

logger = logging.getLogger(__name__)


class RewardTrainer(ZOTrainer):
    """A :class:`ZOTrainer` whose objective is a :class:`~zokernel.finetune.rewards.objective.RewardObjective`.

    ``perturb="auto"`` lets all members of the population answer in one ``generate`` where each can have weights of its
    own (adapters, low-rank directions), and moves the weights from member to member where not.
    """

    objective: RewardObjective

    @property
    def can_stack(self) -> bool:
        """Whether several members can answer in one ``generate``."""
        return True

    def begin_step(self) -> None:
        """Tell the objective the seed and the step, which the samples depend on."""
        super().begin_step()
        self.objective.seed, self.objective.step = self.args.seed, self.state.global_step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer, and decide how members get their weights."""
        args, samples = self.args, self.objective.samples
        self.objective.max_rows = args.per_device_eval_batch_size
        copies = max(1, max_copies(args.per_device_train_batch_size * samples, args.per_device_eval_batch_size))
        is_undecided = args.perturb == "auto" or self.settings.setting("perturb").source == "auto"
        if self.optimizer is None and self.zeroth_order and is_undecided:
            self._decide_perturb(copies, self.model if model is None else model)
        optimizer = super().create_optimizer(model)
        perturb = innermost(self.bare_optimizer.perturb) if self.zeroth_order else None
        if isinstance(perturb, Stacked):
            perturb.max_copies = copies
        return optimizer

    def _decide_perturb(self, copies: int, model: Any) -> None:
        """Decide as the run that is continued did, else ``stacked`` where the population can answer together."""
        if self.recorded:
            self.decide("auto", perturb=self.recorded["perturb"].value)
            return
        if self.method_optimizer is None:
            self.method_optimizer = make_optimizer(model, self.get_decay_parameter_names(model), self.args)
        if self.method_optimizer.perturb.name != "per_example":
            self.decide("auto", perturb=self._choose_perturb(copies))

    def _choose_perturb(self, copies: int) -> str:
        """Return ``stacked`` if the model's layers and the directions allow it, else what ``auto`` had chosen."""
        optimizer, perturb = self.method_optimizer, self.args.perturb
        # With in_forward, all directions would be drawn anew for every token.
        unstacked = {"auto": "in_place", "in_forward": "in_place:copy"}.get(perturb, perturb)
        can_stack = fits_stacked(optimizer, copies)
        reason = "" if can_stack else "dense directions of all weights"
        if not reason and not self.args.torch_compile:
            trial = partial(self.objective.try_copies, self.bare_model, self._collated(self.train_dataset, 1))
            self.bare_model.eval()
            with self.compute_loss_context_manager():
                reason = reason_not_to_stack(optimizer, trial).rstrip(".")
        if true_on_all(not reason and not self.args.torch_compile, self.args.device):
            logger.info("perturb: stacked, up to %d members of the population per generate.", copies)
            return "stacked"
        if streamed_blocks(self.bare_model) is not None:
            return "in_forward"  # the members of the population share every pass over the weights
        logger.info("perturb: %s, one member after the other (%s).", unstacked, reason or "compiled blocks")
        return unstacked

    def _stacked_loss(self, batch: dict[str, Any], copies: int) -> Tensor:
        with self.compute_loss_context_manager():
            return self.objective.stacked(self.model_wrapped, batch, copies)
