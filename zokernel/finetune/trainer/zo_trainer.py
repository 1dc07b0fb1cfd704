"""``ZOTrainer``: transformers' training loop with a step that only runs forwards.

Everything around the step (logging, schedules, evaluation, checkpoints, hub, progress) is the ``Trainer``'s own; this
subclass overrides public hooks only.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, DynamoBackend
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import SchedulerType, TrainOutput

from zokernel.errors import LossError, RunError, UsageError
from zokernel.finetune.models.freezing import freeze_
from zokernel.finetune.monitor.callbacks import RunLog, StopOnInterrupt, replace_progress_bar
from zokernel.finetune.monitor.divergence import WarnOfDivergence
from zokernel.finetune.monitor.profile import Profile
from zokernel.finetune.scoring.objective import Objective
from zokernel.finetune.settings.auto import cooldown_steps
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.trainer.batch_size import fit_batch_size
from zokernel.finetune.trainer.compile_blocks import compile_blocks
from zokernel.finetune.trainer.evaluators import (
    make_evaluator,
    make_parallel,
    repeat_batch,
    share_batches,
    without_gradient_machinery,
)
from zokernel.finetune.trainer.resumable import ResumableTrainer
from zokernel.optim import ZerothOrderOptimizer, get_method

logger = logging.getLogger(__name__)


class ZOTrainer(ResumableTrainer):
    r"""``transformers.Trainer`` that trains with forward passes only (or, with a first-order method, as usual).

    One optimizer step evaluates the loss of the same batch at a few perturbed weights.  The model stays in evaluation
    mode throughout: dropout would make those losses incomparable.  With gradient accumulation the closure averages the
    loss over the micro-batches, so the scalars are those of the whole batch.

    Args:
        model: A language model of transformers, or a peft model, with at least one trainable parameter.
        args: A :class:`ZOConfig`.
        objective: What is minimised and reported; cross entropy over the options when not given.
        **kwargs: As for ``transformers.Trainer``.  Batches are expected as ``zokernel.finetune.Collator`` makes them;
            override :meth:`compute_loss` for any other loss.

    Raises:
        UsageError: If the model has no trainable parameter or is quantized, or a first-order method is to follow an
            objective that has no gradient.
    """

    args: ZOConfig
    objective: Objective

    def __init__(self, model: nn.Module, args: ZOConfig, *, objective: Objective | None = None, **kwargs: Any):
        freeze_(model, layers=args.freeze_layers, vectors=args.freeze_vectors)
        check_trainable(model, args)
        self.objective = objective or Objective(args.objective)
        self.zeroth_order = not getattr(get_method(args.method), "first_order", False)
        if not self.zeroth_order and self.objective.objective != "cross_entropy":
            raise UsageError(
                f"{self.objective.objective} has no gradient for {args.method} to follow: choose a zeroth-order "
                "method, or --objective cross_entropy."
            )
        kwargs.setdefault("compute_metrics", self.objective.metrics)
        super().__init__(model=model, args=args, **kwargs)
        # Every micro-batch's loss is a mean already; transformers would divide none of them by their number if the
        # model's own forward could.
        self.model_accepts_loss_kwargs = False
        self.run_log = RunLog(self)
        self.add_callback(self.run_log)
        self.add_callback(WarnOfDivergence(self))
        self.add_callback(StopOnInterrupt())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if args.profile:
            self.add_callback(Profile(self))
        replace_progress_bar(self)
        self.last_loss = self.effective_lr = float("nan")
        self._micro_batches: list[dict[str, Any]] = []

    def create_accelerator_and_postprocess(self) -> None:
        """Build the accelerator; under autocast, keep no second copy of the weights."""
        super().create_accelerator_and_postprocess()
        # Each weight is used once a forward, so caching its bf16 copy would only cost memory.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if self.args.torch_compile:
            # Not the whole model: its head sees other positions in every batch, and each would be compiled anew.
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            backend = self.args.torch_compile_backend or "inductor"
            assert self.model is not None
            compile_blocks(self.model, backend=backend, mode=self.args.torch_compile_mode)
        self.parallel = make_parallel(self.args) if self.zeroth_order else None
        if self.parallel is not None:
            without_gradient_machinery(self.accelerator)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of transformers; processes that share the points of a step read the same batches."""
        loader = super().get_train_dataloader()
        return loader if self.parallel is None else share_batches(loader, self.parallel)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of ``args.method`` on the trainable parameters, keyed by their names."""
        if self.optimizer is None:
            model = self.model if model is None else model
            assert model is not None
            decayed = set(self.get_decay_parameter_names(model))
            options = self.args.method_options()
            if self.zeroth_order and self.args.perturb in ("in_forward", "stacked"):
                options.setdefault("restore", "still")
            weight_decay = options.pop("weight_decay", 0.0)
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [(n, p) for n, p in named if n in decayed], "weight_decay": weight_decay},
                {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            method: Any = get_method(self.args.method)
            self.optimizer = optimizer = method(groups, lr=self.args.learning_rate, **options)
            if self.zeroth_order:
                optimizer.loop_calls_step = True  # the loop's own bare step() comes after training_step
                optimizer.evaluator = make_evaluator(self)
            self.effective_lr = optimizer.effective_lr()  # before any schedule
            logger.info(
                "Method %s: lr %g, effective lr %g, %s.",
                self.args.method,
                self.args.learning_rate,
                self.effective_lr,
                f"{self.forwards_per_step} forwards a step" if self.zeroth_order else "gradients by backpropagation",
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Build the schedule of transformers; a rate that stays and then falls does so over the run's last part."""
        kwargs = self.args.lr_scheduler_kwargs  # a string only until transformers has parsed it
        given = kwargs if isinstance(kwargs, dict) else {}
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and "num_decay_steps" not in given:
            cooldown = {"num_decay_steps": cooldown_steps(num_training_steps), "decay_type": "linear"}
            self.args.lr_scheduler_kwargs = cooldown | given
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def forwards_per_step(self) -> int:
        """Forward passes of one optimizer step (a first-order step counts as one)."""
        return self.bare_optimizer.forwards_per_step if self.zeroth_order else 1

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take one zeroth-order step (after the last micro-batch of an accumulation) and return its loss."""
        if not self.zeroth_order:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.last_loss = loss.item()
            return loss
        model.eval()
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                losses = [self.compute_loss(model, batch) for batch in self._micro_batches]
            return torch.stack(losses).mean()

        if self.journal is not None:
            self.last_loss = self.journal.step(self.bare_optimizer, closure)
        else:
            self.last_loss = self.bare_optimizer.step(closure)
        self._micro_batches = []
        return torch.tensor(self.last_loss, device=self.args.device)

    @property
    def data_ranks(self) -> int:
        """How many batches the processes of the run see in one step."""
        return self.parallel.data_ranks if self.parallel is not None else super().data_ranks

    @property
    def can_stack(self) -> bool:
        """Whether the losses of a step can be taken in one forward: not with a loss or an estimate of one's own."""
        own_estimate = type(self.bare_optimizer).estimate is not ZerothOrderOptimizer.estimate
        own_loss = type(self).compute_loss is not ZOTrainer.compute_loss
        return self.objective.can_stack and not own_estimate and not own_loss

    def stacked_losses(self, copies: int) -> Tensor:
        """Return the losses of copies of the coming step's batch, of which each may see weights of its own."""
        with self.compute_loss_context_manager():
            losses = [
                self.objective.stacked(self.model_wrapped, repeat_batch(batch, copies), copies)
                for batch in self._micro_batches
            ]
        return torch.stack(losses).mean(0)

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
        return self.objective(model, inputs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as :meth:`ResumableTrainer.train` does; if the loss is not finite, save the last good weights."""
        if self.args.auto_find_batch_size and self.zeroth_order:
            fit_batch_size(self)
            self.args.auto_find_batch_size = False  # transformers' way would start over with weights half moved
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except LossError as error:
            folder = Path(str(self.args.output_dir)) / "last-good"
            self.save_model(str(folder))
            raise RunError(f"{error} The last good weights are in {folder}.") from error


def check_trainable(model: nn.Module, args: ZOConfig) -> None:
    """Check before anything is built that the model can be trained this way.

    Raises:
        UsageError: If nothing is trainable, or the weights to be perturbed are quantized.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise UsageError(
            "The model has no trainable parameter: unfreeze some, or attach an adapter with is_trainable=True."
        )
    for name, parameter in trainable:
        if not parameter.is_floating_point():
            raise UsageError(
                f"{name} is quantized ({parameter.dtype}) and cannot be perturbed: load the model dequantized, "
                "or train a LoRA adapter on it (--lora)."
            )
    if getattr(model, "is_quantized", False) and not hasattr(model, "peft_config"):
        raise UsageError(
            "The model is quantized, so its weights cannot be perturbed: train a LoRA adapter on it (--lora)."
        )
    low = sorted({str(p.dtype) for _, p in trainable if p.dtype in (torch.bfloat16, torch.float16)})
    if low and args.restore not in ("grid", "copy") and args.perturb not in ("in_forward", "stacked"):
        raise UsageError(
            f"Trainable weights are stored in {', '.join(low)}, where perturbing in place does not come back exactly: "
            "set --perturb in_forward, which leaves them in place, or load them with --dtype float32 (forwards may "
            "still run in bf16)."
        )
