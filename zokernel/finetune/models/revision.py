"""Which revision of a hub model is loaded: the one that is asked for, or the one that a run recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from zokernel.data import SOURCES
from zokernel.errors import UsageError
from zokernel.finetune.models.saved_adapter import recorded_settings, with_base
from zokernel.finetune.settings.arguments import ModelArguments


def check_revision(name: str) -> None:
    """Refuse a revision of a model that is not on the hub.

    Args:
        name: What the user named as the model.

    Raises:
        UsageError: If it is a folder, a file or a model of a package registry.

    Example:
        >>> check_revision("org/model")
        >>> check_revision("smollm2")
        Traceback (most recent call last):
        zokernel.errors.UsageError: --model_revision is for models of the hub, which smollm2 is not: leave it out.
    """
    if name in SOURCES or Path(name).expanduser().exists():
        raise UsageError(f"--model_revision is for models of the hub, which {name} is not: leave it out.")


def with_revision(arguments: ModelArguments, revision: str | None) -> ModelArguments:
    """Return arguments that name a revision of the model, or of the base of an adapter.

    Args:
        arguments: What the user named.
        revision: The branch, tag or commit that was asked for; if None, the one that the adapter's run recorded.

    Returns:
        The arguments; those of an adapter's folder name base and adapter.

    Raises:
        UsageError: If the model is not on the hub.

    Example:
        >>> with_revision(ModelArguments("org/model"), "v2").model_revision
        'v2'
    """
    arguments = with_base(arguments)
    name, adapter = arguments.model_name_or_path, arguments.adapter_name_or_path
    if revision is not None:
        check_revision(name)
        return replace(arguments, model_revision=revision)
    if adapter is not None and arguments.model_revision == "main":
        return replace(arguments, model_revision=recorded_revision(Path(adapter).expanduser(), name) or "main")
    return arguments


def recorded_revision(folder: Path, name: str) -> str | None:
    """Return the revision of a model that a run began with; None if its record names another model, or none.

    Args:
        folder: The folder of the run, or of one of its checkpoints.
        name: The model.
    """
    recorded = recorded_settings(folder)
    return recorded.get("model_revision") if recorded.get("model_name_or_path") == name else None
