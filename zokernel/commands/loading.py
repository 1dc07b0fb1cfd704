"""Language models that a command loads by name: the flags that say which revision and whose code, and the loader."""

from __future__ import annotations

import argparse
from typing import Any

from zokernel.commands.parser import add_switch
from zokernel.errors import UsageError, missing_extra

LOADING_FLAGS = ("model_revision", "trust_remote_code")


def add_loading_flags(parser: argparse.ArgumentParser, *, what: str = "a hub model", default: str = "main") -> None:
    """Declare the flags by which ``zokernel finetune``, too, says how a model is loaded.

    Args:
        parser: The parser of the command.
        what: What is loaded.
        default: The revision that is loaded if none is given.
    """
    parser.add_argument("--model_revision", help=f"branch, tag or commit of {what} (default: {default})")
    add_switch(parser, "--trust_remote_code", help=f"run the Python code that comes with {what}")


def loading_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags of :func:`add_loading_flags` say, by name."""
    return {name: getattr(args, name) for name in LOADING_FLAGS}


def refuse_loading_flags(args: argparse.Namespace, other: str) -> None:
    """Refuse the flags where no language model is loaded.

    Args:
        args: The flags.
        other: What is looked at instead.

    Raises:
        UsageError: If one was given.
    """
    for name, value in loading_arguments(args).items():
        if value:
            raise UsageError(f"--{name} is for language models, which {other} is not: leave it out.")


def load_language_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load a causal language model in float32 as training does, or a base with its adapter, in evaluation mode.

    Args:
        args: The flags of :func:`add_loading_flags`, and ``model_name_or_path``.

    Returns:
        Model and tokenizer.

    Raises:
        UsageError: If it cannot be loaded, or its weights cannot be perturbed.
        MissingDependencyError: If transformers is not installed.
    """
    from zokernel.commands.messages import quiet_transformers

    try:
        from zokernel.finetune.models.adapters import attach_adapter
        from zokernel.finetune.models.check import check_model
        from zokernel.finetune.models.load import load_pretrained
        from zokernel.finetune.models.revision import with_revision
        from zokernel.finetune.settings.arguments import ModelArguments
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Loading a language model") or error from error
    quiet_transformers()
    arguments = ModelArguments(args.model_name_or_path, lm_type="causal", trust_remote_code=args.trust_remote_code)
    checked = check_model(with_revision(arguments, args.model_revision))
    model: Any = load_pretrained(checked, checked.arguments)
    if checked.arguments.adapter_name_or_path is not None:
        model = attach_adapter(model, checked.arguments)
    return model, checked.tokenizer
