"""One run, whose settings are decided: model, zero-shot score, training, final score, and everything saved."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from zokernel.files import write_json
from zokernel.finetune.data.datasets import Splits
from zokernel.finetune.models.adapters import log_base, virtual_tokens
from zokernel.finetune.models.check import CheckedModel
from zokernel.finetune.models.kind import fills_masks, kind_of_model
from zokernel.finetune.models.load import load_model, longest_input
from zokernel.finetune.models.memory import PeakMemory
from zokernel.finetune.models.merge import save_merged
from zokernel.finetune.models.same_base import base_facts
from zokernel.finetune.monitor.diagnosis import diagnosis_metrics
from zokernel.finetune.monitor.divergence import describe_failure
from zokernel.finetune.monitor.interrupt import StopOnInterrupt
from zokernel.finetune.monitor.streaming import Streaming
from zokernel.finetune.predictor_record import write_predictor
from zokernel.finetune.report.card import write_card
from zokernel.finetune.report.metrics import (
    evaluations,
    measures,
    model_facts,
    repeat_facts,
    settings_of,
    task_facts,
)
from zokernel.finetune.report.run_report import draw_loss, write_report
from zokernel.finetune.report.samples import pair_samples
from zokernel.finetune.report.text import describe_start, finite_or_none
from zokernel.finetune.report.zero_shot import cached_score, fingerprint
from zokernel.finetune.rewards.prompts import describe_empty_answers
from zokernel.finetune.run_files import read_run_file
from zokernel.finetune.scoring.continuations import continuations
from zokernel.finetune.scoring.prepare import Inputs, prepare
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.settings.record import RunSettings
from zokernel.finetune.storage import run_folder as output
from zokernel.finetune.storage.checkpoint import remove_checkpoints
from zokernel.finetune.tasks import PromptTask, Task
from zokernel.finetune.tasks.prompt import Label
from zokernel.finetune.tasks.text import TextTask
from zokernel.finetune.trainer.processes import from_main
from zokernel.finetune.trainer.reward_trainer import RewardTrainer
from zokernel.finetune.trainer.zo_trainer import ZOTrainer
from zokernel.journal.reader import FILE_NAME
from zokernel.readable import plural
from zokernel.secrets import hide_in_text, hide_in_values, hide_in_words

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a checkpoint was saved."""


class Run:
    """One run of the job, whose settings are decided and whose folder is free.

    Args:
        checked: The model.
        task: What the rows are.
        splits: The rows.
        settings: Every setting of the run.
        data_arguments: Which rows they are, and how they are phrased.
        command: The command line, for the report.
        start: When the job began, by ``time.perf_counter``.
    """

    def __init__(
        self,
        checked: CheckedModel,
        task: Task,
        splits: Splits,
        settings: RunSettings,
        *,
        data_arguments: DataArguments,
        command: Sequence[str],
        start: float,
    ):
        self.checked, self.task, self.splits, self.settings = checked, task, splits, settings
        self.config, self.model_arguments, self.data_arguments = settings.arguments(), checked.arguments, data_arguments
        self.command, self.start = hide_in_words(command), start
        self.max_length, self.warning = 0, ""

    def carry_out(self, folder: Path, identity: dict[str, Any], resume: str | bool) -> dict[str, Any]:
        """Train and write the results.

        Args:
            folder: The output folder.
            identity: The settings that tell this run from others.
            resume: Whether the run that is there is continued, or from which checkpoint.

        Returns:
            The content of ``metrics.json``.

        Raises:
            Interrupted: If a signal stopped the run after a checkpoint was saved.
        """
        set_seed(self.config.seed)
        self.model, tokenizer = load_model(self.model_arguments, self.config, self.checked)
        self.masked = fills_masks(self.model)
        trainer = self._make_trainer(tokenizer)
        record = self._open_record(folder, identity, continues=bool(resume))
        with output.noted_failure(folder, record) if self.config.should_save else nullcontext():
            return self._train(trainer, folder, identity, record, resume)

    def _train(
        self, trainer: ZOTrainer, folder: Path, identity: dict[str, Any], record: dict[str, Any], resume: str | bool
    ) -> dict[str, Any]:
        """Score, train, score again and write the results; return the content of ``metrics.json``."""
        config, main = self.config, self.config.should_save
        if "before" not in record:
            self._score_before(trainer, record)
            if main:
                write_json(folder / output.RUN_FILE, record)
        self._log_start(record["before"])
        trainer.known_reason = self.warning
        trainer.needs_saved_step = False
        trainer.on_loop_begin = partial(self._note_begin, folder, trainer, record, identity)
        with PeakMemory() as training, Streaming(self.model) as streaming:
            if config.do_train:
                trainer.train(resume_from_checkpoint=resume)
        if any(isinstance(c, StopOnInterrupt) and c.interrupted for c in trainer.callback_handler.callbacks):
            if main:
                trainer.run_log.save()
                write_json(folder / output.RUN_FILE, record | {"seconds": self._seconds(trainer, record)})
            raise Interrupted(f"Stopped at step {trainer.state.global_step}; continue with the same command.")
        after = evaluate(trainer, self.encoded["test"]) if config.do_train else record["before"]
        answers = self._continue_samples() if config.do_train else record["written"]
        if config.do_train:
            trainer.save_model(str(folder))
            if main and self._journal_suffices(trainer, folder):
                remove_checkpoints(folder)
        samples = pair_samples(self.prepared.samples, record["written"], answers)
        metrics = self._metrics(trainer, record, after, training.peak_bytes) | streaming.facts | {"samples": samples}
        metrics = hide_in_values(metrics)
        if main:
            write_json(folder / output.RUN_FILE, record | {"seconds": metrics["total_seconds"]})
            if config.do_train and self.model_arguments.merge_adapter:
                save_merged(trainer.bare_model, folder)
                metrics["saved"] = "model"
            elif config.do_train:
                log_base(self.model, self.model_arguments.model_name_or_path)
            self._write(folder, trainer, metrics)
        return metrics

    def _open_record(self, folder: Path, identity: dict[str, Any], *, continues: bool) -> dict[str, Any]:
        """Return what the folder tells of a run that is continued, or begin to write that of a new one."""
        record = output.new_record(self.command, identity, base_facts(self.model))
        if self.config.should_save and continues:
            record = read_run_file(folder / output.RUN_FILE)
            record.pop("stopped_by", None)
        elif self.config.should_save:
            write_json(folder / output.RUN_FILE, record)
        return from_main(record)

    def _log_start(self, before: dict[str, float]) -> None:
        """Log the score before training."""
        how = describe_start(self.data_arguments.num_demonstrations, trained=self.checked.is_trained)
        metric, where = self.task.metric, "validation" if self.splits.test_is_validation else "test"
        examples = plural(len(self.splits.test), f"{where} example")
        logger.info("%s %s on %s: %.3f.", how.capitalize(), metric, examples, before[metric])
        empty = before.get("empty_answers", 0.0)
        self.warning = describe_empty_answers(empty, self.splits.test, self.checked.tokenizer)
        if self.warning:
            logger.warning("%s", self.warning)

    def _note_begin(self, folder: Path, trainer: ZOTrainer, record: dict[str, Any], identity: dict[str, Any]) -> None:
        """Write down that the loop begins, and the forwards that settings were chosen by."""
        for name in ("measuring_forwards", "rate_forwards"):
            record[name] = record.get(name, 0) + getattr(trainer, name)
        steps_taken = max(trainer.state.global_step, trainer.journal.num_steps if trainer.journal else 0)
        total_steps = trainer.state.max_steps
        output.note_begin(folder, record, settings=identity, total_steps=total_steps, steps_taken=steps_taken)

    def _seconds(self, trainer: ZOTrainer, record: dict[str, Any]) -> float:
        """Return the seconds of the run so far, those of earlier processes included."""
        earlier = max(record.get("seconds", 0.0), trainer.run_log.earlier_seconds)
        return round(earlier + time.perf_counter() - self.start, 2)

    def _journal_suffices(self, trainer: ZOTrainer, folder: Path) -> bool:
        """Return whether the journal makes the checkpoints superfluous: no setting says to keep them."""
        strategy, limit = map(trainer.settings.setting, ("save_strategy", "save_total_limit"))
        is_periodic = strategy.value in ("steps", "epoch") and strategy.source in ("user", "recipe")
        keeps_checkpoints = is_periodic or limit.source != "default"
        return trainer.zeroth_order and (folder / FILE_NAME).exists() and not keeps_checkpoints

    def _make_trainer(self, tokenizer: Any) -> ZOTrainer:
        data, task = self.data_arguments, self.task
        reserved = virtual_tokens(self.model) + (data.max_new_tokens if task.kind in ("generation", "reward") else 0)
        max_length = self.max_length = longest_input(self.model, tokenizer, data.max_length, reserved=reserved)
        inputs = Inputs(task, self.splits, self.model, tokenizer, data, max_length, self.config.objective)
        self.prepared = prepare(inputs)
        self.encoded, self.objective = self.prepared.encoded, self.prepared.objective
        return (RewardTrainer if task.kind == "reward" else ZOTrainer)(
            self.model,
            self.settings,
            objective=self.objective,
            train_dataset=self.encoded["train"],
            eval_dataset=self.encoded["validation"],
            data_collator=self.prepared.collator,
            processing_class=tokenizer,
        )

    def _score_before(self, trainer: ZOTrainer, record: dict[str, Any]) -> None:
        config, data, test = self.config, self.data_arguments, self.encoded["test"]
        scoring = (
            f"{config.precision} {config.objective} {data.calibrate} {data.max_new_tokens} loss per example, no penalty"
        )
        with PeakMemory() as inference:
            # The largest batches decide the peak, whether or not the score is known already.
            evaluate(trainer, test.longest(2 * config.per_device_eval_batch_size))
            # Several processes score together, and not each of them may remember; nobody knows what a reward reads.
            shared = config.world_size > 1 or self.task.kind == "reward"
            score = partial(evaluate, trainer, test)
            record["before"] = score() if shared else cached_score(fingerprint(self.model, test, scoring), score)
        record["peak_memory_inference"] = inference.peak_bytes
        record["written"] = self._continue_samples()

    def _continue_samples(self) -> list[str]:
        """Return what the model writes now after the held-out prompts that are shown."""
        prompts = [sample.prompt_ids for sample in self.prepared.samples]
        if not prompts:
            return []
        settings: Any = {"max_new_tokens": self.data_arguments.max_new_tokens, "ends": self.prepared.ends}
        settings["decoder_prompt"] = self.prepared.decoder_prompt
        return list(map(hide_in_text, continuations(self.model, self.checked.tokenizer, prompts, **settings)))

    def _metrics(
        self, trainer: ZOTrainer, record: dict[str, Any], after: dict[str, float], peak_memory: int
    ) -> dict[str, Any]:
        log, has_steps = trainer.run_log, trainer.zeroth_order and trainer.optimizer is not None
        return {
            **model_facts(self.model, self.model_arguments, trained=self.checked.is_trained),
            **task_facts(self.task, self.data_arguments, masked=self.masked),
            **settings_of(trainer.settings.arguments(), self.settings.requested),
            "num_train": len(self.encoded["train"]),
            "num_test": len(self.splits.test),
            "test_is_validation": self.splits.test_is_validation,
            "test_trained_on": self.splits.num_test_in_train * self.config.do_train,
            "before": record["before"],
            "after": after,
            "steps": trainer.state.global_step,
            "best_step": trainer.final_step,
            "forwards": log.forwards,
            "measuring_forwards": record.get("measuring_forwards", 0),
            "rate_forwards": record.get("rate_forwards", 0),
            "forwards_per_step": trainer.forwards_per_step if has_steps else None,
            "train_seconds": round(log.seconds, 2),
            "total_seconds": self._seconds(trainer, record),
            "peak_memory_inference": record["peak_memory_inference"],
            "peak_memory_training": peak_memory,
            "effective_lr": finite_or_none(trainer.effective_lr) if self.config.do_train else None,
            "warning": self.warning,
            "went_wrong": trainer.divergence or describe_failure(log.rows),
            "diagnosis": diagnosis_metrics(
                trainer.diagnosis,
                record["before"],
                after,
                keeps_best=self.config.load_best_model_at_end,
                streamed=self.model_arguments.offload is not None,
            ),
            "evaluations": evaluations(trainer.state.log_history, log.forwards_at),
            **repeat_facts(self.command),
        }

    def _write(self, folder: Path, trainer: ZOTrainer, metrics: dict[str, Any]) -> None:
        log = trainer.run_log
        if log.rows:
            log.save()
            test = [{"forwards": 0, **metrics["before"]}, {"forwards": log.forwards, **metrics["after"]}]
            draw_loss(log.rows, metrics["evaluations"], test, folder / "loss.png", metric=self.task.metric)
            write_card(metrics, folder / "README.md")
        write_report(metrics, folder / "report.md")
        if log.rows:
            self._write_predictor(folder)
        write_json(folder / output.METRICS_FILE, metrics)  # last: it says that the run is finished

    def _write_predictor(self, folder: Path) -> None:
        """Write how the trained weights answer new rows."""
        data = self.data_arguments
        task = TextTask(form="prompt-completion") if self.task.kind == "reward" else self.task
        write_predictor(
            folder,
            task,
            kind=kind_of_model(self.model),
            max_length=self.max_length,
            precision=self.config.precision,
            arguments=self.model_arguments,
            labels=self._labels(),
            context=self.prepared.context,
            calibrate=data.calibrate,
            max_new_tokens=data.max_new_tokens,
            ends=self.prepared.ends,
        )

    def _labels(self) -> tuple[Label, ...]:
        """Return the label of each class as the rows write it; none if there are no classes."""
        splits = self.splits
        return self.task.spellings(splits.train or splits.test) if isinstance(self.task, PromptTask) else ()


def evaluate(trainer: ZOTrainer, dataset: Any) -> dict[str, float]:
    """Return loss and metrics on a data set."""
    return measures(trainer.predict(dataset, metric_key_prefix="test").metrics or {}, "test")
