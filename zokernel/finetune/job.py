"""The main job from end to end: data, model, zero-shot score, training, final score, and everything saved."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from zokernel._version import __version__
from zokernel.finetune import output
from zokernel.finetune.arguments import DataArguments, ModelArguments
from zokernel.finetune.callbacks import StopOnInterrupt
from zokernel.finetune.config import ZOConfig
from zokernel.finetune.datasets import Splits, load_splits, load_task
from zokernel.finetune.memory import PeakMemory
from zokernel.finetune.model import load_model
from zokernel.finetune.report import draw_loss, write_report
from zokernel.finetune.scoring import Collator, EncodedDataset
from zokernel.finetune.tasks import encode
from zokernel.finetune.tasks.prompt import report_label_words
from zokernel.finetune.trainer import ZOTrainer
from zokernel.finetune.zero_shot import fingerprint, remembered
from zokernel.optim import get_method

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a checkpoint was saved."""


def finetune(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    config: ZOConfig,
    *,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Fine-tune, evaluate before and after, and write everything to ``config.output_dir``.

    Args:
        model_arguments: Which model.
        data_arguments: Which examples and how they are phrased.
        config: The run's settings.
        command: The command line, for the report.

    Returns:
        The content of ``metrics.json``.

    Raises:
        UsageError: If the request is wrong; nothing was written.
        RunError: If it cannot be carried out, or the loss stopped being finite.
        Interrupted: If a signal stopped it after a checkpoint was saved.
    """
    start = time.perf_counter()
    set_default_lr(config, lora=bool(model_arguments.lora or model_arguments.adapter_name_or_path))
    config.method_options()
    folder = Path(str(config.output_dir))
    task = load_task(data_arguments)
    splits = load_splits(data_arguments, task, seed=config.seed)
    resume = config.resume_from_checkpoint
    output.prepare(folder, overwrite=config.overwrite_output_dir, resume=bool(resume))
    checkpoint = output.last_checkpoint(folder, str(resume)) if resume else None
    set_seed(config.seed)
    model, tokenizer = load_model(model_arguments, config)
    encoded = encode_splits(task, splits, tokenizer, max_length=data_arguments.max_length)
    trainer = ZOTrainer(
        model,
        config,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    run: dict[str, Any] = {"zokernel": __version__, "command": list(command)}
    if checkpoint:
        run = output.read_json(folder / output.RUN_FILE)
    output.write_json(folder / output.RUN_FILE, run)
    if "before" not in run:
        key = fingerprint(model, encoded["test"], config.precision)
        with PeakMemory() as inference:
            # The largest batches decide the peak, whether or not the score is known already.
            evaluate(trainer, encoded["test"].longest(2 * config.per_device_eval_batch_size))
            run["before"] = remembered(key, lambda: evaluate(trainer, encoded["test"]))
        run["peak_memory_inference"] = inference.peak_bytes
        output.write_json(folder / output.RUN_FILE, run)
    logger.info("Zero-shot accuracy on %d test examples: %.3f.", len(splits.test), run["before"]["accuracy"])

    with PeakMemory() as training:
        trainer.train(resume_from_checkpoint=checkpoint)
    if any(isinstance(c, StopOnInterrupt) and c.interrupted for c in trainer.callback_handler.callbacks):
        trainer.run_log.save(folder)
        raise Interrupted(
            f"Stopped at step {trainer.state.global_step}; everything is saved. Continue with the same command and "
            "--resume_from_checkpoint last."
        )
    after = evaluate(trainer, encoded["test"])
    trainer.save_model(str(folder))
    trainer.run_log.save(folder)

    log = trainer.run_log
    method = get_method(config.method)
    evaluations = [
        {
            "step": row["step"],
            "forwards": log.forwards_at(row["step"]),
            "loss": row["eval_loss"],
            "accuracy": row["eval_accuracy"],
        }
        for row in trainer.state.log_history
        if "eval_accuracy" in row
    ]
    metrics = {
        "model": model_arguments.model_name_or_path,
        "method": config.method,
        "saved": "adapter" if hasattr(model, "peft_config") else "model",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "template": task.template,
        "label_words": list(task.label_words),
        "num_train": len(splits.train),
        "num_test": len(splits.test),
        "test_is_validation": splits.test_is_validation,
        "before": run["before"],
        "after": after,
        "steps": trainer.state.global_step,
        "best_step": best_step(trainer),
        "selected_by": config.metric_for_best_model or "loss",
        "forwards": log.forwards,
        "forwards_per_step": None if getattr(method, "first_order", False) else trainer.forwards_per_step,
        "train_seconds": round(log.seconds, 2),
        "total_seconds": round(time.perf_counter() - start, 2),
        "peak_memory_inference": run["peak_memory_inference"],
        "peak_memory_training": training.peak_bytes,
        "learning_rate": config.learning_rate,
        "effective_lr": trainer.effective_lr,
        "method_options": config.method_options(),
        "precision": config.precision,
        "seed": config.seed,
        "evaluations": evaluations,
        "command": shlex.join(["zokernel", *command]),
        "versions": {"zokernel": __version__, "torch": torch.__version__},
    }
    output.write_json(folder / "metrics.json", metrics)
    test = [{"forwards": 0, **run["before"]}, {"forwards": log.forwards, **after}]
    draw_loss(log.rows, evaluations, test, folder / "loss.png")
    write_report(metrics, folder / "report.md")
    return metrics


def encode_splits(task: Any, splits: Splits, tokenizer: Any, *, max_length: int) -> dict[str, EncodedDataset]:
    """Tokenize the three splits and log what was found."""
    encoded = {
        split: encode(task, getattr(splits, split), tokenizer, max_length=max_length)
        for split in ("train", "validation", "test")
    }
    single = report_label_words(encoded["train"] + encoded["validation"] + encoded["test"], task)
    logger.info(
        "Data: %s examples; %s.",
        ", ".join(f"{len(examples)} {split}" for split, examples in encoded.items()),
        "one forward scores every label word" if single else "one row a label word in each forward",
    )
    return {split: EncodedDataset(examples) for split, examples in encoded.items()}


def evaluate(trainer: ZOTrainer, dataset: EncodedDataset) -> dict[str, float]:
    """Return loss and accuracy on a data set."""
    found = trainer.predict(dataset, metric_key_prefix="test").metrics or {}
    return {"loss": found["test_loss"], "accuracy": found["test_accuracy"]}


def best_step(trainer: ZOTrainer) -> int:
    """Return the step whose weights the run ended with."""
    best = trainer.state.best_model_checkpoint
    return (
        int(Path(best).name.rpartition("-")[2])
        if best and trainer.args.load_best_model_at_end
        else trainer.state.global_step
    )


def set_default_lr(config: ZOConfig, *, lora: bool) -> None:
    """Fill in the learning rate if none was given, and log it."""
    if config.learning_rate is None:
        defaults = {"adamw": (1e-5, 1e-4), "sgd": (1e-3, 1e-2)}.get(config.method, (1e-5, 1e-3))
        config.learning_rate = defaults[int(lora)]
        logger.info(
            "Learning rate: %g (the default for %s).", config.learning_rate, "LoRA" if lora else "full parameters"
        )
