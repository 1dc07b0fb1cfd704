"""The part of the trainer that ends a run with its best weights, the untrained ones included."""

from __future__ import annotations

import logging
from typing import Any

from zokernel.finetune.settings.record import RunSettings
from zokernel.finetune.storage import checkpoint as files
from zokernel.finetune.storage.replay import restore_base_
from zokernel.finetune.trainer.checkpoints import CheckpointTrainer

logger = logging.getLogger(__name__)


class BestWeightsTrainer(CheckpointTrainer):
    """``transformers.Trainer`` whose runs end with the weights of the best evaluation, if that is asked for.

    They come from a checkpoint, from the journal, or from the base.

    Args:
        settings: What the run is going to do.
        **kwargs: As for ``transformers.Trainer``, without ``args``.

    Attributes:
        final_step: The step whose weights the last call of ``train`` ended with.
    """

    def __init__(self, settings: RunSettings, **kwargs: Any):
        super().__init__(settings, **kwargs)
        self.final_step = 0
        self._base_in_files = False  # whether the weights before training are those of the model's files

    @property
    def divergence(self) -> str | None:
        """That the run has diverged, in a sentence; None if it has not."""
        return None

    @property
    def can_restore_base(self) -> bool:
        """Whether the weights before training can be loaded again."""
        if hasattr(self.bare_model, "peft_config"):
            # The new adapter is kept beside the journal, if there is or will be one.
            return self.journal is not None or self.args.save_strategy == "journal"
        return self._base_in_files

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.state.global_step and self.divergence:
            return False  # a collapsed model may have a low loss: that of guessing
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.state.global_step and self.args.should_save:
            files.remove_folder(self.folder / "checkpoint-0")  # the start was the best until now
        if is_best and self.args.save_strategy == "journal":
            self.state.best_global_step = self.state.global_step
        return is_best

    def _evaluate_start(self) -> None:
        """Evaluate the weights before the first step: they are a candidate for the best, too."""
        if self._determine_best_metric(self.evaluate(), None):
            self.state.best_global_step = 0
        if not self.can_restore_base:
            self._save_checkpoint(self.bare_model, None)

    def _load_best(self) -> None:
        """Give the model the weights of the best evaluation."""
        best = self.state.best_global_step
        steps = [row["step"] for row in self.state.log_history if any(name.startswith("eval_") for name in row)]
        if best is None or best == self.state.global_step or not (any(steps) or self.divergence):
            return  # the start alone has nothing to be compared with
        self._warn_of_best(best)
        checkpoint = self.folder / f"checkpoint-{best}"
        if checkpoint.is_dir():
            files.load_weights(self.bare_model, checkpoint)
        elif self.journal is not None:
            self.journal.replay_to(best)
        else:
            restore_base_(self.bare_model, self.folder)
        self.final_step = best

    def _warn_of_best(self, best: int) -> None:
        """Warn if the run diverged, or if no evaluation was better than the one before training."""
        if self.divergence:
            logger.warning("%s The weights are those of step %d, before that.", self.divergence, best)
        elif best == 0:
            name, value = self.args.metric_for_best_model, self.state.best_metric or 0.0
            if name == "loss" and (quantity := getattr(vars(self).get("objective"), "quantity", "")):
                name, value = quantity, 0.0 - value
            logger.warning(
                "No evaluation was better than the one before training (%s %.4g), so the starting weights are kept.",
                name,
                value,
            )
