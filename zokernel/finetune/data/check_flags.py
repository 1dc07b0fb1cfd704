"""Flags about data that the task, or the way its examples are drawn, would ignore: refused by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from zokernel.data import SOURCES
from zokernel.errors import UsageError
from zokernel.finetune.data.protocol import check_protocol
from zokernel.finetune.models.revision import check_revision
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.tasks import Task
from zokernel.finetune.tasks.text import TextTask

_TEXT_FLAGS = ("chat_template", "assistant_only_loss", "completion_only_loss", "packing")
_REWARD_FLAGS = ("reward_function", "reward_weights", "num_generations", "temperature", "beta")
_OPTION_FLAGS = {"calibrate": "compares label words", "num_demonstrations": "puts solved examples before a prompt"}


def check_flags(task: Task, data: DataArguments, model: ModelArguments, explicit: Collection[str] = ()) -> None:
    """Refuse flags that would change nothing.

    Args:
        task: What the rows are.
        data: What the user said about the data.
        model: Which model.
        explicit: Flags that the user set, even if their values are the defaults.

    Raises:
        UsageError: If there is one, naming it and what it is for.

    Example:
        >>> from zokernel.finetune.tasks import get_task
        >>> check_flags(get_task("sst2"), DataArguments(k_shot=8), ModelArguments())
        Traceback (most recent call last):
        zokernel.errors.UsageError: --k_shot is for --protocol mezo-roberta: add it, or leave both out.
    """
    user_flags = _user_set_flags(data, explicit)
    rewarded = task.kind == "reward"
    if not rewarded:
        refuse_reward_flags(data, explicit)
    if rewarded and model.prompt_tuning:
        raise UsageError(
            "--prompt_tuning puts virtual tokens before prompts that are padded on the left: train --lora or "
            "--prefix_tuning on rewards."
        )
    for flag in _TEXT_FLAGS if not isinstance(task, TextTask) else ():
        if flag in user_flags and not (rewarded and flag == "chat_template"):
            raise UsageError(
                f"--{flag} is for chats, instructions and texts, and this is a {task.kind} task: leave it out."
            )
    for flag, purpose in _OPTION_FLAGS.items() if rewarded or isinstance(task, TextTask) else ():
        if flag in user_flags:
            raise UsageError(
                f"--{flag} {purpose}, which {'rewards' if rewarded else 'texts'} do not have: leave it out."
            )
    if "max_new_tokens" in user_flags and task.kind in ("classification", "choice"):
        raise UsageError(
            f"--max_new_tokens is for answers that are written, and a {task.kind} task chooses among options: leave it "
            "out."
        )
    by_class = data.protocol == "mezo-roberta"
    if "k_shot" in user_flags and not by_class:
        raise UsageError("--k_shot is for --protocol mezo-roberta: add it, or leave both out.")
    for flag in ("max_train_samples", "max_eval_samples"):
        if by_class and flag in user_flags:
            raise UsageError(f"--{flag} has no effect with --protocol mezo-roberta: --k_shot says how many are drawn.")
    if data.protocol:
        check_protocol(data.protocol)
    if data.protocol and data.validation_file and data.test_file:
        raise UsageError(
            f"--protocol {data.protocol} takes its validation examples from the training file: leave out "
            "--validation_file."
        )
    for flag in ("dataset_config", "dataset_revision"):
        if flag in user_flags and data.dataset_name in SOURCES:
            raise UsageError(f"--{flag} is for data sets of the hub, which {data.dataset_name} is not: leave it out.")
    if model.model_revision != "main" or "model_revision" in explicit:
        check_revision(model.model_name_or_path)


def refuse_reward_flags(data: DataArguments, explicit: Collection[str] = ()) -> None:
    """Refuse the flags of rewards where none are trained on.

    Args:
        data: What the user said about the data.
        explicit: Flags that the user set, even if their values are the defaults.

    Raises:
        UsageError: If there is one, naming the flag that it needs.
    """
    user_flags = _user_set_flags(data, explicit)
    for flag in _REWARD_FLAGS:
        if flag in user_flags:
            raise UsageError(f"--{flag} is for --objective reward: add it, or leave both out.")


def _user_set_flags(data: DataArguments, explicit: Collection[str]) -> set[str]:
    """Return the flags that have other values than their defaults, or are explicit and switch something on."""
    values = {f.name: (getattr(data, f.name), f.default) for f in fields(data)}
    return {name for name, (value, default) in values.items() if value != default or (value and name in explicit)}
