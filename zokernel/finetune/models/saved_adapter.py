"""Adapters that were saved, by a run or by peft elsewhere: their base, their kind, and how they are loaded."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from zokernel.data import SOURCES, hub
from zokernel.data.hub_requests import bounded_requests
from zokernel.errors import UsageError, ZokernelError
from zokernel.finetune.models.model_files import ADAPTER, ADAPTER_CONFIG, CONFIG, TOKENIZER_CONFIG, remedy
from zokernel.finetune.models.pickles import refuse_pickles
from zokernel.finetune.run_files import RUN_FILE, read_run_file
from zokernel.finetune.settings.arguments import ModelArguments

logger = logging.getLogger(__name__)

MERGED_FILE = "merged.json"  # beside a model that an adapter was merged into
# Models from a package registry, and what they are called on the hub.
ON_THE_HUB = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def is_adapter(name: str) -> bool:
    """Return whether a local folder holds an adapter and no model.

    Example:
        >>> is_adapter("smollm2")
        False
    """
    folder = Path(name).expanduser()
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).exists()


def with_base(arguments: ModelArguments) -> ModelArguments:
    """Return arguments that name base and adapter, where ``model_name_or_path`` is the folder of an adapter.

    A base on the hub is the revision and the GGUF file that the adapter's run, or its configuration, names, unless the
    arguments name others.

    Args:
        arguments: What the user named.

    Returns:
        The same arguments if that is no adapter.

    Raises:
        UsageError: If the base cannot be told, or is no longer where it was.
    """
    name = arguments.model_name_or_path
    if not is_adapter(name):
        return arguments
    folder = Path(name).expanduser()
    base, run = _recorded_base(folder), recorded_settings(folder)
    if run.get("model_name_or_path") == base:
        requested = arguments.model_revision
        revision = run.get("model_revision", requested) if requested == "main" else requested
        file = arguments.gguf_file or run.get("gguf_file")
        arguments = replace(arguments, model_revision=revision, gguf_file=file)
    return _with_base_and_adapter(arguments, base)


def with_base_on_hub(arguments: ModelArguments, error: BaseException) -> ModelArguments | None:
    """Return arguments that name base and adapter, where ``model_name_or_path`` is the hub id of an adapter.

    Args:
        arguments: What the user named.
        error: Why no configuration of a model could be read; only where there is none, the hub is asked for another.

    Returns:
        None if it is no adapter.

    Raises:
        UsageError: If its base cannot be told, or another revision of the adapter is asked for.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = arguments.model_name_or_path
    if Path(name).expanduser().exists() or "config.json" not in str(error):
        return None
    try:
        hf_hub_download(name, ADAPTER_CONFIG, revision=arguments.model_revision)
    except (EntryNotFoundError, LocalEntryNotFoundError, OSError, ValueError):
        return None
    if arguments.model_revision != "main":
        raise UsageError(
            f"{name} is an adapter, of which the newest revision is used: leave out --model_revision, or name the base "
            "as --model_name_or_path with it."
        )
    base = adapter_config(name).base_model_name_or_path
    if not base:
        raise UsageError(f"The adapter {name} does not say what its base is: {_hint(name)}.")
    return _with_base_and_adapter(arguments, _loadable_base(str(base), name))


def saved_tokenizer(arguments: ModelArguments) -> str | None:
    """Return where the tokenizer is that was saved with an adapter: it may have a chat template that the base's lacks.

    Args:
        arguments: Which model and adapter.

    Returns:
        The folder or hub id of the adapter; None if there is no adapter, or no tokenizer with it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = arguments.adapter_name_or_path
    if name is None:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder) if (folder / TOKENIZER_CONFIG).is_file() else None
    try:
        hf_hub_download(name, TOKENIZER_CONFIG)
    except (EntryNotFoundError, LocalEntryNotFoundError, OSError, ValueError):
        return None
    return name


def _with_base_and_adapter(arguments: ModelArguments, base: str) -> ModelArguments:
    name = arguments.model_name_or_path
    if arguments.adapter_name_or_path:
        raise UsageError(
            f"{name} is an adapter, and --adapter_name_or_path names another: give its base as --model_name_or_path."
        )
    logger.info("%s is an adapter: its base is %s.", name, base)
    revision = arguments.model_revision
    if revision == "main" and base not in SOURCES and not Path(base).expanduser().is_dir():
        revision = adapter_config(name).revision or revision
    return replace(arguments, model_name_or_path=base, model_revision=revision, adapter_name_or_path=name)


def adapter_config(name: str) -> Any:
    """Return the configuration of a saved adapter.

    Args:
        name: A local folder or a hub id.

    Returns:
        A ``PeftConfig``.

    Raises:
        UsageError: If there is no such adapter, or its file is damaged.
    """
    import peft

    folder = Path(name).expanduser()
    if folder.is_dir():
        refuse_pickles(folder, what="adapter")
        if not (folder / ADAPTER_CONFIG).is_file():
            raise UsageError(
                f"{name} holds no {ADAPTER_CONFIG}: give the folder of an adapter that peft or a run saved."
            )
        if not (folder / ADAPTER).is_file():
            raise UsageError(f"{name} holds no {ADAPTER}, so no adapter: {remedy(folder)}.")
    elif name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UsageError(f"There is no adapter folder {name}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftConfig.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:  # a configuration may be wrong in any way
        raise _loading_error(name, error) from error


@bounded_requests()
def load_saved(model: nn.Module, name: str) -> Any:
    """Attach a saved adapter so that it can be trained on.

    peft loads virtual tokens to be used only.  What they are made of, the embedding, is trained here.

    Args:
        model: The base.
        name: A local folder or a hub id.

    Returns:
        The peft model, in evaluation mode.

    Raises:
        UsageError: If the adapter does not exist, or was trained on another kind of model.
    """
    import peft

    configuration = adapter_config(name)
    path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    tokens = configuration.is_prompt_learning
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing weights, which are named below
            adapted: Any = peft.PeftModel.from_pretrained(model, path, is_trainable=not tokens)
            loading_report = adapted.load_adapter(path, adapted.active_adapter, is_trainable=not tokens)
    except Exception as error:  # shapes, names, files: each fails in its own way
        raise _loading_error(name, error) from error
    unexpected = [key for key in loading_report.unexpected_keys if key != "prompt_embeddings"]
    missing = [] if tokens else list(loading_report.missing_keys)
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, which is not in this model"
        raise UsageError(
            f"The adapter {name} does not fit {type(model).__name__}: it {what}; give the base it was trained on "
            f"({configuration.base_model_name_or_path}) as --model_name_or_path."
        )
    if tokens:
        adapted.prompt_encoder[adapted.active_adapter].embedding.weight.requires_grad_(True)
    return adapted.eval()


def name_base_(adapted: Any, name: str, revision: str = "main") -> None:
    """Let ``adapter_config.json`` name the base by what means something elsewhere, and never by a path in a cache.

    Args:
        adapted: The peft model.
        name: What the user named as the model.
        revision: Its branch, tag or commit on the hub.
    """
    for configuration in adapted.peft_config.values():
        configuration.base_model_name_or_path = base_name(name)
        configuration.revision = None if revision == "main" else revision
    # Embeddings never change their size here; to find that out, peft would ask the hub at every save.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)


def log_base(model: Any, name: str) -> None:
    """Log once, when an adapter was saved, what ``adapter_config.json`` calls its base where that is no hub id.

    Args:
        model: The model that was saved; nothing is logged if it has no adapter.
        name: What the user named as the model.
    """
    if not hasattr(model, "peft_config"):
        return
    recorded_name = base_name(name)
    if name in ON_THE_HUB:
        logger.info(
            "%s names %s as the base; %s is that model dequantized from 4 bits.", ADAPTER_CONFIG, recorded_name, name
        )
    elif recorded_name != name or Path(name).is_dir():
        logger.info(
            "%s names the base by its local folder, %s: elsewhere, name the base yourself.",
            ADAPTER_CONFIG,
            recorded_name,
        )


def base_name(name: str) -> str:
    """Return what a saved adapter calls its base.

    Args:
        name: What the user named as the model.

    Returns:
        A hub id, or the absolute path of a local folder.

    Example:
        >>> base_name("smollm2")
        'HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and name not in SOURCES:
        return str(folder.resolve())
    return ON_THE_HUB.get(name, name)


def _recorded_base(folder: Path) -> str:
    """Return what a saved adapter's run, or its configuration, calls the base."""
    peft_base = adapter_config(str(folder)).base_model_name_or_path
    run_base, file = (recorded_settings(folder).get(key) for key in ("model_name_or_path", "gguf_file"))
    if run_base and (run_base in SOURCES or Path(run_base).expanduser().is_dir()) and not is_adapter(run_base):
        return str(Path(run_base) / file) if file else str(run_base)
    if not peft_base:
        raise UsageError(f"The adapter {folder} does not say what its base is: {_hint(str(folder))}.")
    return _loadable_base(str(peft_base), str(folder))


def recorded_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that left a model or an adapter in a folder; empty if there is none.

    Args:
        folder: The folder of a run, or any in it: somebody may have copied a checkpoint to one of another name.
    """
    for place in (folder, folder.absolute().parent):
        if (place / RUN_FILE).is_file():
            return read_run_file(place / RUN_FILE).get("settings") or {}
    return {}


def base_flags(adapter: str) -> str:
    """Return the flags by which the base of a saved adapter was quantized in its run; empty if it was not, or no run.

    Args:
        adapter: The adapter's folder or hub id.

    Example:
        >>> base_flags("runs/none")
        ''
    """
    settings = recorded_settings(Path(adapter).expanduser())
    bits = [f"--{name} true" for name in ("load_in_4bit", "load_in_8bit") if settings.get(name)]
    quantization = settings.get("quantization")
    return " ".join(bits + ([f"--quantization {quantization}"] if quantization else []))


def _loadable_base(base: str, adapter: str) -> str:
    """Return what an adapter calls its base if it can be loaded by that: a hub id, or a folder that is there."""
    if not Path(base).is_dir() and (base.startswith(("/", ".", "~")) or base.count("/") > 1):
        raise UsageError(f"The base of the adapter {adapter} is not at {base} any more: {_hint(adapter)}.")
    fetched = {hub_id: name for name, hub_id in ON_THE_HUB.items()}.get(base)
    return fetched if fetched and _is_only_fetched(fetched, base) else base


def _hint(adapter: str) -> str:
    return f"give it: --model_name_or_path BASE --adapter_name_or_path {adapter}"


def _is_only_fetched(name: str, on_hub: str) -> bool:
    """Return whether a model is here as it was fetched from a package registry, and not as it is on the hub."""
    from huggingface_hub import try_to_load_from_cache

    from zokernel.data.cache import cache_home, is_complete

    return is_complete(cache_home() / name) and not isinstance(try_to_load_from_cache(on_hub, "config.json"), str)


def _loading_error(name: str, error: Exception) -> ZokernelError:
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    refusal = UsageError(
        f"The adapter {name!r} could not be attached ({reason}): give a folder that peft or a run saved, and the base "
        "it was trained on as --model_name_or_path."
    )
    return hub.explain_or(error, name, refusal)
