"""The part of a trainer that takes losses before its first step: which batch fits, and how far a run may walk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from zokernel.errors import UsageError
from zokernel.finetune.models.trainable import trained_part
from zokernel.finetune.settings.auto import WALK, shorter_walk, walk_within_swing
from zokernel.finetune.settings.resolve import count_steps
from zokernel.finetune.settings.zo_arguments import AUTO
from zokernel.finetune.trainer.batch_size import largest_batch
from zokernel.finetune.trainer.choose_perturb import max_copies
from zokernel.finetune.trainer.first_batch import first_batches
from zokernel.finetune.trainer.make_optimizer import make_optimizer
from zokernel.finetune.trainer.measure_rise import (
    FEWEST_BATCHES,
    batches_to_try,
    describe_shortage,
    describe_walk,
    measure_rise,
)
from zokernel.finetune.trainer.processes import from_main
from zokernel.finetune.trainer.set_up import SetUpTrainer
from zokernel.finetune.trainer.stream_points import make_streamed_forward
from zokernel.kernels.walk_rise import Rise
from zokernel.private_apis import set_train_batch_size, set_trl_metrics, trl_metrics

logger = logging.getLogger(__name__)


class MeasuringTrainer(SetUpTrainer):
    """A trainer that may take losses of training batches before it begins, to choose its settings by them.

    Args:
        *args: As for :class:`SetUpTrainer`.
        **kwargs: As for :class:`SetUpTrainer`.

    Attributes:
        measuring_forwards: Forward passes that were taken before the first step, to choose settings.
        rate_forwards: Those of them that chose the learning rate.
    """

    _loss: Callable[[dict[str, Any]], Tensor]

    def __init__(self, *args: Any, **kwargs: Any):
        self.measuring_forwards = self.rate_forwards = 0
        self._has_chosen_rate = False
        self._trial_batch: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)

    @property
    def loss_has_slopes(self) -> bool:
        """Whether a small move of the weights changes the loss by little."""
        return True

    def training_batches(self, count: int) -> list[dict[str, Any]]:
        """Return some training batches, on the model's device."""
        return self.first_batches(count)

    def first_batches(self, count: int) -> list[dict[str, Any]]:
        """Return the first batches of the loader."""
        return [self._prepare_inputs(batch) for batch in first_batches(self._spare_loader(), count)]

    def _spare_loader(self) -> DataLoader:
        """Return a loader of the training data beside the one that the loop reads."""
        sampler = self._epoch_sampler  # of that one
        loader = self.get_train_dataloader()
        self._epoch_sampler = sampler
        return loader

    def _trial_loss(self) -> Tensor:
        """Return the loss of the first batch, which is taken once in a run."""
        if self._trial_batch is None:
            self._trial_batch = self.first_batches(1)[0]
        return self._loss(self._trial_batch)

    def count_forwards(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss whose forwards count among those taken before the first step."""

        def counted_loss(*args: Any) -> Tensor:
            self.measuring_forwards += 1
            return loss(*args)

        return counted_loss

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Keep trial losses out of the metrics that trainers of trl collect from every loss."""
        metrics = trl_metrics(self)
        try:
            yield
        finally:
            set_trl_metrics(self, metrics)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer; ``method="auto"`` first measures how far it may walk, unless a rate was given."""
        rate, auto = self.settings.setting("learning_rate"), self.settings.requested.method == AUTO
        if self.optimizer is None and auto and not self._has_chosen_rate:
            self._has_chosen_rate = True
            if rate.source != "auto":
                self._log_choice(f"learning_rate {rate.value:.3g}: as given, in place of one that auto would choose.")
            elif self.recorded:
                self.decide("auto", learning_rate=self.recorded["learning_rate"].value)
                self._log_choice(f"learning_rate {self.args.learning_rate:.3g}: as recorded when the run began.")
            elif not self.continues:
                self._choose_rate(self.model if model is None else model, rate.value)
        return super().create_optimizer(model)

    def _log_choice(self, rate: str) -> None:
        """Log once what ``auto`` became, even where no logging was set up."""
        if self.is_world_process_zero():
            level = logging.INFO if logger.isEnabledFor(logging.INFO) else logging.WARNING
            logger.log(level, "Method auto chose %s. %s", self.args.method, rate)

    def _choose_rate(self, model: Any, rate: float) -> None:
        """Measure what a random walk as far as the run's does to the loss, and lower the rate if it is too far."""
        trained, args, size = trained_part(model), self.args, self.batch_per_step
        walk = WALK[trained]
        unmeasured = f"learning_rate {rate:.3g}: for a random walk of {walk:.3g}, not measured: "
        reason = self._reason_not_measured()
        if reason:
            self._log_choice(f"{unmeasured}{reason}.")
            return
        dataset: Any = self.train_dataset
        steps = count_steps(args.max_steps, args.num_train_epochs, size, len(dataset))
        batch, optimizer = args.per_device_train_batch_size, make_optimizer(model, [], args)
        forwards, batches = steps * optimizer.forwards_per_step, len(dataset) // batch
        count = min(batches_to_try(forwards), batches)
        if count < FEWEST_BATCHES:
            self._log_choice(f"{unmeasured}{describe_shortage(forwards, batches)}.")
            return
        rise = self._measure_rise(model, optimizer, walk, count)
        share = share_within_swing = 1.0
        if rise is not None:
            sharing = 1 if args.method_options().get("per_example") else size
            directions = args.num_perturbations * steps * (size // sharing)
            share_within_swing = walk_within_swing(rise, trained=trained, batch=batch)
            share = min(share_within_swing, shorter_walk(rise, directions=directions, batch=batch, sharing=sharing))
        share = from_main(share)
        if share < 1:
            self.decide("auto", learning_rate=float(f"{rate * share:.3g}"))
        swings = share == share_within_swing < 1
        self._log_choice(describe_walk(rise, walk, share, rate, args.learning_rate, swings=swings))

    def _measure_rise(self, model: Any, optimizer: Any, walk: float, count: int) -> Rise | None:
        """Return what random walks of a distance do to the loss of so many batches; None if that is not known."""
        # As many losses at a time as a step takes, or as take the memory of an evaluation.
        copies = max_copies(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        streamed = make_streamed_forward(model, max(optimizer.forwards_per_step, copies))
        self.bare_model.eval()
        with self.uncounted():
            rise = measure_rise(optimizer, self.training_batches(count), self._loss, walk, perturb=streamed)
        if rise is not None:
            self.rate_forwards = rise.forwards
            self.measuring_forwards += rise.forwards
        return rise

    def _reason_not_measured(self) -> str:
        """Return why no losses are taken around the weights; empty if they are."""
        dataset: Any = self.train_dataset
        if self.args.torch_compile:
            return "a compiled model is not moved along directions of its own"
        if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
            return "the training data has no length"
        return "" if self.loss_has_slopes else "what is minimised has no slopes"

    def _fit_batch(self) -> None:
        """Split the batch into micro-batches that fit on every process."""
        requested = self.args.per_device_train_batch_size
        assert self.model is not None
        self.model.eval()
        size = largest_batch(self.count_forwards(lambda count: self._loss(self._longest(count))), requested)
        everywhere: Any = self.accelerator.gather(torch.tensor([size], device=self.args.device))
        size = int(everywhere.min())
        values: dict[str, Any] = {}
        if size < requested:
            parts = requested // size
            logger.info(
                "Batches of %d do not fit; each is split into %d of %d, whose losses are averaged.",
                requested,
                parts,
                size,
            )
            values["per_device_train_batch_size"] = size
            set_train_batch_size(self, size)
            values["gradient_accumulation_steps"] = self.args.gradient_accumulation_steps * parts
            if self.args.perturb == "auto":
                values["perturb"] = "in_place"  # no memory for several copies of a batch in one forward
        # The search of transformers would start over with weights half moved.
        self.decide("hardware", **values, auto_find_batch_size=False)

    def _longest(self, size: int) -> dict[str, Any]:
        """Return a batch of so many examples: of the longest, if the data know them, else of the first."""
        dataset: Any = self.train_dataset
        if hasattr(dataset, "longest"):
            return self._collated(dataset.longest(self.args.per_device_train_batch_size), size)
        loader: Any = self._spare_loader()  # which knows the columns that the model does not take
        return self._collated(loader.dataset, size, loader.collate_fn)

    def _collated(self, dataset: Any, count: int, collate: Callable[[list[Any]], Any] | None = None) -> dict[str, Any]:
        """Return a batch of the first examples, on the model's device."""
        if not hasattr(dataset, "__len__"):
            raise UsageError("The training data has no length, so no batch was tried.")
        collate = collate or self.data_collator
        assert collate is not None
        return self._prepare_inputs(collate([dataset[n] for n in range(min(count, len(dataset)))]))
