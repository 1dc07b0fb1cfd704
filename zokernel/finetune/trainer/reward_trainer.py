"""The trainer of rewards: a step's loss is what the answers of the model earn, whole populations at a time."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.finetune.rewards.objective import RewardObjective
from zokernel.finetune.trainer.choose_perturb import innermost, max_copies, refuses_copies
from zokernel.finetune.trainer.make_optimizer import make_optimizer
from zokernel.finetune.trainer.processes import on_all
from zokernel.finetune.trainer.zo_trainer import ZOTrainer
from zokernel.offload.blocks import streamed_blocks
from zokernel.perturb import Stacked, stackable

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
        undecided = args.perturb == "auto" or self.settings.setting("perturb").source == "auto"
        if self.optimizer is None and self.zeroth_order and undecided:
            self._decide_perturb(copies, self.model if model is None else model)
        made = super().create_optimizer(model)
        stacked = innermost(self.bare_optimizer.perturb) if self.zeroth_order else None
        if isinstance(stacked, Stacked):
            stacked.max_copies = copies
        return made

    def _decide_perturb(self, copies: int, model: Any) -> None:
        """Decide as the run that is continued did, else ``stacked`` where the population can answer together."""
        if self.recorded:
            self.decide("auto", perturb=self.recorded["perturb"].value)
            return
        if self.taking is None:
            self.taking = make_optimizer(model, self.get_decay_parameter_names(model), self.args)
        if self.taking.perturb.name != "per_example":
            self.decide("auto", perturb=self._perturb(copies))

    def _perturb(self, copies: int) -> str:
        """Return ``stacked`` if the model's layers and the directions allow it, else what ``auto`` had chosen."""
        optimizer, chosen = self.taking, self.args.perturb
        # With in_forward, all directions would be drawn anew for every token.
        unstacked = {"auto": "in_place", "in_forward": "in_place:copy"}.get(chosen, chosen)
        reason = (
            "" if stackable(optimizer.named_params, optimizer.directions, copies) else "dense directions of all weights"
        )
        if not reason and not self.args.torch_compile:
            trial = partial(self.objective.try_copies, self.bare_model, self._collated(self.train_dataset, 1))
            self.bare_model.eval()
            with self.compute_loss_context_manager():
                reason = refuses_copies(optimizer, trial).rstrip(".")
        if on_all(not reason and not self.args.torch_compile, self.args.device):
            logger.info("perturb: stacked, up to %d members of the population per generate.", copies)
            return "stacked"
        if streamed_blocks(self.bare_model) is not None:
            return "in_forward"  # the members of the population share every pass over the weights
        logger.info("perturb: %s, one member after the other (%s).", unstacked, reason or "compiled blocks")
        return unstacked

    def _stacked_loss(self, batch: dict[str, Any], copies: int) -> Tensor:
        with self.compute_loss_context_manager():
            return self.objective.stacked(self.model_wrapped, batch, copies)
