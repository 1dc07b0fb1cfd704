"""The main job from end to end: what the user asked for is checked, data are read, settings decided, and a run made."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError
from zokernel.files import check_output_dir, read_json
from zokernel.finetune.data.check_flags import check_flags
from zokernel.finetune.data.check_text import check_text
from zokernel.finetune.data.datasets import load_splits, load_task
from zokernel.finetune.models.adapters import trained_by
from zokernel.finetune.models.check import check_model
from zokernel.finetune.models.offload import offloaded
from zokernel.finetune.models.revision import with_revision
from zokernel.finetune.models.scales import with_scales
from zokernel.finetune.models.starting_weights import starting_weights
from zokernel.finetune.report.metrics import MEASURED
from zokernel.finetune.run import Run
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.settings.auto import suits_examples
from zokernel.finetune.settings.check import check_metric, check_values, lower_is_better
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.record import keep_recorded
from zokernel.finetune.settings.resolve import given_sources, resolve
from zokernel.finetune.settings.unsupported import refuse_unsupported
from zokernel.finetune.storage import run_folder as output
from zokernel.finetune.storage.lock import exclusive
from zokernel.finetune.storage.push import check_push, open_repository, push_finished, pushed_by_nobody_else
from zokernel.finetune.trainer.processes import from_main
from zokernel.finetune.trainer.stream_points import check_streamed

logger = logging.getLogger(__name__)


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
        if config.should_save:
            check_output_dir(folder, "The output folder")
        given = given_sources(config, command) if command else {}
        refuse_unsupported(config, scored=True, given=given)
        check_push(config)
        revision = model_arguments.model_revision if "model_revision" in given else None
        model_arguments = with_revision(model_arguments, revision)
        model = check_model(model_arguments, trains=config.do_train)  # before the data are read, which may take minutes
        model_arguments = model.arguments
        if model_arguments.merge_adapter and not config.do_train:
            raise UsageError("--merge_adapter merges what was trained: 'zokernel merge' merges a saved adapter.")
        task = load_task(data_arguments, objective=config.objective)
        check_flags(task, data_arguments, model_arguments, given)
        measured = MEASURED.get(task.kind, ())
        if task.metric not in measured:
            raise UsageError(
                f"The task's metric is {task.metric!r}, and a {task.kind} task measures {' or '.join(measured)}: name "
                "one of these."
            )
        check_metric(config.metric_for_best_model, measured)
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
        if model_arguments.offload and config.do_train:
            check_streamed(settings.arguments(), trains_weights=trained_by(model_arguments) == "full parameters")
        deciding = output.run_settings(model_arguments, data_arguments, settings.arguments())
        deciding |= splits.fingerprint | starting_weights(model)
        there, resume = _look(folder, config, deciding, held)
        if there == "finished":
            logger.info("%s already holds this run, finished: nothing to do.", folder)
            push_finished(folder, config)
            return read_json(folder / output.METRICS_FILE)
        if config.should_save and config.do_train:
            logger.info("Settings (all of them: settings.json):\n%s", settings.table())
        open_repository(config)
        if resume:
            logger.info("Continuing the run in %s.", folder)
        run = Run(model, model_arguments, data_arguments, settings, command, task, splits, start)
        metrics = run.carry_out(folder, deciding, resume)
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
