"""Whether a model can be loaded and trained, as far as its configuration and files say: before any data are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zokernel.data import hub, resolve_model_path
from zokernel.data.hub_requests import bounded_requests
from zokernel.directions.weights.restore import LOW_PRECISION
from zokernel.errors import UsageError, ZokernelError
from zokernel.finetune.models.adapters import check_adapter, check_peft, part_to_train, trains_adapter
from zokernel.finetune.models.gguf import with_gguf
from zokernel.finetune.models.kind import Kind, language_model_kind
from zokernel.finetune.models.merge import check_mergeable
from zokernel.finetune.models.model_files import TOKENIZER, check_folder, is_run, remedy
from zokernel.finetune.models.pickles import refuse_pickles
from zokernel.finetune.models.quantization import check_flags, check_layers, check_stored, stays_quantized
from zokernel.finetune.models.saved_adapter import (
    MERGED_FILE,
    adapter_config,
    saved_tokenizer,
    with_base,
    with_base_on_hub,
)
from zokernel.finetune.run_files import RUN_FILE, run_folders
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.check import check_values

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class CheckedModel:
    """A model that was found, and not yet loaded.

    Attributes:
        path: Its folder, or its hub id.
        architecture: Its configuration.
        tokenizer: Its tokenizer: the one saved with the adapter, where there is one.
        kind: Which kind of language model it is.
        dtype: In which type its weights will be held.
        arguments: Which model and adapter: of an adapter's folder, its base and itself.
    """

    path: str
    architecture: Any
    tokenizer: Any
    kind: Kind
    dtype: torch.dtype
    arguments: ModelArguments

    @property
    def is_trained(self) -> bool:
        """Whether it is a saved adapter, or what a run of zokernel or ``zokernel merge`` left."""
        return self.arguments.adapter_name_or_path is not None or any(
            (place / file).is_file() for place in run_folders(Path(self.path)) for file in (RUN_FILE, MERGED_FILE)
        )

    @property
    def low_precision(self) -> str:
        """The type in which all weights are stored and trained, if it is below fp32."""
        whole = part_to_train(self.arguments) == "full parameters"
        return str(self.dtype) if whole and self.dtype in LOW_PRECISION else ""


@bounded_requests()
def check_model(arguments: ModelArguments, *, trains: bool = True) -> CheckedModel:
    """Find a model and check what can be checked without its weights.

    Args:
        arguments: Which model and adapter.
        trains: Whether it will be trained, not only scored.

    Returns:
        What was found.

    Raises:
        UsageError: If there is no such model, its files are damaged, or it cannot be trained in this way.
    """
    check_values(arguments)
    check_flags(arguments)
    arguments = with_gguf(with_base(arguments))
    check_flags(arguments)  # of a GGUF file, too, that was named as the model
    check_adapter(arguments)
    if trains_adapter(arguments):
        check_peft("An adapter")
    name, file = arguments.model_name_or_path, arguments.gguf_file
    check_dtype(arguments)
    path = resolve_model_path(name)
    if Path(path).exists():
        if file is None:  # a GGUF file may lie among others
            refuse_pickles(path, what="model")
            check_folder(Path(path))
    elif path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path:
        raise UsageError(f"There is no model folder {path}.")
    if arguments.adapter_name_or_path:
        adapter_config(arguments.adapter_name_or_path)
    architecture, with_adapter = read_architecture(path, arguments)
    if with_adapter is not None:
        return check_model(with_adapter, trains=trains)
    check_stored(arguments, architecture)
    if trains and stays_quantized(arguments, architecture) and part_to_train(arguments) == "full parameters":
        raise UsageError(
            f"{name} is quantized, so its weights cannot be perturbed: train an adapter with --lora true, or, of a "
            "model quantized by torchao, the scales with --train scales."
        )
    if arguments.merge_adapter:
        check_mergeable(part_to_train(arguments), architecture)
    kind = language_model_kind(architecture, arguments.lm_type)
    check_layers(arguments, architecture, kind)
    adapter_tokenizer, options = saved_tokenizer(arguments), _pretrained_options(arguments)
    if adapter_tokenizer is not None:
        name, options = adapter_tokenizer, {"trust_remote_code": arguments.trust_remote_code}
    tokenizer = load_tokenizer(adapter_tokenizer or path, name, options)
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise UsageError(
            f"{name} fills masks, and its tokenizer has no mask token: save the tokenizer that it was trained with in "
            "its folder, or choose another model."
        )
    dtype = DTYPES.get(arguments.dtype) or stored_dtype(architecture)
    return CheckedModel(path, architecture, tokenizer, kind, dtype, arguments)


def check_dtype(arguments: ModelArguments) -> None:
    """Refuse a type that no weights are held in.

    Raises:
        UsageError: If ``dtype`` is none of :data:`DTYPES`, nor ``auto``.
    """
    if arguments.dtype not in (*DTYPES, "auto"):
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)} or auto, not {arguments.dtype!r}.")


def read_architecture(path: str, arguments: ModelArguments) -> tuple[Any, ModelArguments | None]:
    """Read the configuration of a model, or find that its hub id is that of an adapter.

    Args:
        path: Where it lies: a folder, a ``config.json`` or a hub id.
        arguments: What the user named.

    Returns:
        The configuration and None; of an adapter, None and the arguments that name base and adapter.

    Raises:
        UsageError: If there is no configuration, or it is wrong.
        RunError: If the hub cannot be reached.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, **_pretrained_options(arguments)), None
    except Exception as error:  # a configuration may be wrong in any way
        with_adapter = with_base_on_hub(arguments, error)
        if with_adapter is not None:
            return None, with_adapter
        name, revision = arguments.model_name_or_path, arguments.model_revision
        raise loading_error(name, error, revision=revision, gguf_file=arguments.gguf_file) from error


def _pretrained_options(arguments: ModelArguments) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told."""
    options = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    return options | ({"gguf_file": arguments.gguf_file} if arguments.gguf_file else {})


def load_tokenizer(path: str, name: str, options: Mapping[str, Any]) -> Any:
    """Load a tokenizer.

    Args:
        path: Where it lies: a folder or a hub id.
        name: What the user calls it.
        options: What ``from_pretrained`` is told.

    Raises:
        UsageError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # tokenizers raises bare exceptions
        which = {key: options.get(key) for key in ("revision", "gguf_file")}
        raise loading_error(name, error, what="tokenizer", **which) from error


def loading_error(
    name: str, error: Exception, *, what: str = "model", revision: str | None = None, gguf_file: str | None = None
) -> ZokernelError:
    """Return the error that tells in one sentence why a model, or its tokenizer, could not be loaded."""
    if "trust_remote_code" in str(error):
        return UsageError(
            f"{name} brings code of its own, which is not run: read it, and pass --trust_remote_code true if it may be."
        )
    if not Path(name).is_dir():
        explained = hub.explain(error, name, revision=revision)
        if explained is not None:
            return explained
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    if gguf_file is not None:
        subject = "GGUF file" if what == "model" else "The tokenizer of"
        return UsageError(f"{subject} {Path(name) / gguf_file} could not be loaded ({reason}): fetch it again.")
    problem = f"{'Model' if what == 'model' else 'The tokenizer of'} {name!r} could not be loaded ({reason})"
    if not Path(name).is_dir():
        return UsageError(
            f"{problem}: give 'smollm2', a folder written by save_pretrained, or a hub id that can be reached."
        )
    if what == "tokenizer" and is_run(Path(name)):
        lost = "" if (Path(name) / TOKENIZER).is_file() else f"{TOKENIZER} is missing"
        return UsageError(f"The tokenizer of {name!r} could not be loaded ({lost or reason}): {remedy(Path(name))}.")
    if what == "tokenizer":
        return UsageError(f"{problem}: tokenizer.save_pretrained writes its files into the model's folder.")
    return UsageError(f"{problem}: compare its config.json with the one it was saved with.")


def stored_dtype(architecture: Any) -> torch.dtype:
    """Return the type that a configuration says its weights are stored in; fp32 if it does not."""
    text = architecture.get_text_config()
    dtype = getattr(architecture, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
