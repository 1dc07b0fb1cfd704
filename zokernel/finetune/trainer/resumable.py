"""The part of the trainer that survives kills: it continues from checkpoint and journal, alone in its folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from zokernel.errors import LossError, UsageError
from zokernel.finetune.data.sampling import EpochSeededSampler, ReseedingSampler
from zokernel.finetune.models.weights import matches_saved_weights
from zokernel.finetune.settings.record import RunSettings, Setting, first_difference, keep_recorded, read_settings
from zokernel.finetune.storage import checkpoint as files
from zokernel.finetune.storage.journal_header import data_order
from zokernel.finetune.storage.lock import exclusive
from zokernel.finetune.storage.run_folder import explained_errors, refuse_old_run
from zokernel.finetune.storage.run_journal import RunJournal
from zokernel.finetune.trainer.best_weights import BestWeightsTrainer
from zokernel.finetune.trainer.checkpoints import silence_best_model_warning
from zokernel.finetune.trainer.empty_cache import EmptyCache
from zokernel.private_apis import set_loop_sums

logger = logging.getLogger(__name__)

_REPEATABLE = (RandomSampler, SequentialSampler, EpochSeededSampler)


class ResumableTrainer(BestWeightsTrainer):
    """``transformers.Trainer`` whose runs can be killed at any instant and continued to the same bits.

    Checkpoints appear whole or not at all and hold safetensors and JSON only.  With a journal, steps after the last
    checkpoint are repeated without forward passes; with ``save_strategy="journal"`` there are no checkpoints.

    Args:
        settings: What the run is going to do.
        **kwargs: As for ``transformers.Trainer``, without ``args``.

    Attributes:
        recorded: The settings of the run that is continued, by name.
        continues: Whether an earlier process's run is continued.
        on_loop_begin: Called when all checks are passed and the loop begins.
        needs_saved_step: Whether a run that is continued must have a saved step, as with ``transformers.Trainer``; a
            command that is repeated after a kill may have left none, and then begins the run again.
    """

    zeroth_order: bool
    draws_examples = True
    """Whether making a batch may draw random numbers."""

    def __init__(self, settings: RunSettings, **kwargs: Any):
        super().__init__(settings, **kwargs)
        self.recorded: dict[str, Setting] | None = None
        self._weights_moved = False  # whether a step may have moved the weights since they were loaded
        self.continues = False
        self.on_loop_begin: Callable[[], None] | None = None
        self.needs_saved_step = True
        self._epoch_sampler: EpochSeededSampler | ReseedingSampler | None = None
        self.add_callback(_AroundTheLoop(self))
        if self.zeroth_order:
            self.add_callback(EmptyCache())

    @property
    def data_ranks(self) -> int:
        """How many batches the processes of the run see in one step."""
        return self.args.world_size

    @property
    def is_replaying(self) -> bool:
        """Whether the last step was taken from the journal."""
        return self.journal is not None and self.journal.replaying

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, alone in the output folder.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for whatever is there: the newest checkpoint, the
                journal, or both.
            *args: As for ``transformers.Trainer.train``.
            **kwargs: As for ``transformers.Trainer.train``.

        Returns:
            As ``transformers.Trainer.train``; with ``load_best_model_at_end`` the model then has the best weights.

        Raises:
            UsageError: If there is nothing to continue from, or it cannot be continued this way.
            RunError: If the output cannot be written, or another process is writing it.
        """
        self.continues = bool(resume_from_checkpoint)
        alone = exclusive(self.folder) if self.args.should_save else nullcontext()
        with alone, explained_errors(self.folder), silence_best_model_warning(self.settings):
            try:
                self._read_earlier_run()
                self.journal = self._open_journal()
                self._check_base()
                checkpoint = self._choose_checkpoint(resume_from_checkpoint)
                self._reset_optimizer(checkpoint)
                # No process may write before all have read.
                self.accelerator.wait_for_everyone()
                return self._run_loop(checkpoint, *args, **kwargs)
            finally:
                if self.journal is not None:
                    self.journal.close()
                    self.journal = None

    def _read_earlier_run(self) -> None:
        """Clear away halves that a kill left, and read the settings of the run that is continued."""
        if self.args.should_save:
            files.remove_leftovers(self.folder)
        self.recorded = read_settings(self.folder) if self.continues else None
        if self.continues:
            refuse_old_run(self.folder)
            eps = keep_recorded(self.settings, self.folder)["eps"]
            if eps != self.settings["eps"]:
                self.decide("default", eps=eps)
        self.accelerator.wait_for_everyone()

    def _open_journal(self) -> RunJournal | None:
        args = self.args
        if not self.zeroth_order and args.save_strategy == "journal":
            raise UsageError(f"{args.method} takes gradients, which no journal holds: use save_strategy 'best'.")
        if not self.zeroth_order or args.save_strategy == "no":
            return None
        flags = {"continues": self.continues, "overwrite": args.overwrite_output_dir, "writes": args.should_save}
        return RunJournal(self.folder, self.bare_model, **flags)

    def _check_base(self) -> None:
        """See whether the weights before training are those of the model's files.

        Raises:
            UsageError: If they will be needed and cannot be loaded again.
        """
        if not (self._weights_moved and self.continues):  # else by an earlier call, which has looked
            base = Path(str(getattr(self.bare_model, "name_or_path", "") or "?"))
            self._base_in_files = base.is_dir() and matches_saved_weights(self.bare_model, base)
        keeps_best = self.settings["load_best_model_at_end"]
        if self.args.save_strategy == "journal" and keeps_best and not self.can_restore_base:
            raise UsageError(
                "To end with the best step, save_strategy 'journal' must be able to load the base again: load "
                "the model by from_pretrained from a folder, or set load_best_model_at_end False."
            )

    def _choose_checkpoint(self, requested: str | bool | None) -> str | None:
        """Return the checkpoint to resume from: the requested one, or the newest that the journal reaches."""
        if isinstance(requested, str):
            files.check_checkpoint(Path(requested))
            return requested
        if not requested:
            return None
        last_step = math.inf
        if self.journal is not None:
            # A power cut may have taken the end of a journal that a checkpoint relies on; its steps are taken again.
            # The last steps are replayed rather than loaded: the loop takes at least one.
            last_step = min(self.journal.num_steps, self.args.max_steps - 1 if self.args.max_steps > 0 else math.inf)
        checkpoint = files.newest_checkpoint(self.folder, last_step=last_step)
        if checkpoint is not None:
            files.check_checkpoint(checkpoint)
            return str(checkpoint)
        if self.journal is None or not self.journal.num_steps:
            self._begin_without_steps()
        return None

    def _begin_without_steps(self) -> None:
        """Say that a run that is continued begins at its first step; refuse if no run was begun here.

        Raises:
            UsageError: If there is neither a checkpoint nor a journal, and the caller expects one.
        """
        if self.needs_saved_step and (self.journal is None or self.journal.previous is None):
            kinds = "no checkpoint" if self.journal is None else "neither a checkpoint nor a journal"
            raise UsageError(
                f"{self.folder} holds {kinds} to continue from: call trainer.train() without resume_from_checkpoint to "
                "begin a run, or make the trainer with the output_dir of the run to be continued."
            )
        logger.info("%s holds no step to continue from, so the run starts from the beginning.", self.folder)

    def _reset_optimizer(self, checkpoint: str | None) -> None:
        """Begin with a new optimizer, and with the weights before training, if an earlier call moved the weights."""
        if not self._weights_moved:
            return
        self.forget_optimizer()
        if self.continues and checkpoint is None and self.journal is not None and self.can_restore_base:
            self.journal.restore_base()

    def _run_loop(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Run the loop of transformers, and end with the best weights if that is asked for."""
        keeps_best = self.settings["load_best_model_at_end"]
        try:
            if checkpoint is not None and 0 < self.args.max_steps <= files.step_of(Path(checkpoint)):
                result = self._finish_without_steps(checkpoint)
            else:
                result = super().train(checkpoint, *args, **kwargs)
        except LossError:
            self.final_step = self.state.global_step
            if keeps_best and self.divergence:
                self._load_best()
            raise
        self.final_step = self.state.global_step
        if keeps_best:
            self._load_best()
        elif self.divergence:
            logger.warning("%s The last weights were kept, as asked.", self.divergence)
        return result

    def _finish_without_steps(self, checkpoint: str) -> TrainOutput:
        """Finish a run that was killed between its last checkpoint and its end: the loop would take one more step."""
        if self.journal is not None:
            raise UsageError(f"{checkpoint} is already at max_steps {self.args.max_steps}: ask for more steps.")
        self.create_optimizer()
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / files.TRAINER_STATE))
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, math.nan, {})

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the sampler of transformers, with an order that depends on seed and epoch alone."""
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if type(sampler) is LengthGroupedSampler:
            sampler = self._epoch_sampler = EpochSeededSampler(
                sampler.batch_size, seed=seed, processes=self.data_ranks, lengths=sampler.lengths
            )
        if self.zeroth_order and self.draws_examples and type(sampler) in _REPEATABLE:
            sampler = self._epoch_sampler = ReseedingSampler(sampler, seed=seed)
        return sampler

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate without touching the random state that training draws from."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluation_loop(*args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate; in a repeated part of a run, return what the journal recorded."""
        journal, step = self.journal, self.state.global_step
        has_several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if journal is None or has_several or not self.is_in_train:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = journal.evaluation(step, metric_key_prefix)
        if metrics is None:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            journal.add_evaluation(step, metric_key_prefix, metrics)
        else:
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def begin_loop(self) -> None:
        """Bring settings, journal and running sums in line with the step the loop begins at."""
        self._check_settings()
        if self.journal is not None:
            self.journal.begin(
                self.state.global_step,
                self.bare_optimizer,
                method=self.args.method,
                options=self.args.method_options() | {"lr": self.args.learning_rate},
                data_order=data_order(
                    self.train_dataset,
                    seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
                    batch=self.batch_per_step,
                    sampling=str(self.args.train_sampling_strategy),
                    drop_last=self.args.dataloader_drop_last,
                ),
            )
        if self._loop_state is not None:
            # The loop zeroes these; the mean loss of the next log line is over steps before the checkpoint, too.
            set_loop_sums(self, self._loop_state)
            self._loop_state = None
        if self.on_loop_begin is not None and self.args.should_save:
            self.on_loop_begin()
        if self.state.global_step == 0 and self.settings["load_best_model_at_end"]:
            self._evaluate_start()

    def _check_settings(self) -> None:
        """Compare the settings with those of the run that is continued, and write them down."""
        difference = first_difference(self.recorded, self.settings) if self.recorded else None
        if difference is not None:
            raise UsageError(
                f"{self.folder} holds a run with other settings ({difference}): repeat its settings to continue it, or "
                "choose another output_dir."
            )
        if self.args.should_save:
            self.settings.write(self.folder)

    @property
    def batch_per_step(self) -> int:
        """Examples per step, of all processes."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.data_ranks

    def begin_step(self) -> None:
        """Called before every step."""

    def end_step(self) -> None:
        """Called after every step."""


class _AroundTheLoop(TrainerCallback):
    """Calls the trainer back where its loop has no method to override."""

    def __init__(self, trainer: ResumableTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_loop()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._weights_moved = True
        self._trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_step()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._epoch_sampler is not None:
            self._trainer._epoch_sampler.set_epoch(int(state.epoch or 0))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.journal is not None:
            self._trainer.journal.end(self._trainer.bare_optimizer)
