"""The part of a trainer that is made before its loop begins: settings, model, accelerator, optimizer and schedule."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from zokernel.errors import UsageError
from zokernel.finetune.models.freezing import freeze_
from zokernel.finetune.models.trainable import accept_quantized_, check_trainable, low_precision, trained_part
from zokernel.finetune.settings.auto import cooldown_steps
from zokernel.finetune.settings.combine import add_zeroth_order
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.record import RunSettings, name_derived
from zokernel.finetune.settings.resolve import resolve
from zokernel.finetune.settings.saving import derive
from zokernel.finetune.settings.zo_arguments import is_first_order
from zokernel.finetune.trainer import choose_perturb
from zokernel.finetune.trainer.compile_blocks import compile_blocks
from zokernel.finetune.trainer.loop_optimizer import LoopOptimizer
from zokernel.finetune.trainer.make_optimizer import make_optimizer
from zokernel.finetune.trainer.micro_batches import MicroBatches
from zokernel.finetune.trainer.processes import make_parallel, share_batches
from zokernel.finetune.trainer.resumable import ResumableTrainer
from zokernel.finetune.trainer.stream_points import stream_points
from zokernel.private_apis import cache_no_casts, compile_nothing, synchronise_no_gradients, use_one_gpu
from zokernel.readable import plural

logger = logging.getLogger(__name__)


class SetUpTrainer(ResumableTrainer):
    """A trainer whose optimizer is a method of zokernel on the trainable parameters of its model.

    Args:
        micro_batches: Collects the micro-batches of a step, and takes their losses.
        model: The model; None if ``model_init`` makes it.
        args: What the user asked for, or the settings that were made of it for this model.
        optimizers: None, and a schedule or None.
        **kwargs: As for ``transformers.Trainer``.

    Attributes:
        settings: Every setting of the run, with who decided it.
        method_optimizer: The optimizer of the method, once it is made.

    Raises:
        UsageError: If the model cannot be trained, or a setting cannot be honoured.
    """

    zo_settings: ClassVar[Mapping[str, Any]] = {}
    """What :func:`~zokernel.finetune.trainer.zeroth_order.zeroth_order` was given."""

    def __init__(
        self,
        micro_batches: MicroBatches,
        *,
        model: nn.Module | None,
        args: TrainingArguments | RunSettings | None,
        optimizers: tuple[Any, Any],
        **kwargs: Any,
    ):
        optimizer, schedule = optimizers
        if kwargs.pop("optimizer_cls_and_kwargs", None) is not None or optimizer is not None:
            raise UsageError(
                "The trainer makes the optimizer: name its method, as in zeroth_order(Trainer, method='kerzoo'), and "
                "leave the optimizer out."
            )
        self.method_optimizer: Any = None
        self.micro_batches = micro_batches
        if not isinstance(args, RunSettings):
            args = copy.copy(add_zeroth_order(args or TrainingArguments("tmp_trainer"), self.zo_settings))
            _without_evaluation(args, kwargs.get("eval_dataset"))
            _without_lengths(args, kwargs.get("train_dataset"), kwargs.get("processing_class"))
            if isinstance(args, ZOConfig) and self.draws_examples:
                _as_transformers(args)
        requested: Any = args.requested if isinstance(args, RunSettings) else args
        self._freezing = {"layers": requested.freeze_layers, "vectors": requested.freeze_vectors}
        self.zeroth_order = not is_first_order(requested.method)
        self._scores_only = isinstance(args, RunSettings) and not requested.do_train
        if model is not None:
            self._prepare_model(model)
        if not isinstance(args, RunSettings):
            args = _resolve(args, model, kwargs.get("train_dataset"), by_example=self.can_stack)
        super().__init__(args, model=model, optimizers=(None, schedule), **kwargs)
        self.model: Any
        is_low_precision = self.zeroth_order and bool(low_precision(self.model))
        if model is None and (trained_part(self.model) != "full parameters" or is_low_precision):
            self.settings = _resolve(requested, self.model, self.train_dataset, by_example=self.can_stack)
            self.fill_in(self.settings.values())

    @property
    def can_stack(self) -> bool:
        """Whether the losses of a step can be taken in one forward."""
        return False

    @property
    def short_rows(self) -> bool:
        """Whether few examples make a short forward, of which several in one may pay."""
        return True

    def trial_stacked(self, copies: int) -> Tensor:
        """Return the losses of several copies of a fixed batch; only where :attr:`can_stack` is true."""
        raise NotImplementedError

    def _prepare_model(self, model: nn.Module) -> None:
        freeze_(model, **self._freezing)
        if not self._scores_only:
            check_trainable(model)
        accept_quantized_(model, first_order=not self.zeroth_order)

    def call_model_init(self, trial: Any = None) -> Any:
        """Make the model by ``model_init``."""
        model = super().call_model_init(trial)
        self._prepare_model(model)
        return model

    def create_accelerator_and_postprocess(self) -> None:
        """Build the accelerator for one GPU; under autocast, keep no second copy of the weights."""
        if (gpus := use_one_gpu(self.args)) > 1:
            logger.warning(
                "This process computes on one of %d GPUs: start one process per GPU with torchrun to use all of them.",
                gpus,
            )
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
        self.parallel = make_parallel(*arguments, self.micro_batches.weight) if self.zeroth_order else None
        if self.parallel is not None:
            synchronise_no_gradients(self.accelerator)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the trainer; processes that share the points of a step read the same batches."""
        loader = super().get_train_dataloader()
        return loader if self.parallel is None else share_batches(loader, self.parallel)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the trainer's loader of every row: ``dataloader_drop_last`` is for training."""
        with self._every_row():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the trainer's loader of every row: ``dataloader_drop_last`` is for training."""
        with self._every_row():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _every_row(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of ``args.method`` on the trainable parameters, keyed by their names."""
        if self.optimizer is None:
            model = self.model if model is None else model
            assert model is not None
            if self.recorded and "auto" in (self.args.perturb, self.settings.setting("perturb").source):
                self.decide("auto", perturb=self.recorded["perturb"].value)
            if self.method_optimizer is None:
                self.method_optimizer = make_optimizer(model, self.get_decay_parameter_names(model), self.args)
            optimizer = self.method_optimizer
            self.optimizer = LoopOptimizer(optimizer) if self.zeroth_order else optimizer
            if self.zeroth_order:
                self._set_perturb(optimizer)
            self.effective_lr = optimizer.effective_lr()  # before any schedule
            logger.info(
                "Method %s: learning rate %g, effective learning rate%s, %s.",
                self.args.method,
                self.args.learning_rate,
                ": known after the first step" if math.isnan(self.effective_lr) else f" {self.effective_lr:g}",
                f"{plural(self.forwards_per_step, 'forward')} per step"
                if self.zeroth_order
                else "gradients by backpropagation",
            )
        return self.optimizer

    def _set_perturb(self, optimizer: Any) -> None:
        """Let an optimizer take its losses as the settings say, as far as that can be decided before the loop."""
        perturb = stream_points(optimizer, self.bare_model, self.args.perturb) or choose_perturb.stack_or_share(
            optimizer,
            self.bare_model,
            self.args,
            stacked=self.micro_batches.stacked if self.can_stack else None,
            parallel=self.parallel,
            trial=self.trial_stacked if self.can_stack else None,
            examples=self.micro_batches.examples if self.can_stack else None,
            short_rows=self.short_rows,
        )
        if perturb != self.args.perturb:
            self.decide("auto", perturb=perturb)

    def forget_optimizer(self) -> None:
        """Let the loop make its optimizer anew, and the schedule with it."""
        super().forget_optimizer()
        self.method_optimizer = None

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Build the schedule of transformers; a rate that stays and then falls does so over the run's last part."""
        if self.settings.setting("lr_scheduler_kwargs").source == "auto":  # decided for the length of an earlier run
            self.decide("default", lr_scheduler_kwargs=self.settings.requested.lr_scheduler_kwargs)
        kwargs = self.args.lr_scheduler_kwargs  # a string only until transformers has parsed it
        options = kwargs if isinstance(kwargs, dict) else {}
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and "num_decay_steps" not in options:
            cooldown = {"num_decay_steps": cooldown_steps(num_training_steps), "decay_type": "linear"}
            self.decide("auto", lr_scheduler_kwargs=cooldown | options)
        return super().create_scheduler(num_training_steps, optimizer)

    @contextmanager
    def fresh_model(self) -> Iterator[None]:
        """Make the model anew if there is a ``model_init``, before the journal looks at it; the loop does not again."""
        model_init: Any = self.model_init
        if model_init is not None:
            set_seed(self.args.seed)
            self.model = self.model_wrapped = self.call_model_init(self.trial)
            self.lr_scheduler, self._weights_moved = None, False
            self.forget_optimizer()
            if self.place_model_on_device:
                self.model.to(self.args.device)
        self.model_init: Any = None
        try:
            yield
        finally:
            self.model_init = model_init

    @property
    def forwards_per_step(self) -> int:
        """Forward passes of one optimizer step (a first-order step counts as one)."""
        return self.bare_optimizer.forwards_per_step if self.zeroth_order else 1

    @property
    def data_ranks(self) -> int:
        """How many batches the processes of the run see in one step."""
        return self.parallel.data_ranks if self.parallel is not None else super().data_ranks


def _resolve(args: Any, model: Any, dataset: Any, *, by_example: bool) -> RunSettings:
    num_examples = len(dataset) if dataset is not None and hasattr(dataset, "__len__") else None
    trained = "full parameters" if model is None else trained_part(model)
    low = "" if model is None or is_first_order(args.method) else low_precision(model)
    by_example = by_example and model is not None and choose_perturb.only_trains_lora(model) and not args.torch_compile
    settings = resolve(args, trained=trained, num_examples=num_examples, by_example=by_example, low_precision=low)
    return name_derived(settings)


def _as_transformers(args: ZOConfig) -> None:
    """Take transformers' defaults where those of ``ZOConfig`` fit zokernel's own examples only."""
    for name, value in (("train_sampling_strategy", "random"), ("remove_unused_columns", True)):
        if name not in args.given:
            setattr(args, name, value)


def _without_evaluation(args: Any, dataset: Any) -> None:
    """Evaluate nothing if there is nothing to evaluate and no evaluation was requested.

    Raises:
        UsageError: If the best step was requested, which no run without evaluations knows.
    """
    if dataset is not None or args.eval_strategy == IntervalStrategy.NO or "eval_strategy" in args.given:
        return
    for name, requested in (("save_strategy", SaveStrategy.BEST), ("load_best_model_at_end", True)):
        if name in args.given and getattr(args, name) == requested:
            raise UsageError(
                f"{name}={getattr(requested, 'value', requested)!r} needs evaluations, and there is no eval_dataset: "
                "pass one, or leave it out."
            )
    logger.info("There is no eval_dataset: the run is not evaluated, and ends with its last weights.")
    derive(args, eval_strategy=IntervalStrategy.NO, load_best_model_at_end=False)
    if args.save_strategy == SaveStrategy.BEST:
        derive(args, save_strategy=SaveStrategy.STEPS)


def _without_lengths(args: Any, dataset: Any, processing_class: Any) -> None:
    """Draw examples at random if they have no length to group them by, such as images.

    Raises:
        UsageError: If they were to be grouped.
    """
    if args.train_sampling_strategy != "group_by_length" or isinstance(dataset, IterableDataset):
        return
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset)):
        return
    first, names = dataset[0], getattr(processing_class, "model_input_names", None) or ["input_ids"]
    if isinstance(first, Mapping) and (names[0] in first or args.length_column_name in first):
        return
    if "train_sampling_strategy" in args.given:
        raise UsageError(
            f"train_sampling_strategy group_by_length needs rows with {names[0]!r}, or with the column that "
            "length_column_name names, and these have neither: leave it out, or set random."
        )
    args.train_sampling_strategy = "random"
