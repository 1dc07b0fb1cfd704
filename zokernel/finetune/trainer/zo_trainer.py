"""``ZOTrainer``: transformers' training loop with a step that only runs forwards.

Everything around the step (logging, schedules, evaluation, checkpoints, hub, progress) is the ``Trainer``'s own.
"""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from transformers.trainer_utils import SchedulerType, TrainOutput

from zokernel.errors import LossError, RunError, UsageError
from zokernel.finetune.data.repeat import repeat_batch
from zokernel.finetune.models.freezing import freeze_
from zokernel.finetune.models.trained import check_trainable, low_precision, what_is_trained
from zokernel.finetune.monitor.divergence import WarnOfDivergence
from zokernel.finetune.monitor.interrupt import StopOnInterrupt
from zokernel.finetune.monitor.profile import Profile, check_profile
from zokernel.finetune.monitor.progress import ForwardLines, ForwardProgress
from zokernel.finetune.monitor.run_log import RunLog
from zokernel.finetune.monitor.step_record import Consumer, StepRecord, projected_gradient
from zokernel.finetune.scoring.objective import Objective
from zokernel.finetune.settings.auto import cooldown_steps
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.record import RunSettings
from zokernel.finetune.settings.resolve import refuse_low_precision, resolve
from zokernel.finetune.trainer import choose_perturb
from zokernel.finetune.trainer.batch_size import largest_batch
from zokernel.finetune.trainer.compile_blocks import compile_blocks
from zokernel.finetune.trainer.loop_optimizer import LoopOptimizer
from zokernel.finetune.trainer.make_optimizer import make_optimizer
from zokernel.finetune.trainer.micro_batches import MicroBatches, mean_weight
from zokernel.finetune.trainer.processes import make_parallel, share_batches
from zokernel.finetune.trainer.profiled import describe_step, parts_of_a_step
from zokernel.finetune.trainer.resumable import ResumableTrainer
from zokernel.optim import get_method
from zokernel.private_apis import cache_no_casts, compile_nothing, set_train_batch_size, synchronise_no_gradients

logger = logging.getLogger(__name__)


class ZOTrainer(ResumableTrainer):
    r"""``transformers.Trainer`` that trains with forward passes only (or, with a first-order method, as usual).

    One optimizer step evaluates the loss of the same batch at a few perturbed weights.  The model stays in evaluation
    mode throughout: dropout would make those losses incomparable.  With gradient accumulation the closure averages the
    loss over the micro-batches, so the scalars are those of the whole batch.

    Args:
        model: A language model of transformers, or a peft model, with at least one trainable parameter.
        args: What the user asked for, or the settings that were made of it for this model.
        objective: What is minimised and reported; cross entropy over the options when not given.
        **kwargs: As for ``transformers.Trainer``.  Batches are expected as ``zokernel.finetune.Collator`` makes them;
            override :meth:`compute_loss` for any other loss (and :meth:`loss_weight`, if it is a mean).

    Attributes:
        settings: Every setting of the run, with who decided it.
        run_log: One row per step.

    Raises:
        UsageError: If the model has no trainable parameter or is quantized, or a first-order method is to follow an
            objective that has no gradient.
    """

    objective: Objective

    def __init__(
        self, model: nn.Module, args: ZOConfig | RunSettings, *, objective: Objective | None = None, **kwargs: Any
    ):
        requested = args.requested if isinstance(args, RunSettings) else args
        freeze_(model, layers=requested.freeze_layers, vectors=requested.freeze_vectors)
        check_trainable(model)
        low, data = low_precision(model), kwargs.get("train_dataset")
        if isinstance(args, RunSettings):
            settings = args
        else:
            known = len(data) if data is not None and hasattr(data, "__len__") else None
            settings = resolve(args, trained=what_is_trained(model), num_examples=known)
        method = settings["method"]
        self.objective = objective or Objective(requested.objective)
        self.zeroth_order = not getattr(get_method(method), "first_order", False)
        if low and self.zeroth_order:
            refuse_low_precision(low, settings["perturb"])
        if not self.zeroth_order and self.objective.objective != "cross_entropy":
            raise UsageError(
                f"{self.objective.objective} has no gradient for {method} to follow: choose a zeroth-order "
                "method, or --objective cross_entropy."
            )
        self._micro_batches = MicroBatches(self._loss, self._stacked_loss, self.loss_weight)
        self._taking: Any = None  # the optimizer whose steps are taken, when it was made here
        kwargs.setdefault("compute_metrics", self.objective.metrics)
        super().__init__(settings, model=model, **kwargs)
        # Every micro-batch's loss is a mean already; transformers would divide none of them by their number if the
        # model's own forward could.
        self.model_accepts_loss_kwargs = False
        self.last_loss = self.effective_lr = float("nan")
        self._begun_at = self._rate = 0.0
        self._forwards = 0
        self.run_log = RunLog(self.folder, writes=self.args.should_save)
        self._consumers: list[Consumer] = [self.run_log]
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        self.add_callback(self.run_log)
        self.add_callback(WarnOfDivergence(self.run_log.rows))
        self.add_callback(StopOnInterrupt())
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        if self.args.profile:
            check_profile(self.args.method, zeroth_order=self.zeroth_order, max_steps=self.args.max_steps)
            profile = Profile(
                lambda: parts_of_a_step(self, self.bare_optimizer, self.journal, self.callback_handler),
                lambda: describe_step(self.args, self.forwards_per_step),
                self.folder,
                writes=self.args.should_save,
            )
            self.add_callback(profile)
            self._consumers.append(profile)
        self.pop_callback(PrinterCallback)
        has_bar = self.pop_callback(ProgressCallback) is not None
        self.add_callback(ForwardProgress(self.run_log) if has_bar else ForwardLines(self.run_log))

    def create_accelerator_and_postprocess(self) -> None:
        """Build the accelerator; under autocast, keep no second copy of the weights."""
        super().create_accelerator_and_postprocess()
        # Each weight is used once per forward, so caching its bf16 copy would only cost memory.
        cache_no_casts(self.accelerator)
        if self.args.torch_compile:
            # Not the whole model: its head sees other positions in every batch, and each would be compiled anew.
            compile_nothing(self.accelerator)
            backend = self.args.torch_compile_backend or "inductor"
            assert self.model is not None
            compile_blocks(self.model, backend=backend, mode=self.args.torch_compile_mode)
        arguments = (self.args.zo_parallel, self.args.zo_point_ranks)
        self.parallel = make_parallel(*arguments, self._micro_batches.weight) if self.zeroth_order else None
        if self.parallel is not None:
            synchronise_no_gradients(self.accelerator)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of transformers; processes that share the points of a step read the same batches."""
        loader = super().get_train_dataloader()
        return loader if self.parallel is None else share_batches(loader, self.parallel)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of ``args.method`` on the trainable parameters, keyed by their names."""
        if self.optimizer is None:
            model = self.model if model is None else model
            assert model is not None
            if self.recorded and self.args.perturb == "auto":
                self.decide("auto", perturb=self.recorded["perturb"].value)
            decayed = self.get_decay_parameter_names(model)
            optimizer = self._taking = make_optimizer(model, decayed, self.args)
            self.optimizer = LoopOptimizer(optimizer) if self.zeroth_order else optimizer
            if self.zeroth_order:
                perturb = choose_perturb.stack_or_share(
                    optimizer,
                    self.bare_model,
                    self.args,
                    self._micro_batches.stacked if self.can_stack else None,
                    self.parallel,
                )
                if perturb != self.args.perturb:
                    self.decide("auto", perturb=perturb)
            self.effective_lr = optimizer.effective_lr()  # before any schedule
            logger.info(
                "Method %s: lr %g, effective lr %s, %s.",
                self.args.method,
                self.args.learning_rate,
                "known after the first step" if math.isnan(self.effective_lr) else f"{self.effective_lr:g}",
                f"{self.forwards_per_step} forwards per step" if self.zeroth_order else "gradients by backpropagation",
            )
        return self.optimizer

    def _trial_loss(self) -> Tensor:
        """Return the loss of the first examples."""
        return self._loss(self._collated(self.train_dataset, self.args.per_device_train_batch_size))

    def _collated(self, dataset: Any, count: int) -> dict[str, Any]:
        if not hasattr(dataset, "__len__"):
            raise UsageError("the training data has no length, so no batch was tried")
        assert self.data_collator is not None
        return self._prepare_inputs(self.data_collator([dataset[n] for n in range(min(count, len(dataset)))]))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Build the schedule of transformers; a rate that stays and then falls does so over the run's last part."""
        kwargs = self.args.lr_scheduler_kwargs  # a string only until transformers has parsed it
        given = kwargs if isinstance(kwargs, dict) else {}
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and "num_decay_steps" not in given:
            cooldown = {"num_decay_steps": cooldown_steps(num_training_steps), "decay_type": "linear"}
            self.decide("auto", lr_scheduler_kwargs=cooldown | given)
        return super().create_scheduler(num_training_steps, optimizer)

    def begin_loop(self) -> None:
        """Settle the way of perturbing, then begin the journal and the log."""
        if self.args.perturb == "auto" and self.zeroth_order:
            perturb = choose_perturb.settle(self.bare_optimizer, self.args, self._trial_loss, self.parallel)
            self.decide("auto", perturb=perturb)
        super().begin_loop()
        self.run_log.begin(self.state.global_step, continues=self.continues)

    def begin_step(self) -> None:
        """Start the clock; evaluation between steps is not counted."""
        self._begun_at = time.perf_counter()
        self._rate = self.bare_optimizer.param_groups[0]["lr"]
        self._forwards = 0
        self.last_loss = 0.0

    def end_step(self) -> None:
        """Hand the record of the step to everything that looks at it."""
        optimizer = self.bare_optimizer
        estimate = getattr(optimizer, "last_estimate", None)
        record = StepRecord(
            step=self.state.global_step,
            loss=self.last_loss,
            losses=tuple(optimizer.record()) if estimate is not None else (),
            projected_gradient=None if estimate is None else projected_gradient(estimate.coefficients),
            forwards=self._forwards,
            seconds=time.perf_counter() - self._begun_at,
            learning_rate=self._rate,
            replayed=self.is_replaying,
            bytes_sent=None if self.parallel is None else self.parallel.bytes_sent,
        )
        for consumer in self._consumers:
            consumer.on_record(record)

    @property
    def forwards_per_step(self) -> int:
        """Forward passes of one optimizer step (a first-order step counts as one)."""
        return self.bare_optimizer.forwards_per_step if self.zeroth_order else 1

    @property
    def data_ranks(self) -> int:
        """How many batches the processes of the run see in one step."""
        return self.parallel.data_ranks if self.parallel is not None else super().data_ranks

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take one zeroth-order step (after the last micro-batch of an accumulation) and return its loss."""
        if not self.zeroth_order:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.last_loss += loss.item()  # its share of the batch's
            self._forwards += 1
            return loss
        model.eval()
        self._micro_batches.add(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        optimizer = self._taking or self.bare_optimizer
        before = optimizer.num_forwards
        take = optimizer.step if self.journal is None else partial(self.journal.step, optimizer)
        self.last_loss = take(self._micro_batches.loss)
        self._forwards = (optimizer.num_forwards - before) * len(self._micro_batches)
        self._micro_batches.clear()
        return torch.tensor(self.last_loss, device=self.args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step and, if their losses do not weigh the same, their mean weight."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if self.zeroth_order or not batches:
            return batches, None
        weights = [self.loss_weight(batch) for batch in batches]
        return batches, mean_weight(weights, self.accelerator.gather, self.args.device)

    def loss_weight(self, inputs: dict[str, Any]) -> float:
        """Return how many terms the loss of a batch is a mean over: 1 for a loss of one's own."""
        return 1.0 if self.has_own_loss else self.objective.weight(inputs)

    @property
    def has_own_loss(self) -> bool:
        """Whether :meth:`compute_loss` is overridden."""
        return type(self).compute_loss is not ZOTrainer.compute_loss

    @property
    def can_stack(self) -> bool:
        """Whether the losses of a step can be taken in one forward: not with a loss of one's own."""
        return self.objective.can_stack and not self.has_own_loss

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        with self.compute_loss_context_manager():
            return self.compute_loss(self.model_wrapped, batch)

    def _stacked_loss(self, batch: dict[str, Any], copies: int) -> Tensor:
        with self.compute_loss_context_manager():
            return self.objective.stacked(self.model_wrapped, repeat_batch(batch, copies), copies)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the objective of a batch (and, for evaluation, scores, predictions and metrics of its examples)."""
        if return_outputs:
            return self.objective.evaluate(model, inputs)
        loss = self.objective(model, inputs)
        return loss if num_items_in_batch is None else loss * (self.loss_weight(inputs) / num_items_in_batch)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate, with the loss of each example counted once, however they are dealt out to processes."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if output.predictions is not None and output.metrics is not None and not self.has_own_loss:
            # transformers repeats the mean of each batch as often as a full batch has examples.
            output.metrics[f"{metric_key_prefix}_loss"] = self.objective.total_loss(output)
        return output

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as :meth:`ResumableTrainer.train` does; if the loss is not finite, save the last good weights."""
        if self.args.auto_find_batch_size and self.zeroth_order:
            self._fit_batch()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except LossError as error:
            folder = self.folder / "last-good"
            self.save_model(str(folder))
            raise RunError(f"{error} The last good weights are in {folder}.") from error

    def _fit_batch(self) -> None:
        """Split the batch into micro-batches that fit on every process."""
        wanted = self.args.per_device_train_batch_size
        dataset: Any = self.train_dataset
        longest = dataset.longest(wanted) if hasattr(dataset, "longest") else dataset
        assert self.model is not None
        self.model.eval()
        found = largest_batch(lambda size: self._loss(self._collated(longest, size)), wanted)
        everywhere: Any = self.accelerator.gather(torch.tensor([found], device=self.args.device))
        found = int(everywhere.min())
        values: dict[str, Any] = {}
        if found < wanted:
            parts = wanted // found
            logger.info(
                "Batches of %d do not fit; each is split into %d of %d, whose losses are averaged.",
                wanted,
                parts,
                found,
            )
            values["per_device_train_batch_size"] = found
            set_train_batch_size(self, found)
            values["gradient_accumulation_steps"] = self.args.gradient_accumulation_steps * parts
            if self.args.perturb == "auto":
                values["perturb"] = "in_place"  # no memory for several copies of a batch in one forward
        # The search of transformers would start over with weights half moved.
        self.decide("hardware", **values, auto_find_batch_size=False)
