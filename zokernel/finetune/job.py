"""The main job from end to end: it checks the request, reads data, decides the settings and carries out the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError
from zokernel.files import check_output_dir
from zokernel.finetune.data.check_flags import check_flags
from zokernel.finetune.data.check_text import check_text
from zokernel.finetune.data.datasets import load_splits, load_task
from zokernel.finetune.models.adapters import part_to_train
from zokernel.finetune.models.check import CheckedModel, check_model
from zokernel.finetune.models.offload import with_offload
from zokernel.finetune.models.revision import with_revision
from zokernel.finetune.models.scales import with_scales
from zokernel.finetune.models.starting_weights import starting_weights
from zokernel.finetune.report.metrics import MEASURED
from zokernel.finetune.run import Run
from zokernel.finetune.run_files import METRICS_FILE, read_run_file
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.settings.auto import supports_per_example
from zokernel.finetune.settings.check import check_metric, check_values, lower_is_better
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.record import RunSettings, keep_recorded, name_derived
from zokernel.finetune.settings.resolve import resolve, setting_sources
from zokernel.finetune.settings.unsupported import refuse_unsupported
from zokernel.finetune.storage import run_folder as output
from zokernel.finetune.storage.finished import has_results
from zokernel.finetune.storage.lock import exclusive
from zokernel.finetune.storage.push import check_push, open_repository, push_finished, without_trainer_push
from zokernel.finetune.storage.run_identity import run_settings
from zokernel.finetune.tasks import Task
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
    with ExitStack() as resources, output.explained_errors(folder):
        start = time.perf_counter()
        check_values(data_arguments)
        if config.should_save:
            check_output_dir(folder, "The output folder")
        sources = setting_sources(config, command) if command else {}
        refuse_unsupported(config, scored=True, explicit=sources)
        check_push(config)
        model = _find_model(model_arguments, config, sources)
        task = _find_task(data_arguments, model.arguments, config, sources)
        config = with_scales(model.arguments, with_offload(model.arguments, config, command), command)
        config = lower_is_better(config)
        splits = load_splits(data_arguments, task, seed=config.seed if config.data_seed is None else config.data_seed)
        check_text(task, splits.train, model.tokenizer, data_arguments, kind=model.kind, objective=config.objective)
        num_examples = len(splits.train) - data_arguments.num_demonstrations
        settings = _resolve(config, model, num_examples, folder, command)
        identity = run_settings(model.arguments, data_arguments, settings.arguments())
        identity |= splits.fingerprint | starting_weights(model)
        state, resume = _open_folder(folder, settings, identity, model.tokenizer, resources)
        if state == "finished":
            logger.info("%s already holds this run, finished: nothing to do.", folder)
            push_finished(folder, config)
            return read_run_file(folder / METRICS_FILE)
        if config.should_save and config.do_train:
            logger.info("Settings (all of them: settings.json):\n%s", settings.table())
        open_repository(config)
        if resume:
            logger.info("Continuing the run in %s.", folder)
        run = Run(model, task, splits, settings, data_arguments=data_arguments, command=command, start=start)
        metrics = run.carry_out(folder, identity, resume)
        push_finished(folder, config)
        return metrics


def _find_model(arguments: ModelArguments, config: ZOConfig, sources: Mapping[str, str]) -> CheckedModel:
    """Find and check the model, before data are read, which may take minutes."""
    revision = arguments.model_revision if "model_revision" in sources else None
    model = check_model(with_revision(arguments, revision), trains=config.do_train)
    if model.arguments.merge_adapter and not config.do_train:
        raise UsageError("--merge_adapter merges what was trained: 'zokernel merge' merges a saved adapter.")
    return model


def _find_task(data: DataArguments, model: ModelArguments, config: ZOConfig, sources: Mapping[str, str]) -> Task:
    """Find the task, and check flags and metrics that depend on it."""
    task = load_task(data, objective=config.objective)
    check_flags(task, data, model, sources)
    metrics = MEASURED.get(task.kind, ())
    if task.metric not in metrics:
        raise UsageError(
            f"The task's metric is {task.metric!r}, and a {task.kind} task measures {' or '.join(metrics)}: name "
            "one of these."
        )
    check_metric(config.metric_for_best_model, metrics)
    return task


def _resolve(
    config: ZOConfig, model: CheckedModel, num_examples: int, folder: Path, command: Sequence[str]
) -> RunSettings:
    """Return the settings of the run, with what an unfinished run in its folder began with."""
    trained = part_to_train(model.arguments)
    settings = resolve(
        without_trainer_push(config),
        trained=trained,
        num_examples=num_examples,
        by_example=supports_per_example(model.kind, model.arguments, config),
        low_precision=model.low_precision,
        command=command,
    )
    settings = name_derived(settings)
    if not config.overwrite_output_dir:
        settings = keep_recorded(settings, folder)
    if model.arguments.offload and config.do_train:
        check_streamed(settings.arguments(), trains_weights=trained == "full parameters")
    return settings


def _open_folder(
    folder: Path, settings: RunSettings, identity: dict[str, Any], tokenizer: Any, resources: ExitStack
) -> tuple[str, str | bool]:
    """Return the state of the output folder, and what to resume from; of several processes, one looks and tells."""
    config = settings.requested
    requested, state = str(config.resume_from_checkpoint or ""), ""
    if config.should_save:
        resources.enter_context(exclusive(folder))
        state = output.prepare(folder, overwrite=config.overwrite_output_dir, resume=bool(requested), settings=identity)
        if state == "finished" and not has_results(folder, settings, tokenizer):
            state = "unfinished"
        resources.enter_context(output.clear_if_refused(folder, new=state == "new"))
    state = from_main(state)
    return state, requested if requested.lower() not in ("", "last", "true") else state == "unfinished"
