"""The part of a trainer that takes losses before its first step: ``--method auto`` asks how far a run may walk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from zokernel.finetune.models.trained import what_is_trained
from zokernel.finetune.settings.auto import WALK, shorter_walk, walk_within_swing
from zokernel.finetune.settings.resolve import count_steps
from zokernel.finetune.settings.zo_arguments import AUTO
from zokernel.finetune.trainer.choose_perturb import max_copies
from zokernel.finetune.trainer.first_batch import first_batches
from zokernel.finetune.trainer.make_optimizer import make_optimizer
from zokernel.finetune.trainer.measure_rise import FEWEST_BATCHES, batches_to_try, measure_rise, too_little, walk_told
from zokernel.finetune.trainer.processes import from_main
from zokernel.finetune.trainer.set_up import SetUpTrainer
from zokernel.finetune.trainer.stream_points import many_in_a_pass
from zokernel.private_apis import noted_by_trl, set_noted_by_trl

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

    def __init__(self, *args: Any, **kwargs: Any):
        self.measuring_forwards = self.rate_forwards = 0
        self._asked = False
        super().__init__(*args, **kwargs)

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    @property
    def loss_has_slopes(self) -> bool:
        """Whether a small move of the weights changes the loss by little."""
        return True

    def training_batches(self, count: int) -> list[dict[str, Any]]:
        """Return some training batches, on the model's device."""
        return self.first_batches(count)

    def first_batches(self, count: int) -> list[dict[str, Any]]:
        """Return the first batches of the loader."""
        sampler = self._epoch_sampler  # of the loader that the loop reads
        loader = self.get_train_dataloader()
        self._epoch_sampler = sampler
        return [self._prepare_inputs(batch) for batch in first_batches(loader, count)]

    def counted(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss that is counted among those taken before the first step."""

        def taken(*args: Any) -> Tensor:
            self.measuring_forwards += 1
            return loss(*args)

        return taken

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Keep losses that are only tried out of what trainers of trl note of every loss."""
        kept = noted_by_trl(self)
        try:
            yield
        finally:
            set_noted_by_trl(self, kept)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer; ``method="auto"`` first asks how far it may walk, unless a rate was given."""
        rate, auto = self.settings.setting("learning_rate"), self.settings.requested.method == AUTO
        if self.optimizer is None and auto and not self._asked:
            self._asked = True
            if rate.source != "auto":
                self._say(f"learning_rate {rate.value:.3g}: as given, in place of one that auto would choose.")
            elif self.recorded:
                self.decide("auto", learning_rate=self.recorded["learning_rate"].value)
                self._say(f"learning_rate {self.args.learning_rate:.3g}: as recorded when the run began.")
            elif not self.continues:
                self._choose_rate(self.model if model is None else model, rate.value)
        return super().create_optimizer(model)

    def _say(self, rate: str) -> None:
        """Say once what ``auto`` became, even where no logging was set up."""
        if self.is_world_process_zero():
            level = logging.INFO if logger.isEnabledFor(logging.INFO) else logging.WARNING
            logger.log(level, "Method auto chose %s. %s", self.args.method, rate)

    def _choose_rate(self, model: Any, rate: float) -> None:
        """Measure what a random walk as far as the run's does to the loss, and lower the rate if it is too far."""
        trained = what_is_trained(model)
        walk = WALK[trained]
        unmeasured = f"learning_rate {rate:.3g}: for a random walk of {walk:.3g}, not measured: "
        reason = self._not_measured()
        if reason:
            self._say(f"{unmeasured}{reason}.")
            return
        args, size = self.args, self.batch_per_step
        dataset: Any = self.train_dataset
        steps = count_steps(args.max_steps, args.num_train_epochs, size, len(dataset))
        small, optimizer = args.per_device_train_batch_size, make_optimizer(model, [], args)
        forwards, batches = steps * optimizer.forwards_per_step, len(dataset) // small
        count = min(batches_to_try(forwards), batches)
        if count < FEWEST_BATCHES:
            self._say(f"{unmeasured}{too_little(forwards, batches)}.")
            return
        # As many losses at a time as a step takes, or as take the memory of an evaluation.
        together = max(optimizer.forwards_per_step, max_copies(small, args.per_device_eval_batch_size))
        streams = many_in_a_pass(model, together)
        self.bare_model.eval()
        with self.uncounted():
            rise = measure_rise(optimizer, self.training_batches(count), self._loss, walk, perturb=streams)
        share = within = 1.0
        if rise is not None:
            self.rate_forwards = rise.forwards
            self.measuring_forwards += rise.forwards
            sharing = 1 if args.method_options().get("per_example") else size
            every = args.num_perturbations * steps * (size // sharing)
            within = walk_within_swing(rise, trained=trained, batch=small)
            share = min(within, shorter_walk(rise, directions=every, batch=small, sharing=sharing))
        share = from_main(share)
        if share < 1:
            self.decide("auto", learning_rate=float(f"{rate * share:.3g}"))
        self._say(walk_told(rise, walk, share, rate, self.args.learning_rate, swings=share == within < 1))

    def _not_measured(self) -> str:
        """Return why no losses are taken around the weights; empty if they are."""
        dataset: Any = self.train_dataset
        if self.args.torch_compile:
            return "a compiled model is not moved along directions of its own"
        if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
            return "the training data has no length"
        return "" if self.loss_has_slopes else "what is minimised has no slopes"
