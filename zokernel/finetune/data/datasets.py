"""The three splits of a run: read, checked and drawn before any model is loaded."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from zokernel.data import load_rows, load_table
from zokernel.data.tables import Row, Table, rows_sha256
from zokernel.errors import UsageError
from zokernel.finetune.data.check_flags import refuse_reward_flags
from zokernel.finetune.data.choose_task import classification, task_of_data_set
from zokernel.finetune.data.formats import form_of, recognise
from zokernel.finetune.data.protocol import published_splits
from zokernel.finetune.data.report_splits import report_splits
from zokernel.finetune.rewards.reasoning import find_gym_task, make_prompts
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import TASKS, PromptTask, Task, get_task, read_task
from zokernel.finetune.tasks.base import Source
from zokernel.finetune.tasks.registry import customize
from zokernel.finetune.tasks.reward import RewardTask
from zokernel.finetune.tasks.template import without_secrets
from zokernel.readable import plural

logger = logging.getLogger(__name__)

DEV_SIZE = 500
_LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_test_samples"}


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose the best step by, and to report.

    Attributes:
        train: Rows to train on.
        validation: Rows that choose the best step.
        test: Rows to report.
        test_is_validation: Whether these are the validation rows.
        num_test_in_train: How many test rows have the prompt of a training row.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    test_is_validation: bool = False
    num_test_in_train: int = 0

    @property
    def fingerprint(self) -> dict[str, str]:
        """Number and SHA-256 of the rows of each split: what tells whether a run has other data than before."""
        return {
            f"{split}_rows": f"{len(rows)} rows, sha256 {rows_sha256(rows)[:16]}"
            for split, rows in (("train", self.train), ("validation", self.validation), ("test", self.test))
        }


def load_task(arguments: DataArguments, *, objective: str = "cross_entropy") -> Task:
    """Return the task that the flags describe; without a named one, the task that fits the columns of the data.

    Raises:
        UsageError: If there is no such task, a part of it is wrong, or neither flags nor data tell what it is.
    """
    _check(arguments)
    if objective == "reward":
        return reward_task(arguments)
    refuse_reward_flags(arguments)  # before the columns, which may be those of prompts, are held to be something else
    overrides: dict[str, Any] = {
        "template": arguments.template,
        "label_words": arguments.label_words,
        "labels": arguments.labels,
        "label_column": arguments.label_column,
    }
    name = arguments.task or task_of_data_set(arguments)
    if arguments.task_file:
        task = customize(read_task(arguments.task_file), **overrides)
    elif name:
        task = get_task(name, **overrides)
        if isinstance(task, PromptTask) and task.source and _uses_source(arguments, task) and not arguments.labels:
            task = replace(task, labels=task.source.labels or task.labels)
        if not arguments.task:
            logger.info("The data set %s comes with the task %s.", arguments.dataset_name, name)
    else:
        task = _task_of_rows(arguments)
    wording = {name: text for name in ("template", "masked_template") if (text := getattr(task, name))}
    redacted: dict[str, Any] = {n: clean for n, text in wording.items() if (clean := without_secrets(text, n)) != text}
    task = replace(task, **redacted) if redacted else task
    if task.label_column in task.columns:
        logger.warning(
            "The template names the label column %r: the prompt contains the answer, so accuracy is meaningless.",
            task.label_column,
        )
    return task


def reward_task(arguments: DataArguments) -> RewardTask:
    """Return the task of prompts, which takes no flags.

    Raises:
        UsageError: If a flag describes another task.
    """
    for flag in ("task", "task_file", "template", "label_words", "labels", "label_column", "protocol"):
        if getattr(arguments, flag):
            raise UsageError(
                f"--{flag} does not go with --objective reward, whose rows have a column 'prompt': leave it out."
            )
    return RewardTask()


def _task_of_rows(arguments: DataArguments) -> Task:
    if arguments.train_file:
        rows: Sequence[Row] = _training_file(arguments)
    elif arguments.dataset_name:
        rows = load_rows(
            arguments.dataset_name, "train", config=arguments.dataset_config, revision=arguments.dataset_revision
        )
    else:
        raise UsageError(
            "Name the data: --train_file for a file of your own, --dataset_name for a data set of the hub, or --task "
            f"for a published task ({', '.join(list(TASKS)[:3])}, ...)."
        )
    if not (arguments.template or arguments.label_words or arguments.labels):
        task = recognise(rows, arguments)
        if task is not None:
            return task
    elif not (arguments.template or arguments.label_column):
        form = form_of(rows)
        if form not in (None, "text") and not any("label" in row for row in rows):
            flags = " and ".join(f"--{name}" for name in ("label_words", "labels") if getattr(arguments, name))
            raise UsageError(
                f"The columns are of the form {form!r}, which is trained on without label words: leave out {flags}, "
                "or name --template and --label_column to classify."
            )
    return classification(rows, arguments)


def task_name(arguments: DataArguments) -> str:
    """Return what reports call the task: its name, or the name of its file or data set.

    Example:
        >>> task_name(DataArguments(train_file="data/tickets.csv"))
        'tickets.csv'
    """
    file = arguments.task_file or arguments.train_file
    task = arguments.task or task_of_data_set(arguments)
    reward = next(iter(arguments.reward_function or []), None)
    return task or (Path(file).name if file else str(arguments.dataset_name or reward))


def _check(arguments: DataArguments) -> None:
    """Refuse flags that contradict each other, or that would be ignored."""
    if arguments.task and arguments.task_file:
        raise UsageError("Name the task with either --task or --task_file (one of them, not both).")
    if arguments.dataset_name and arguments.train_file:
        raise UsageError("Name the data with either --dataset_name or --train_file (one of them, not both).")
    if not arguments.train_file:
        for flag in ("validation_file", "test_file", "column_names"):
            if getattr(arguments, flag):
                raise UsageError(
                    f"--{flag} needs --train_file beside it: a data set of the hub brings its own splits and columns."
                )
    if arguments.dataset_config and not arguments.dataset_name:
        raise UsageError("--dataset_config needs --dataset_name: it is a configuration of a data set of the hub.")
    if arguments.dataset_revision and arguments.train_file:
        raise UsageError("--dataset_revision is for a data set of the hub, which --train_file is not.")


def _uses_source(arguments: DataArguments, task: Task) -> bool:
    if task.source is None or arguments.train_file:
        return False
    return arguments.dataset_name in (None, task.source.dataset) and arguments.dataset_config in (
        None,
        task.source.config,
    )


def _training_file(arguments: DataArguments) -> Table:
    path = Path(str(arguments.train_file)).expanduser()
    stat = path.stat() if path.exists() else None
    return _read_once(path, tuple(arguments.column_names or ()), (stat.st_mtime_ns, stat.st_size) if stat else ())


@lru_cache(maxsize=1)  # the file by which the task was chosen is not read again for its rows
def _read_once(path: Path, column_names: tuple[str, ...], mtime_and_size: tuple[int, ...]) -> Table:
    return load_table(path, column_names=column_names)


def load_splits(arguments: DataArguments, task: Task, *, seed: int, tests: bool = True) -> Splits:
    """Read the splits, check their columns and labels, and draw as many examples as asked for.

    A split that is not given is taken from another: validation is held out from the training rows, and test falls back
    to validation (which then also chose the checkpoint; the log says so).  With ``--protocol`` the draw is a published
    one instead: see :func:`published_splits`.

    Args:
        arguments: Where the data are, and how much of them to use.
        task: The columns and labels to check.
        seed: Seed of the draw.
        tests: Whether anything is reported on the test split; if not, the log does not mention it.

    Returns:
        The splits.

    Raises:
        UsageError: If no data are named, or a file, column or label is wrong.
    """
    parts = read_parts(arguments, task)
    _read_once.cache_clear()
    limits = {
        "train": _limit(arguments.max_train_samples),
        "validation": _limit(arguments.max_eval_samples, DEV_SIZE),
        "test": _limit(arguments.max_test_samples),
    }
    if arguments.protocol:
        if arguments.max_eval_samples is None and task.dev_size is not None:
            limits["validation"] = task.dev_size
        drawn = published_splits(
            parts, task, protocol=arguments.protocol, k_shot=arguments.k_shot, seed=seed, limits=limits
        )
        splits = Splits(drawn["train"], drawn["validation"], drawn["test"])
    else:
        splits = _draw(parts, limits, seed, tests=tests)
    scored = tests and not splits.test_is_validation
    others = {"validation": splits.validation} | ({"test": splits.test} if scored else {})
    shared = report_splits(task, splits.train, others)
    return replace(splits, num_test_in_train=shared["test" if scored else "validation"])


def _draw(parts: Mapping[str, list[Row]], limits: Mapping[str, int | None], seed: int, *, tests: bool) -> Splits:
    generator = random.Random(seed)
    parts = {split: generator.sample(rows, len(rows)) for split, rows in parts.items()}
    if "validation" not in parts:
        fifth, limit = len(parts["train"]) // 5, limits["validation"]
        held_out = fifth if limit is None else min(limit, fifth)
        if held_out == 0:
            raise UsageError("There are too few training examples to hold some out: give --validation_file.")
        parts["validation"], parts["train"] = parts["train"][:held_out], parts["train"][held_out:]
        logger.info("Validation: %s held out from the training examples.", plural(held_out, "example"))
    drawn = {split: rows[: limits[split]] for split, rows in parts.items()}
    for split, flag in _LIMITS.items():
        if split in drawn and len(drawn[split]) < len(parts[split]) and (tests or split != "test"):
            logger.info(
                "%s: %s of %s rows %s drawn (--%s -1 takes all).",
                split.capitalize(),
                f"{len(drawn[split]):,}",
                f"{len(parts[split]):,}",
                "is" if len(drawn[split]) == 1 else "are",
                flag,
            )
    if "test" not in drawn:
        drawn["test"] = parts["validation"][: limits["test"]]
        if tests:
            logger.info(
                "Test: the validation examples (no test split was given; they also choose the best checkpoint)."
            )
    return Splits(drawn["train"], drawn["validation"], drawn["test"], test_is_validation="test" not in parts)


def read_parts(arguments: DataArguments, task: Task) -> dict[str, list[Row]]:
    """Read the splits that exist, as rows with the task's columns and labels.

    Raises:
        UsageError: If no data are named, or a file, column or label is wrong.
    """
    _check(arguments)
    if arguments.train_file:
        tables = {"train": _training_file(arguments)}
        for split, path in (("validation", arguments.validation_file), ("test", arguments.test_file)):
            if path:
                tables[split] = load_table(path, column_names=arguments.column_names)
        return {split: task.read(table, where=f"The {split} split") for split, table in tables.items()}
    if (
        task.kind == "reward"
        and not arguments.dataset_name
        and (gym_task := find_gym_task(arguments.reward_function or []))
    ):
        # A thousand answers are too many to write where nobody asked for them.
        test = None if arguments.max_test_samples == DataArguments.max_test_samples else arguments.max_test_samples
        limits = (arguments.max_train_samples, arguments.max_eval_samples, test)
        return make_prompts(gym_task, **dict(zip(("train", "validation", "test"), map(_limit, limits))))
    source = task.source
    if source is None or not _uses_source(arguments, task):
        if not arguments.dataset_name:
            raise UsageError("Name the data with either --dataset_name or --train_file: this task has none of its own.")
        every = {split: split for split in ("train", "validation", "test")}
        source = Source(arguments.dataset_name, arguments.dataset_config, splits=every)
    revision = arguments.dataset_revision or source.revision
    parts: dict[str, list[Row]] = {}
    for split, name in source.splits.items():
        try:
            rows = load_rows(source.dataset, name, config=source.config, revision=revision)
        except UsageError:
            if split == "train":
                raise
            logger.info("%s has no split %r.", source.dataset, name)
            continue
        if split == "test" and task.prepare is None and all(map(_has_hidden_label(task), rows)):
            logger.info("%s has no labelled test split.", source.dataset)
            continue
        parts[split] = task.read(rows, where=f"The {split} split")
    return parts


def _has_hidden_label(task: Task):
    return lambda row: task.label_column in row and task.unlabelled(row)


def _limit(requested: int | None, default: int | None = None) -> int | None:
    """Return how many rows to draw; ``None`` means all."""
    if requested is None:
        return default
    return None if requested < 0 else requested
