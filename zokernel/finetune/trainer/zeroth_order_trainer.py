"""Any trainer of transformers, with steps that only run forwards.

Everything around the step (data, loss, metrics, logging, schedules, evaluation, checkpoints, hub, progress) stays the
trainer's own.
"""

from __future__ import annotations

import inspect
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from zokernel.errors import LossError, RunError, UsageError
from zokernel.finetune.monitor.course import Course, change_of, logged_evaluations, summarise_evaluations
from zokernel.finetune.monitor.diagnosis import Diagnosis, diagnose
from zokernel.finetune.monitor.divergence import describe_divergence
from zokernel.finetune.monitor.findings import Options, Surroundings
from zokernel.finetune.monitor.interrupt import StopOnInterrupt
from zokernel.finetune.monitor.profile import Profile, check_profile
from zokernel.finetune.monitor.progress import LOSS, ForwardLines, ForwardProgress
from zokernel.finetune.monitor.run_log import RunLog
from zokernel.finetune.monitor.step_record import Consumer, StepRecord, projected_gradient
from zokernel.finetune.monitor.verdict import FAILED, NOT_LEARNED, judge_run
from zokernel.finetune.monitor.warn import WarnOfDivergence
from zokernel.finetune.settings.record import RunSettings
from zokernel.finetune.trainer import choose_perturb
from zokernel.finetune.trainer.evaluation_mode import EvaluationLayers
from zokernel.finetune.trainer.first_batch import refuse_random_loss
from zokernel.finetune.trainer.measuring import MeasuringTrainer
from zokernel.finetune.trainer.micro_batches import MicroBatches, copy_batch, scalar_loss
from zokernel.finetune.trainer.probe import (
    coarsest_dtype,
    in_evaluation_mode,
    inspect_options,
    probe_surroundings,
    slope_and_rate,
)
from zokernel.finetune.trainer.step_parts import describe_step, step_parts
from zokernel.finetune.trainer.unsuitable import refuse_skipped_step
from zokernel.optim import ZerothOrder
from zokernel.optim.without_gradients import refuse_backward
from zokernel.private_apis import count_tokens_once, trl_metrics, trl_token_count
from zokernel.readable import plural

logger = logging.getLogger(__name__)


class ZerothOrderTrainer(MeasuringTrainer):
    """The part of a trainer that takes zeroth-order steps; it stands between a trainer and ``transformers.Trainer``.

    With gradient accumulation, the closure combines the losses of the micro-batches as the trainer itself would, so the
    scalars are those of the whole batch.

    Args:
        model: A model with at least one trainable parameter; None with ``model_init``.
        args: What the user asked for, or the settings that were made of it for this model.
        *others: As for ``transformers.Trainer``.
        optimizers: None, and a schedule or None; the optimizer is made here.
        **kwargs: As for ``transformers.Trainer``.

    Attributes:
        settings: Every setting of the run, with who decided it.
        run_log: One row per step.
        known_reason: What is wrong with the answers before training, in a sentence; empty if nothing is.
        diagnosis: Whether the last call of ``train`` lowered the loss and, if not, why; None before.

    Raises:
        UsageError: If the model has no trainable parameter or is quantized, or a setting cannot be honoured.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | RunSettings | None = None,
        *others: Any,
        optimizers: tuple[Any, Any] = (None, None),
        **kwargs: Any,
    ):
        kwargs |= dict(zip(list(inspect.signature(Trainer.__init__).parameters)[3:], others))
        micro_batches = MicroBatches(self._loss_in_step, self._stacked_loss, self.loss_weight, self._example_terms)
        self._num_items: Any = None
        super().__init__(micro_batches, model=model, args=args, optimizers=optimizers, **kwargs)
        self._layers = EvaluationLayers(self.bare_model)
        self.last_loss = self.effective_lr = float("nan")
        self._begun_at = self._rate = 0.0
        self._forwards = 0
        self._has_checked_loss = self._trl_counts_tokens = self._has_settled_perturb = False
        self.known_reason = ""
        self.run_log = RunLog(writes=self.args.should_save)
        self._course = Course()
        self.diagnosis: Diagnosis | None = None
        self._consumers: list[Consumer] = [self.run_log, self._course]
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        self.add_callback(self.run_log)
        self.add_callback(WarnOfDivergence(self.run_log.rows))
        self._signals = StopOnInterrupt()
        self.add_callback(self._signals)
        if self.args.profile:
            check_profile(self.args.method, zeroth_order=self.zeroth_order, max_steps=self.args.max_steps)
            profile = Profile(
                lambda: step_parts(self, self.bare_optimizer, self.journal, self.callback_handler),
                lambda: describe_step(self.args, self.forwards_per_step),
                self.folder,
                writes=self.args.should_save,
            )
            self.add_callback(profile)
            self._consumers.append(profile)
        self.pop_callback(PrinterCallback)
        has_bar = self.pop_callback(ProgressCallback) is not None
        self._quantity = getattr(vars(self).get("objective"), "quantity", LOSS)
        self.add_callback((ForwardProgress if has_bar else ForwardLines)(self.run_log, self._quantity))

    def begin_loop(self) -> None:
        """Settle the way of perturbing, then begin the journal and the log."""
        if self.zeroth_order and not isinstance(self.bare_optimizer, ZerothOrder):
            raise UsageError(f"{type(self).__name__} makes an optimizer of its own: let zokernel's method make it.")
        self._layers = EvaluationLayers(self.bare_model)
        self._has_checked_loss, self._trial_batch = False, None
        self._trl_counts_tokens = bool(trl_metrics(self))
        perturb = self.settings.setting("perturb")
        is_verified = bool(self.recorded) or self._has_settled_perturb
        is_unverified = (perturb.value, perturb.source, is_verified) == ("in_forward", "auto", False)
        if self.zeroth_order and (perturb.value == "auto" or is_unverified):
            self._has_settled_perturb = True
            self.bare_model.eval()
            with self.uncounted():
                trial = self.count_forwards(self._trial_loss)
                name = choose_perturb.settle(self.bare_optimizer, self.args, trial, self.parallel)
            self.decide("auto", perturb=name)
        super().begin_loop()
        self.run_log.begin(self.folder, self.state.global_step, continues=self.continues)
        self._course.begin(self.run_log.rows)

    @property
    def divergence(self) -> str | None:
        """That the run has diverged, in a sentence; None if it has not."""
        start = next((row["loss"] for row in logged_evaluations(self.state.log_history) if row["step"] == 0), None)
        smooth = getattr(vars(self).get("objective"), "can_stack", True)
        return describe_divergence(self.run_log.rows, start, smooth=smooth)

    def begin_step(self) -> None:
        """Start the clock, which evaluations between steps do not count for, and turn dropout off again."""
        if self.zeroth_order:
            self._layers.begin_step()
        self._begun_at = time.perf_counter()
        self._rate = self.bare_optimizer.param_groups[0]["lr"]
        self._forwards = 0
        self.last_loss = 0.0

    def end_step(self) -> None:
        """Hand the record of the step to everything that looks at it."""
        optimizer = self.bare_optimizer
        if self.zeroth_order:
            refuse_skipped_step(self, self.state.global_step, optimizer.step_count)
        estimate = getattr(optimizer, "last_estimate", None)
        projected = None if estimate is None else projected_gradient(estimate.coefficients)
        slope, rate = (None, None) if projected is None else slope_and_rate(optimizer, projected, self._rate)
        record = StepRecord(
            step=self.state.global_step,
            loss=self.last_loss,
            projected_gradient=projected,
            forwards=self._forwards,
            seconds=time.perf_counter() - self._begun_at,
            replayed=self.is_replaying,
            bytes_sent=None if self.parallel is None else self.parallel.bytes_sent,
            slope=slope,
            plain_rate=rate,
            directions=1 if estimate is None else max(1, len(estimate.coefficients)),
        )
        for consumer in self._consumers:
            consumer.on_record(record)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take one zeroth-order step (after the last micro-batch of an accumulation) and return its loss."""
        if not self.zeroth_order:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.last_loss += loss.item()  # its share of the batch's
            self._forwards += 1
            return loss
        self._num_items = num_items_in_batch
        self.micro_batches.add(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        optimizer = self.method_optimizer or self.bare_optimizer
        if not self._has_checked_loss and (self.journal is None or optimizer.step_count >= self.journal.num_steps):
            with self.uncounted():
                self.check_loss()
            self._has_checked_loss = True
        before, tokens = optimizer.num_forwards, trl_token_count(self) if self._trl_counts_tokens else 0
        take = optimizer.step if self.journal is None else partial(self.journal.step, optimizer)
        self.last_loss = take(self._step_loss)
        self._forwards = (optimizer.num_forwards - before) * len(self.micro_batches)
        self.micro_batches.clear()
        if self._trl_counts_tokens:
            count_tokens_once(self, tokens, optimizer.num_forwards - before)
        return torch.tensor(self.last_loss, device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the forwards and the projected gradient."""
        self.run_log.annotate(logs)
        super().log(logs, start_time)

    def check_loss(self) -> None:
        """Refuse a loss that cannot be compared between two evaluations of the first batch."""
        self.measuring_forwards += 2 * len(self.micro_batches)
        with refuse_backward(self.bare_optimizer.active, self._name_of_loss):
            refuse_random_loss(self._step_loss)

    def _step_loss(self) -> Tensor:
        """Return the loss of the batch of a step as the trainer's own step would."""
        loss = self.micro_batches.loss()
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and self._num_items is not None
            )
        # Scaled losses are parts of the whole; the others are means over their micro-batches.
        return loss * len(self.micro_batches) if scaled else loss

    def loss_weight(self, inputs: dict[str, Any]) -> float:
        """Return the weight of a micro-batch's loss in that of the batch: the same for all."""
        return 1.0

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        return self._loss_of(batch, None)

    def _loss_of(self, batch: dict[str, Any], num_items: Any) -> Tensor:
        # No gradients are looked at here, where reading one may be intercepted: check_loss looks at them.
        with refuse_backward({}, self._name_of_loss), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(self.model_wrapped, copy_batch(batch), num_items_in_batch=num_items)
        return scalar_loss(loss, type(self).__name__)

    @property
    def _name_of_loss(self) -> str:
        """What the user wrote that returns the loss."""
        return f"{type(self).__name__}.compute_loss" if self.compute_loss_func is None else "compute_loss_func"

    def _loss_in_step(self, batch: dict[str, Any]) -> Tensor:
        return self._loss_of(batch, self._num_items)

    def _stacked_loss(self, batch: dict[str, Any], copies: int) -> Tensor:
        raise UsageError("The losses of this trainer cannot be taken in one forward: leave out perturb='stacked'.")

    def _example_terms(self, batch: dict[str, Any]) -> Tensor:
        raise UsageError(
            "The losses of this trainer are not known by example: use a method whose directions all examples share."
        )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train; if the loss is not finite, save the last good weights.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the run in the output folder.
            trial: What a search of hyperparameters tries, which a ``model_init`` of one argument is called with.
            *args: As for ``transformers.Trainer.train``.
            **kwargs: As for ``transformers.Trainer.train``.

        Raises:
            RunError: If the loss is not finite, or the output cannot be written.
            UsageError: If the run in the output folder has other settings, there is none to be continued or one that is
                not to be replaced, or an argument was changed that is fixed when the trainer is made.
        """
        self.trial = trial
        self.take_over()
        if self.args.auto_find_batch_size and self.zeroth_order:
            self._fit_batch()
        try:
            with self.fresh_model():
                result = super().train(resume_from_checkpoint, trial, *args, **kwargs)
                self.diagnosis = None if self._signals.interrupted else self._diagnose()
                return result
        except LossError as error:
            self.save_model(str(folder := self.folder / "last-good"))
            raise RunError(f"{error} The weights of step {self.final_step} are in {folder}.") from error
        finally:
            self._signals.restore_handlers()
            self._layers.remove()

    def _diagnose(self) -> Diagnosis:
        """Say whether the loss fell; if not, measure why at the weights that the run ended with, and log it."""
        change = change_of(self._course)
        num_examples = getattr(self.eval_dataset, "__len__", lambda: 0)()
        held_out = summarise_evaluations(logged_evaluations(self.state.log_history), num_examples)
        options = surroundings = None
        divergence = self.divergence if self.final_step in (0, self.state.global_step) else None
        verdict, outcome = judge_run(change, held_out, divergence)
        if verdict in FAILED and self.args.world_size == 1 and not self.known_reason:
            is_stuck = verdict == NOT_LEARNED
            # Around a collapsed model there is nothing to be measured.
            options, surroundings = self._probe(scores=is_stuck, losses=is_stuck and outcome != divergence)
        diagnosis = diagnose(
            change,
            held_out,
            directions=self._course.directions,
            options=options,
            surroundings=surroundings,
            divergence=divergence,
            known_reason=self.known_reason,
        )
        if diagnosis.outcome and self._quantity != LOSS:
            outcome = f"{diagnosis.outcome} (The loss is minus the {self._quantity}.)"
            diagnosis = replace(diagnosis, outcome=outcome)
        if diagnosis.reasons and self.args.should_save:
            reasons = [f"{number}. {reason}" for number, reason in enumerate(diagnosis.reasons, 1)]
            cost = f"(Found with {plural(diagnosis.forwards, 'more forward pass')}.)"
            logger.warning("%s", "\n".join([diagnosis.outcome, *reasons, cost]))
        return diagnosis

    def _probe(self, *, scores: bool, losses: bool) -> tuple[Options | None, Surroundings | None]:
        """Return what the label words and losses around the weights tell of a run that failed.

        Args:
            scores: Whether some examples are scored.
            losses: Whether losses are taken around the weights, if that is possible.
        """
        model, collate, surroundings = self.bare_model, self.data_collator, None
        assert collate is not None
        with in_evaluation_mode(model), self.uncounted():
            if losses and self.zeroth_order and not self.args.torch_compile:
                autocast = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
                dtype = coarsest_dtype(model, autocast)
                surroundings = probe_surroundings(self.bare_optimizer, self._trial_loss, dtype=dtype)
            options = inspect_options(
                model,
                self.train_dataset,
                vars(self).get("objective"),
                lambda features: self._prepare_inputs(collate(features)),
                batch=self.args.per_device_eval_batch_size if scores else 0,
            )
        return options, surroundings
