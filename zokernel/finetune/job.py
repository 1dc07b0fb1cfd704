"""The main job from end to end: data, model, zero-shot score, training, final score, and everything saved."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from zokernel.errors import UsageError
from zokernel.files import read_json, write_json
from zokernel.finetune.data.check_flags import check_flags
from zokernel.finetune.data.check_text import check_text
from zokernel.finetune.data.datasets import Splits, load_splits, load_task
from zokernel.finetune.models.adapters import say_base, trained_by, virtual_tokens
from zokernel.finetune.models.check import CheckedModel, check_model
from zokernel.finetune.models.kind import fills_masks, kind_of_model
from zokernel.finetune.models.load import load_model, longest_input
from zokernel.finetune.models.memory import PeakMemory
from zokernel.finetune.models.merge import save_merged
from zokernel.finetune.models.offload import offloaded
from zokernel.finetune.models.same_base import base_facts
from zokernel.finetune.models.scales import with_scales
from zokernel.finetune.monitor.diagnosis import diagnosed
from zokernel.finetune.monitor.divergence import went_wrong
from zokernel.finetune.monitor.interrupt import StopOnInterrupt
from zokernel.finetune.monitor.streaming import Streaming
from zokernel.finetune.predict import write_predictor
from zokernel.finetune.report.card import write_card
from zokernel.finetune.report.metrics import (
    MEASURED,
    evaluations,
    measures,
    model_facts,
    repeat_facts,
    settings_of,
    task_facts,
)
from zokernel.finetune.report.run_report import draw_loss, write_report
from zokernel.finetune.report.samples import shown_samples
from zokernel.finetune.report.told import number, start_told
from zokernel.finetune.report.zero_shot import fingerprint, remembered
from zokernel.finetune.scoring.continuations import continuations
from zokernel.finetune.scoring.prepare import prepare
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.settings.auto import suits_examples
from zokernel.finetune.settings.check import check_metric, check_values, lower_is_better
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.record import RunSettings, keep_recorded
from zokernel.finetune.settings.resolve import given_sources, resolve
from zokernel.finetune.settings.unsupported import refuse_unsupported
from zokernel.finetune.storage import run_folder as output
from zokernel.finetune.storage.checkpoint import remove_checkpoints
from zokernel.finetune.storage.lock import exclusive
from zokernel.finetune.storage.push import check_push, open_repository, push_finished, pushed_by_nobody_else
from zokernel.finetune.tasks import Task, demonstrations
from zokernel.finetune.tasks.text import TextTask
from zokernel.finetune.trainer.processes import from_main
from zokernel.finetune.trainer.reward_trainer import RewardTrainer
from zokernel.finetune.trainer.zo_trainer import ZOTrainer
from zokernel.journal.reader import FILE_NAME
from zokernel.secrets import hide_in_text, hide_in_values, hide_in_words

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
        config: What the user asked for.
        command: The command line, for the report, and to tell flags from the settings of a recipe.

    Returns:
        The content of ``metrics.json``.

    Raises:
        UsageError: If the request is wrong; nothing was written.
        RunError: If it cannot be carried out, or the loss stopped being finite.
        Interrupted: If a signal stopped it after a checkpoint was saved.
    """
    folder = Path(str(config.output_dir))
    with ExitStack() as held, output.explained_errors(folder):
        start = time.perf_counter()
        check_values(data_arguments)
        given = given_sources(config, command) if command else {}
        refuse_unsupported(config, scored=True, given=given)
        check_push(config)
        model = check_model(model_arguments)  # before the data are read, which may take minutes
        model_arguments = model.arguments
        if model_arguments.merge_adapter and not config.do_train:
            raise UsageError("--merge_adapter merges what was trained: 'zokernel merge' merges a saved adapter.")
        task = load_task(data_arguments, objective=config.objective)
        check_flags(task, data_arguments, model_arguments, given)
        check_metric(config.metric_for_best_model, MEASURED.get(task.kind, ()))
        config = lower_is_better(with_scales(model_arguments, offloaded(model_arguments, config, command), command))
        splits = load_splits(data_arguments, task, seed=config.seed if config.data_seed is None else config.data_seed)
        check_text(task, splits.train, model.tokenizer, data_arguments, kind=model.kind, objective=config.objective)
        settings = resolve(
            pushed_by_nobody_else(config),
            trained=trained_by(model_arguments),
            num_examples=len(splits.train) - data_arguments.num_demonstrations,
            by_example=suits_examples(model.kind, model_arguments, config),
            low_precision=model.trained_low,
            command=command,
        )
        settings = settings if config.overwrite_output_dir else keep_recorded(settings, folder)
        deciding = output.run_settings(model_arguments, data_arguments, settings.arguments()) | splits.fingerprint
        there, resume = _look(folder, config, deciding, held)
        if there == "finished":
            logger.info("%s holds this very run, finished: nothing is left to do.", folder)
            push_finished(folder, config)
            return read_json(folder / output.METRICS_FILE)
        if config.should_save and config.do_train:
            logger.info("Settings (all of them: settings.json):\n%s", settings.table())
        open_repository(config)
        if resume:
            logger.info("Continuing the run in %s.", folder)
        job = _Job(model, model_arguments, data_arguments, settings, command, task, splits, start)
        metrics = job.run(folder, deciding, resume)
        push_finished(folder, config)
        return metrics


def _look(folder: Path, config: ZOConfig, deciding: dict[str, Any], held: ExitStack) -> tuple[str, str | bool]:
    """Return what is in the output folder, and what to resume from; of several processes, one looks and tells."""
    asked, there = str(config.resume_from_checkpoint or ""), ""
    if config.should_save:
        held.enter_context(exclusive(folder))
        there = output.prepare(folder, overwrite=config.overwrite_output_dir, resume=bool(asked), settings=deciding)
        held.enter_context(output.left_empty_if_refused(folder, new=there == "new"))
    there = from_main(there)
    return there, asked if asked.lower() not in ("", "last", "true") else there == "unfinished"


class _Job:
    """One run of the job, whose settings are decided and whose folder is free."""

    def __init__(
        self,
        checked: CheckedModel,
        model_arguments: ModelArguments,
        data_arguments: DataArguments,
        settings: RunSettings,
        command: Sequence[str],
        task: Task,
        splits: Splits,
        start: float,
    ):
        self.checked, self.config = checked, settings.arguments()
        self.model_arguments, self.data_arguments, self.settings = model_arguments, data_arguments, settings
        self.command, self.task, self.splits, self.start = hide_in_words(command), task, splits, start
        self.max_length = 0

    def run(self, folder: Path, deciding: dict[str, Any], resume: str | bool) -> dict[str, Any]:
        """Train and write the results."""
        config, main = self.config, self.config.should_save
        set_seed(config.seed)
        self.model, tokenizer = load_model(self.model_arguments, config, self.checked)
        self.masked = fills_masks(self.model)
        trainer = self._make_trainer(tokenizer)
        run = output.new_record(self.command, deciding, base_facts(self.model))
        if main and resume:
            run = read_json(folder / output.RUN_FILE)
        elif main:
            write_json(folder / output.RUN_FILE, run)
        run = from_main(run)
        if "before" not in run:
            self._score_before(trainer, run)
            if main:
                write_json(folder / output.RUN_FILE, run)
        how = start_told(self.data_arguments.num_demonstrations, trained=self.checked.is_trained)
        metric, where = self.task.metric, "validation" if self.splits.test_is_validation else "test"
        told = (how.capitalize(), metric, len(self.splits.test), where, run["before"][metric])
        logger.info("%s %s on %d %s examples: %.3f.", *told)

        def begun() -> None:
            for name in ("measuring_forwards", "rate_forwards"):
                run[name] = run.get(name, 0) + getattr(trainer, name)
            taken = max(trainer.state.global_step, trainer.journal.num_steps if trainer.journal else 0)
            output.note_begin(folder, run, settings=deciding, total_steps=trainer.state.max_steps, taken=taken)

        trainer.when_begun = begun
        with PeakMemory() as training, Streaming(self.model) as streaming:
            if config.do_train:
                trainer.train(resume_from_checkpoint=resume)
        if any(isinstance(c, StopOnInterrupt) and c.interrupted for c in trainer.callback_handler.callbacks):
            if main:
                trainer.run_log.save()
                write_json(folder / output.RUN_FILE, run | {"seconds": self._seconds(trainer, run)})
            raise Interrupted(f"Stopped at step {trainer.state.global_step}; continue with the same command.")
        after = evaluate(trainer, self.encoded["test"]) if config.do_train else run["before"]
        written = self._written() if config.do_train else run["written"]
        if config.do_train:
            trainer.save_model(str(folder))
            if main and self._journal_suffices(trainer, folder):
                remove_checkpoints(folder)
        samples = shown_samples(self.prepared.samples, run["written"], written)
        measured = self._metrics(trainer, run, after, training.peak_bytes) | streaming.facts | {"samples": samples}
        metrics = hide_in_values(measured)
        if main:
            write_json(folder / output.RUN_FILE, run | {"seconds": metrics["total_seconds"]})
            if config.do_train and self.model_arguments.merge_adapter:
                save_merged(trainer.bare_model, folder)
                metrics["saved"] = "model"
            elif config.do_train:
                say_base(self.model, self.model_arguments.model_name_or_path)
            self._write(folder, trainer, metrics)
        return metrics

    def _seconds(self, trainer: ZOTrainer, run: dict[str, Any]) -> float:
        """Return the seconds of the run so far, those of earlier processes included."""
        earlier = max(run.get("seconds", 0.0), trainer.run_log.earlier_seconds)
        return round(earlier + time.perf_counter() - self.start, 2)

    def _journal_suffices(self, trainer: ZOTrainer, folder: Path) -> bool:
        """Return whether the journal makes the checkpoints superfluous: nobody asked to keep them."""
        asked = {name: trainer.settings.setting(name) for name in ("save_strategy", "save_total_limit")}
        periodic = asked["save_strategy"].value in ("steps", "epoch") and asked["save_strategy"].source != "default"
        return (
            trainer.zeroth_order
            and (folder / FILE_NAME).exists()
            and not periodic
            and asked["save_total_limit"].source == "default"
        )

    def _make_trainer(self, tokenizer: Any) -> ZOTrainer:
        data, task = self.data_arguments, self.task
        reserved = virtual_tokens(self.model) + (data.max_new_tokens if task.kind in ("generation", "reward") else 0)
        max_length = self.max_length = longest_input(self.model, tokenizer, data.max_length, reserved=reserved)
        arguments = (task, self.splits, self.model, tokenizer, data)
        self.prepared = prepare(*arguments, max_length=max_length, objective=self.config.objective)
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

    def _score_before(self, trainer: ZOTrainer, run: dict[str, Any]) -> None:
        config, data, test = self.config, self.data_arguments, self.encoded["test"]
        scoring = f"{config.precision} {config.objective} {data.calibrate} {data.max_new_tokens} loss per example"
        with PeakMemory() as inference:
            # The largest batches decide the peak, whether or not the score is known already.
            evaluate(trainer, test.longest(2 * config.per_device_eval_batch_size))
            # Several processes score together, and not each of them may remember; nobody knows what a reward reads.
            shared = config.world_size > 1 or self.task.kind == "reward"
            score = partial(evaluate, trainer, test)
            run["before"] = score() if shared else remembered(fingerprint(self.model, test, scoring), score)
        run["peak_memory_inference"] = inference.peak_bytes
        run["written"] = self._written()

    def _written(self) -> list[str]:
        """Return what the model writes now after the held-out prompts that are shown."""
        prompts = [sample.prompt_ids for sample in self.prepared.samples]
        if not prompts:
            return []
        settings: Any = {"max_new_tokens": self.data_arguments.max_new_tokens, "ends": self.prepared.ends}
        settings["decoder_prompt"] = self.prepared.decoder_prompt
        return list(map(hide_in_text, continuations(self.model, self.checked.tokenizer, prompts, **settings)))

    def _metrics(
        self, trainer: ZOTrainer, run: dict[str, Any], after: dict[str, float], peak_memory: int
    ) -> dict[str, Any]:
        log, stepped = trainer.run_log, trainer.zeroth_order and trainer.optimizer is not None
        return {
            **model_facts(self.model, self.model_arguments.model_name_or_path, trained=self.checked.is_trained),
            **task_facts(self.task, self.data_arguments, masked=self.masked),
            **settings_of(trainer.settings.arguments(), self.settings.requested),
            "num_train": len(self.encoded["train"]),
            "num_test": len(self.splits.test),
            "test_is_validation": self.splits.test_is_validation,
            "test_trained_on": self.splits.num_test_in_train * self.config.do_train,
            "before": run["before"],
            "after": after,
            "steps": trainer.state.global_step,
            "best_step": trainer.final_step,
            "forwards": log.forwards,
            "measuring_forwards": run.get("measuring_forwards", 0),
            "rate_forwards": run.get("rate_forwards", 0),
            "forwards_per_step": trainer.forwards_per_step if stepped else None,
            "train_seconds": round(log.seconds, 2),
            "total_seconds": self._seconds(trainer, run),
            "peak_memory_inference": run["peak_memory_inference"],
            "peak_memory_training": peak_memory,
            "effective_lr": number(trainer.effective_lr) if self.config.do_train else None,
            "went_wrong": trainer.diverged or went_wrong(log.rows),
            "diagnosis": diagnosed(trainer.diagnosis, run["before"], after, kept=self.config.load_best_model_at_end),
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
        data, kind, context = self.data_arguments, kind_of_model(self.model), ""
        task = TextTask(form="prompt-completion") if self.task.kind == "reward" else self.task
        if not isinstance(task, TextTask):
            shown = self.splits.train[: data.num_demonstrations]
            context = demonstrations(task, shown, masked=self.masked, seq2seq=kind == "seq2seq")
        write_predictor(
            folder,
            task,
            kind=kind,
            max_length=self.max_length,
            precision=self.config.precision,
            arguments=self.model_arguments,
            context=context,
            calibrate=data.calibrate,
            max_new_tokens=data.max_new_tokens,
            ends=self.prepared.ends,
        )


def evaluate(trainer: ZOTrainer, dataset: Any) -> dict[str, float]:
    """Return loss and metrics on a data set."""
    return measures(trainer.predict(dataset, metric_key_prefix="test").metrics or {}, "test")
