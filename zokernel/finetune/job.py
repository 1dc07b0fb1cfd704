"""The main job from end to end: data, model, zero-shot score, training, final score, and everything saved."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import set_seed
from transformers.trainer_utils import SchedulerType

from zokernel._version import __version__
from zokernel.files import read_json, write_json
from zokernel.finetune.data.datasets import load_splits, load_task
from zokernel.finetune.data.encode_splits import encode_splits, fills_masks, make_objective
from zokernel.finetune.models.load import load_model
from zokernel.finetune.models.memory import PeakMemory
from zokernel.finetune.monitor.callbacks import StopOnInterrupt
from zokernel.finetune.report.card import write_card
from zokernel.finetune.report.report import draw_loss, write_report
from zokernel.finetune.report.zero_shot import fingerprint, remembered
from zokernel.finetune.scoring.options import EncodedDataset, choose_collator
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.settings.auto import LORA_EPS, count_steps, learning_rate
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.storage import run_folder as output
from zokernel.finetune.storage.lock import exclusive
from zokernel.finetune.tasks import Task
from zokernel.finetune.trainer.zo_trainer import ZOTrainer
from zokernel.process_memory import release_heap

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
    with ExitStack() as held, output.explained_errors(Path(str(config.output_dir))):
        return _finetune(model_arguments, data_arguments, config, command, held)


def _finetune(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    config: ZOConfig,
    command: Sequence[str],
    held: ExitStack,
) -> dict[str, Any]:
    start = time.perf_counter()
    config.method_options()
    folder = Path(str(config.output_dir))
    task = load_task(data_arguments)
    splits = load_splits(data_arguments, task, seed=config.seed if config.data_seed is None else config.data_seed)
    set_default_lr(config, model_arguments, examples=len(splits.train))
    main = config.should_save  # of several processes, one looks at the folder and writes
    asked = str(config.resume_from_checkpoint or "")
    settings = output.run_settings(model_arguments, data_arguments, config)
    there = ""
    if main:
        held.enter_context(exclusive(folder))
        there = output.prepare(folder, overwrite=config.overwrite_output_dir, resume=bool(asked), settings=settings)
    there = from_main(there)
    if there == "finished":
        logger.info("%s holds this very run, finished: nothing is left to do.", folder)
        return read_json(folder / output.METRICS_FILE)
    resume: str | bool = asked if asked.lower() not in ("", "last", "true") else there == "unfinished"
    if resume:
        logger.info("Continuing the run in %s.", folder)
    set_seed(config.seed)
    model, tokenizer = load_model(model_arguments, config)
    encoded = encode_splits(task, splits, model, tokenizer, data_arguments, objective=config.objective)
    everything = EncodedDataset([example for dataset in encoded.values() for example in dataset.examples])
    collator = choose_collator(model, tokenizer.pad_token_id, everything)
    objective = make_objective(task, model, tokenizer, collator, data_arguments, config)
    trainer = ZOTrainer(
        model,
        config,
        objective=objective,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        data_collator=collator,
        processing_class=tokenizer,
    )
    run: dict[str, Any] = {"zokernel": __version__, "command": list(command), "settings": settings}
    if main and resume:
        run = read_json(folder / output.RUN_FILE)
    elif main:
        write_json(folder / output.RUN_FILE, run)
    run = from_main(run)
    if "before" not in run:
        scoring = f"{config.precision} {objective.objective} {data_arguments.calibrate} {objective.max_new_tokens}"
        key = fingerprint(model, encoded["test"], scoring)
        with PeakMemory() as inference:
            # The largest batches decide the peak, whether or not the score is known already.
            evaluate(trainer, encoded["test"].longest(2 * config.per_device_eval_batch_size))
            # Several processes score together, and not each of them may remember.
            score = partial(evaluate, trainer, encoded["test"])
            run["before"] = remembered(key, score) if config.world_size == 1 else score()
        run["peak_memory_inference"] = inference.peak_bytes
        release_heap()  # training loads a compiler next, for which the activations' room is enough
        if main:
            write_json(folder / output.RUN_FILE, run)
    how = f"{data_arguments.num_demonstrations}-shot in-context" if data_arguments.num_demonstrations else "Zero-shot"
    logger.info("%s %s on %d test examples: %.3f.", how, task.metric, len(splits.test), run["before"][task.metric])

    def begun() -> None:
        # Only now is it sure that the run there is continued, perhaps with a longer --max_steps.
        (folder / output.METRICS_FILE).unlink(missing_ok=True)
        write_json(folder / output.RUN_FILE, run | {"settings": settings})

    trainer.when_begun = begun
    with PeakMemory() as training:
        if config.do_train:
            trainer.train(resume_from_checkpoint=resume)
    if any(isinstance(c, StopOnInterrupt) and c.interrupted for c in trainer.callback_handler.callbacks):
        if main:
            trainer.run_log.save(folder)
        raise Interrupted(f"Stopped at step {trainer.state.global_step}; continue with the same command.")
    after = evaluate(trainer, encoded["test"]) if config.do_train else run["before"]
    if config.do_train:
        trainer.save_model(str(folder))

    log = trainer.run_log
    evaluations = [
        {"step": row["step"], "forwards": log.forwards_at(row["step"]), **measures(row, "eval")}
        for row in trainer.state.log_history
        if "eval_loss" in row
    ]
    metrics = {
        "model": model_arguments.model_name_or_path,
        "method": config.method,
        "saved": "adapter" if hasattr(model, "peft_config") else "model",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "task": data_arguments.task_file or data_arguments.task,
        "protocol": data_arguments.protocol,
        **wording(task, masked=fills_masks(model)),
        "metric": task.metric,
        "objective": config.objective,
        "language_model": "masked" if fills_masks(model) else "causal",
        "num_demonstrations": data_arguments.num_demonstrations,
        "num_train": len(encoded["train"]),
        "num_test": len(splits.test),
        "test_is_validation": splits.test_is_validation,
        "before": run["before"],
        "after": after,
        "steps": trainer.state.global_step,
        "best_step": trainer.final_step,
        "selected_by": config.metric_for_best_model or "loss",
        "forwards": log.forwards,
        "forwards_per_step": forwards_per_step(trainer),
        "train_seconds": round(log.seconds, 2),
        "total_seconds": round(time.perf_counter() - start, 2),
        "peak_memory_inference": run["peak_memory_inference"],
        "peak_memory_training": training.peak_bytes,
        "learning_rate": config.learning_rate,
        "effective_lr": trainer.effective_lr if config.do_train else None,
        "method_options": config.method_options(),
        "precision": config.precision,
        "seed": config.seed,
        "data_seed": config.data_seed,
        "evaluations": evaluations,
        "command": shlex.join(["zokernel", *command]),
        "versions": {"zokernel": __version__, "torch": torch.__version__},
    }
    if not main:
        return metrics
    if log.rows:
        log.save(folder)
        test = [{"forwards": 0, **run["before"]}, {"forwards": log.forwards, **after}]
        draw_loss(log.rows, evaluations, test, folder / "loss.png", metric=task.metric)
        write_card(metrics, folder / "README.md")
    write_report(metrics, folder / "report.md")
    write_json(folder / output.METRICS_FILE, metrics)  # last: it says that the run is finished
    return metrics


def from_main(value: Any) -> Any:
    """Return what the main process passed, on every process."""
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def evaluate(trainer: ZOTrainer, dataset: EncodedDataset) -> dict[str, float]:
    """Return loss and metrics on a data set."""
    return measures(trainer.predict(dataset, metric_key_prefix="test").metrics or {}, "test")


def measures(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """Pick loss and metrics, as ``loss``, ``accuracy``, ``f1`` and ``em``, from what the Trainer reports."""
    names = [name for name in ("loss", "accuracy", "f1", "em") if f"{prefix}_{name}" in row]
    return {name: row[f"{prefix}_{name}"] for name in names}


def wording(task: Task, *, masked: bool) -> dict[str, Any]:
    """Return the template and, where all examples share them, the words that were scored."""
    words = getattr(task, "masked_label_words", ()) if masked else ()
    template = task.masked_template if masked and task.masked_template else task.template
    return {"template": template, "label_words": list(words or getattr(task, "label_words", ()))}


def forwards_per_step(trainer: ZOTrainer) -> int | None:
    """Return the forwards of a zeroth-order step; ``None`` if there was none."""
    return trainer.forwards_per_step if trainer.zeroth_order and trainer.optimizer is not None else None


def set_default_lr(config: ZOConfig, arguments: ModelArguments, *, examples: int) -> None:
    """Fill in the learning rate (and for ``auto`` the radius) if none was given, and log it.

    Args:
        config: The run's settings.
        arguments: Which model, and what of it is trained.
        examples: Training examples, from which the steps of an epoch follow.
    """
    if arguments.prefix_tuning or arguments.prompt_tuning:
        what, defaults = "virtual tokens", {"adamw": 1e-2, "sgd": 1e-2}
    elif arguments.lora or arguments.adapter_name_or_path:
        what, defaults = "LoRA", {"adamw": 1e-4, "sgd": 1e-2}
    else:
        what, defaults = "full parameters", {"adamw": 1e-5, "sgd": 1e-3}
    if config.auto and config.eps is None and what == "LoRA":
        config.eps = LORA_EPS
    if config.learning_rate is None:
        zeroth_order = {"virtual tokens": 1e-2, "LoRA": 1e-3, "full parameters": 1e-5}[what]
        config.learning_rate = defaults.get(config.method, zeroth_order)
        if config.auto:
            assert config.num_perturbations is not None
            steps = count_steps(config, examples)
            schedule = SchedulerType(config.lr_scheduler_type).value
            config.learning_rate = learning_rate(
                what, num_perturbations=config.num_perturbations, steps=steps, schedule=schedule
            )
        logger.info("Learning rate: %g (the default for %s).", config.learning_rate, what)
