"""``ZOTrainer``: language models that choose among options, or write answers, trained with forward passes only."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from zokernel.errors import UsageError
from zokernel.finetune.data.repeat import repeat_batch
from zokernel.finetune.monitor.paired import StartLosses
from zokernel.finetune.monitor.stop import StopWhenWorse
from zokernel.finetune.scoring.language import LanguageObjective
from zokernel.finetune.scoring.objective import Objective
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.record import RunSettings
from zokernel.finetune.settings.unsupported import refuse_unsupported
from zokernel.finetune.settings.zo_arguments import AUTO
from zokernel.finetune.trainer.activations import log_activations
from zokernel.finetune.trainer.micro_batches import mean_weight
from zokernel.finetune.trainer.zeroth_order_trainer import ZerothOrderTrainer

logger = logging.getLogger(__name__)


class ZOTrainer(ZerothOrderTrainer):
    """``transformers.Trainer`` with forward passes only, for examples encoded by zokernel and an objective over them.

    Args:
        model: A language model of transformers, or a peft model, with at least one trainable parameter.
        args: What the user asked for, or the settings that were made of it for this model.
        objective: What is minimised and reported; cross entropy over the options when not given.
        **kwargs: As for ``transformers.Trainer``.  Batches are expected as ``zokernel.finetune.Collator`` makes them;
            override :meth:`compute_loss` for any other loss (and :meth:`loss_weight`, if it is a mean).

    Raises:
        UsageError: If the model has no trainable parameter or is quantized, or a first-order method is to follow an
            objective that has no gradient.
    """

    draws_examples = False
    objective: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: ZOConfig | RunSettings | None = None,
        *,
        objective: Any = None,
        **kwargs: Any,
    ):
        args = args or ZOConfig(output_dir="tmp_trainer")
        requested: Any = args.requested if isinstance(args, RunSettings) else args
        self.objective = objective or Objective(requested.objective)
        if not self.has_own_loss:
            refuse_unsupported(requested, scored=True)
            kwargs.setdefault("compute_metrics", self.objective.metrics)
        super().__init__(model, args, **kwargs)
        if not self.zeroth_order and not self.objective.can_stack:
            raise UsageError(
                f"{self.objective.objective} has no gradient for {self.args.method} to follow: choose a zeroth-order "
                "method, or objective cross_entropy."
            )
        if not self.has_own_loss and getattr(self.data_collator, "__module__", "").startswith("transformers."):
            raise UsageError(
                "ZOTrainer scores the batches of zokernel's tasks, which their own collator makes: for the loss and "
                "batches of your own model use zeroth_order(Trainer)."
            )
        if not self.has_own_loss:
            self.label_names = ["labels"]  # whatever else the model's own forward would take, such as LUKE's entities
        # Every micro-batch's loss is a mean already; transformers would divide none of them by their number if the
        # model's own forward could.
        self.model_accepts_loss_kwargs = False
        self._start_losses = StartLosses(self.folder, writes=self.args.should_save)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        elif requested.method == AUTO:
            self.add_callback(StopWhenWorse())

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

    @property
    def short_rows(self) -> bool:
        """Whether few examples make a short forward: prompts do, whole chats and texts do not."""
        return not isinstance(self.objective, LanguageObjective)

    def _stacked_loss(self, batch: dict[str, Any], copies: int) -> Tensor:
        with self.compute_loss_context_manager():
            repeated = repeat_batch(self.objective.without_padding(batch), copies)
            return self.objective.stacked(self.model_wrapped, repeated, copies)

    def _example_terms(self, batch: dict[str, Any]) -> Tensor:
        with self.compute_loss_context_manager():
            return self.objective.example_terms(self.model_wrapped, batch)

    def trial_stacked(self, copies: int) -> Tensor:
        """Return the losses of several copies of the first examples."""
        self.bare_model.eval()
        self.measuring_forwards += 1
        return self._stacked_loss(self._collated(self.train_dataset, self.args.per_device_train_batch_size), copies)

    def begin_loop(self) -> None:
        """Settle what is open, and log what the activations of a step will take."""
        super().begin_loop()
        if self.zeroth_order and not self.has_own_loss and isinstance(self.objective, (Objective, LanguageObjective)):
            log_activations(self.bare_optimizer, self.bare_model, self._longest(self.args.per_device_train_batch_size))

    def check_loss(self) -> None:
        """Check a loss of one's own; zokernel's are functions of weights and batch."""
        if self.has_own_loss:
            super().check_loss()

    def _trial_loss(self) -> Tensor:
        """Return the loss of the first examples."""
        if self.has_own_loss:
            return super()._trial_loss()
        return self._loss(self._collated(self.train_dataset, self.args.per_device_train_batch_size))

    @property
    def loss_has_slopes(self) -> bool:
        """Whether a small move of the weights changes the loss by little: accuracies and rewards stay or jump."""
        return self.has_own_loss or getattr(self.objective, "objective", "") == "cross_entropy"

    def training_batches(self, count: int) -> list[dict[str, Any]]:
        """Return some batches of training examples, drawn by the seed."""
        examples, size = len(cast(Any, self.train_dataset)), self.args.per_device_train_batch_size
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(self.args.seed)).tolist()
        return [self._batch_of(order[size * n : size * (n + 1)]) for n in range(count)]

    def _batch_of(self, numbers: list[int]) -> dict[str, Any]:
        """Return a batch of some training examples."""
        dataset, collate = cast(Any, self.train_dataset), cast(Any, self.data_collator)
        return self._prepare_inputs(collate([dataset[n] for n in numbers]))

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
            if self.is_in_train and metric_key_prefix == "eval" and dataloader.dataset is self.eval_dataset:
                output.metrics.update(self._since_start(self.objective.terms(output)))
        return output

    def _since_start(self, terms_N2: Tensor | None) -> dict[str, float]:
        """Return the change of the held-out loss since before training, by example; keep the losses of the start."""
        if terms_N2 is None:
            return {}
        if self.state.global_step == 0:
            self._start_losses.keep(terms_N2)
            return {}
        changes = self._start_losses.change(terms_N2, continues=self.continues)
        return {f"eval_{name}": value for name, value in changes.items()}

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return the order of transformers' sampler, the same in every evaluation: examples are paired."""
        sampler = super()._get_eval_sampler(eval_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(0)
            return list(sampler)  # a loader that is kept would draw another order next time
        return sampler
