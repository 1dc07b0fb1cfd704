"""``ZOTrainer``: transformers' training loop with a step that only runs forwards.

Everything around the step (logging, schedules, evaluation, checkpoints, hub, progress) is the ``Trainer``'s own; this
subclass overrides public hooks only.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import TrainOutput

from zokernel.errors import RunError, UsageError
from zokernel.finetune.callbacks import RunLog, StopOnInterrupt, replace_progress_bar
from zokernel.finetune.config import ZOConfig
from zokernel.finetune.model import load_weights_
from zokernel.finetune.scoring import classification_loss, option_scores
from zokernel.optim import get_method

logger = logging.getLogger(__name__)


class ZOTrainer(Trainer):
    r"""``transformers.Trainer`` that trains with forward passes only (or, with a first-order method, as usual).

    One optimizer step evaluates the loss of the same batch at a few perturbed weights.  The model stays in evaluation
    mode throughout: dropout would make those losses incomparable.  With gradient accumulation the closure averages the
    loss over the micro-batches, so the scalars are those of the whole batch.

    Args:
        model: A language model of transformers, or a peft model, with at least one trainable parameter.
        args: A :class:`ZOConfig`.
        **kwargs: As for ``transformers.Trainer``.  Batches are expected as ``zokernel.finetune.scoring.Collator`` makes
            them; override :meth:`compute_loss` for any other loss.

    Raises:
        UsageError: If the model has no trainable parameter or is quantized.
    """

    args: ZOConfig

    def __init__(self, model: nn.Module, args: ZOConfig, **kwargs: Any):
        check_trainable(model, args)
        kwargs.setdefault("compute_metrics", accuracy)
        super().__init__(model=model, args=args, **kwargs)
        self.zeroth_order = not getattr(get_method(args.method), "first_order", False)
        self.run_log = RunLog(self)
        self.add_callback(self.run_log)
        self.add_callback(StopOnInterrupt())
        replace_progress_bar(self)
        self.last_loss = self.effective_lr = float("nan")
        self._micro_batches: list[dict[str, Any]] = []

    def create_accelerator_and_postprocess(self) -> None:
        """Build the accelerator; under autocast, keep no second copy of the weights."""
        super().create_accelerator_and_postprocess()
        # Each weight is used once a forward, so caching its bf16 copy would only cost memory.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of ``args.method`` on the trainable parameters, keyed by their names."""
        if self.optimizer is None:
            model = self.model if model is None else model
            assert model is not None
            decayed = set(self.get_decay_parameter_names(model))
            options = self.args.method_options()
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
            self.effective_lr = optimizer.effective_lr()  # before any schedule
            logger.info(
                "Method %s: lr %g, effective lr %g, %s.",
                self.args.method,
                self.args.learning_rate,
                self.effective_lr,
                f"{self.forwards_per_step} forwards a step" if self.zeroth_order else "gradients by backpropagation",
            )
        return self.optimizer

    @property
    def bare_optimizer(self) -> Any:
        """The optimizer itself, without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

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
        batches, self._micro_batches = self._micro_batches, []

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                losses = [self.compute_loss(model, batch) for batch in batches]
            return torch.stack(losses).mean()

        self.last_loss = self.bare_optimizer.step(closure)
        return torch.tensor(self.last_loss, device=self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Score every option in one forward and return the cross entropy over options (and ``{"logits": scores}``)."""
        scores_BC = option_scores(model, inputs)
        loss = classification_loss(scores_BC, inputs["labels"])
        return (loss, {"logits": scores_BC}) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; end with the best checkpoint if asked to, and save the last good weights if the loss is not finite."""
        # The Trainer would read the best checkpoint as a second copy of the model; here it comes tensor by tensor.
        wants_best, self.args.load_best_model_at_end = self.args.load_best_model_at_end, False
        try:
            result = super().train(*args, **kwargs)
        except RunError as error:
            folder = Path(str(self.args.output_dir)) / "last-good"
            self.save_model(str(folder))
            raise RunError(f"{error} The last good weights are in {folder}.") from error
        finally:
            self.args.load_best_model_at_end = wants_best
        if wants_best and self.state.best_model_checkpoint:
            assert isinstance(self.model, nn.Module)
            load_weights_(self.model, Path(self.state.best_model_checkpoint))
        return result


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of examples whose highest-scored option is the label."""
    scores_NC = torch.as_tensor(prediction.predictions)
    return {"accuracy": (scores_NC.argmax(-1) == torch.as_tensor(prediction.label_ids)).float().mean().item()}


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
    if low and args.restore not in ("grid", "copy"):
        raise UsageError(
            f"Trainable weights are stored in {', '.join(low)}, where perturbing in place does not come back exactly: "
            "load them with --dtype float32 (forwards may still run in bf16), or set --restore copy."
        )
