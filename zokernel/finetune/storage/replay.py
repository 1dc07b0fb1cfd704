"""From base weights and a journal to the weights of any step, for models of transformers and peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.data import resolve_model_path
from zokernel.data.hub_requests import bounded_requests
from zokernel.errors import RunError, UsageError, ZokernelError
from zokernel.finetune.models.check import load_tokenizer, loading_error
from zokernel.finetune.models.kind import auto_class, is_trusted, language_model_kind
from zokernel.finetune.models.model_files import ADAPTER, check_folder
from zokernel.finetune.models.quantization import DEQUANTIZED, check_library, stored_quantization
from zokernel.finetune.models.quantized_model import prevent_repacking_
from zokernel.finetune.models.revision import check_revision
from zokernel.finetune.models.saved_adapter import load_saved, name_base_, recorded_settings
from zokernel.finetune.models.scales import reset_factors_, train_scales_, trains_scales
from zokernel.finetune.storage.checkpoint import load_adapter_
from zokernel.journal import Journal, replay_
from zokernel.journal.hashes import frozen_sha256, quantized_sha256

BASE_ADAPTER = "base-adapter"


def replay(
    base: str | Path | nn.Module | Mapping[str, Tensor],
    journal: str | Path | Journal,
    *,
    step: int | None = None,
    allow_other_backend: bool = False,
    model_revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Tensor]:
    """Rebuild trained weights from base weights and a journal, bit for bit, without data or forward passes.

    Args:
        base: What the run started from: a model folder or hub id, a model, or tensors by name (which are copied).
        journal: The journal, its file, or the folder of the run.
        step: After how many steps; all of them by default.
        allow_other_backend: Accept a backend that may round differently from the run's.
        model_revision: Branch, tag or commit of a base on the hub; the one that the run recorded by default.
        trust_remote_code: Whether Python code that comes with the base may run.

    Returns:
        The trained parameters by name.

    Raises:
        UsageError: If there is no such base, journal or step.
        RunError: If the base is another one, or the journal is damaged.

    Example:
        >>> import tempfile, zokernel
        >>> from zokernel.journal import JournalWriter, make_header, record_of, weights_sha256
        >>> layer = nn.Linear(3, 1)
        >>> base = {name: p.detach().clone() for name, p in layer.named_parameters()}
        >>> optimizer = zokernel.optim.MeZO(layer, lr=0.1)
        >>> folder = Path(tempfile.mkdtemp())
        >>> header = make_header(optimizer, "mezo", {"lr": 0.1}, base_sha256=weights_sha256(base))
        >>> writer = JournalWriter.create(folder / "journal.zkj", header)
        >>> for _ in range(3):
        ...     loss = optimizer.step(lambda: layer(torch.ones(2, 3)).square().mean())
        ...     writer.append(record_of(optimizer))
        >>> writer.close()
        >>> torch.equal(replay(base, folder)["weight"], layer.weight)
        True
    """
    journal = journal if isinstance(journal, Journal) else Journal.read(journal)
    if isinstance(base, (str, Path)):
        model = load_base(str(base), journal, model_revision=model_revision, trust_remote_code=trust_remote_code)
        weights = dict(model.named_parameters())
    else:
        tensors = dict(base.named_parameters()) if isinstance(base, nn.Module) else base
        names = [name for name in journal.header.get("parameters", ()) if name in tensors]
        weights = {name: tensors[name].detach().clone() for name in names}
    replay_(weights, journal, step=step, allow_other_backend=allow_other_backend)
    return {name: weights[name].detach() for name in journal.header["parameters"]}


def load_base(
    name_or_path: str, journal: Journal, *, model_revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the model, or the model and its untrained adapter, that a journal's run started from.

    Args:
        name_or_path: The base: a folder, a GGUF file or a hub id.
        journal: The journal.
        model_revision: Branch, tag or commit of a base on the hub; the one that the run recorded by default.
        trust_remote_code: Whether Python code that comes with the base may run.

    Raises:
        UsageError: If it cannot be loaded, or the journal does not say of which class it is.
        RunError: If it is another one.
    """
    description = journal.header.get("model") or {}
    load_options = load_options_of(
        name_or_path, journal.path.parent, model_revision, trust_remote_code=trust_remote_code
    )
    try:
        with bounded_requests():
            path, options = source_of(name_or_path, description.get("quantization"), load_options)
            if Path(path).is_dir() and "gguf_file" not in options:
                check_folder(Path(path))
            model_class = _class_of(str(description.get("class")), path, load_options, journal)
            model = model_class.from_pretrained(path, dtype=getattr(torch, description["dtype"]), **options).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, ZokernelError):
            raise
        raise loading_error(name_or_path, error, revision=load_options.get("revision")) from error
    if type(model).__name__ != description["class"]:
        raise RunError(
            f"The base is a {type(model).__name__}, and the run's was a {description['class']}: give the model it was "
            "started with."
        )
    prevent_repacking_(model)
    if description.get("trained") == "scales":
        model = train_scales_(model)
    if description["adapter"]:
        folder = journal.path.parent / BASE_ADAPTER
        if not (folder / ADAPTER).exists():
            raise UsageError(f"{folder}, the adapter before training, is missing: it belongs to the journal.")
        model = load_saved(model, str(folder))
        name_base_(model, name_or_path, load_options.get("revision") or "main")
    parameters, header = dict(model.named_parameters()), journal.header
    is_other_base = quantized_sha256(parameters) != header.get("quantized_sha256", quantized_sha256(parameters))
    if is_other_base or frozen_sha256(parameters, header["parameters"]) != header["frozen_sha256"]:
        raise RunError("The frozen weights of the base are not those of the run: give the model it was started with.")
    if str(journal.header["backend"]).endswith(" on cuda") and torch.cuda.is_available():
        model.cuda()  # where the same roundings are repeated
    return model


def load_tokenizer_of_base(
    name_or_path: str, journal: Journal, *, model_revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer of a base that :func:`load_base` loads, by the same arguments.

    Raises:
        UsageError: If it cannot be loaded.
    """
    load_options = load_options_of(
        name_or_path, journal.path.parent, model_revision, trust_remote_code=trust_remote_code
    )
    with bounded_requests():
        return load_tokenizer(_load_path(name_or_path), name_or_path, load_options)


def load_options_of(
    name: str, folder: Path, model_revision: str | None = None, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs for a base: its revision, its GGUF file, and whether its code may run.

    Args:
        name: A model folder, a hub id or a GGUF file.
        folder: The folder of the run, whose record names revision and file if it began with this model.
        model_revision: The requested revision.
        trust_remote_code: Whether code that comes with it may run.

    Raises:
        UsageError: If a revision is requested and the base is not on the hub.
    """
    load_options: dict[str, Any] = {"trust_remote_code": trust_remote_code}  # without it, transformers asks the user
    if model_revision is not None:
        check_revision(name)
    recorded = recorded_settings(folder)
    recorded = recorded if recorded.get("model_name_or_path") == name else {}
    place = Path(name).expanduser()
    file = place.name if place.suffix.lower() == ".gguf" else recorded.get("gguf_file")
    revision = model_revision or recorded.get("model_revision") or "main"
    load_options |= {"revision": revision} if revision != "main" else {}
    return load_options | ({"gguf_file": file} if file else {})


def source_of(
    name: str, quantization: dict[str, Any] | None = None, load_options: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Return where a base is read from, and what ``from_pretrained`` needs to read it as the run did.

    Args:
        name: A model folder, a hub id or a GGUF file.
        quantization: How the run quantized it while it was loaded.
        load_options: What :func:`load_options_of` returned.
    """
    from transformers import AutoConfig, CompressedTensorsConfig, GgufConfig
    from transformers.quantizers import AutoQuantizationConfig

    path, options = _load_path(name), dict(load_options or {"trust_remote_code": False})
    if "gguf_file" in options:
        return path, options | {"quantization_config": GgufConfig(dequantize=True)}
    stored = stored_quantization(AutoConfig.from_pretrained(path, **options))
    options["use_safetensors"] = True
    if stored in DEQUANTIZED:
        return path, options | {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    method = stored or str((quantization or {}).get("quant_method") or "")
    check_library(method, f"{name}, which {'is' if stored else 'the run'} quantized ({method}),")
    if not stored and quantization is not None:
        options["quantization_config"] = AutoQuantizationConfig.from_dict(quantization)
    return path, options


def _load_path(name: str) -> str:
    """Return the folder or hub id that ``from_pretrained`` reads: of a GGUF file, the folder."""
    path = resolve_model_path(name)
    return str(Path(path).expanduser().parent) if path.lower().endswith(".gguf") else path


def _class_of(name: str, path: str, load_options: Mapping[str, Any], journal: Journal) -> Any:
    """Return what loads a model of a class: transformers' own, or its ``AutoModel`` for code that comes with the base.

    Raises:
        UsageError: If the class is not one of transformers, and no other code may run.
    """
    import transformers

    model_class: Any = getattr(transformers, name, None)
    if hasattr(model_class, "from_pretrained"):
        return model_class
    if not load_options.get("trust_remote_code"):
        raise UsageError(
            f"{journal.path} was written for a {name}, which transformers cannot load: if its code comes with the base "
            "and may be run, pass --trust_remote_code true, else the base weights to zokernel.finetune.replay."
        )
    return auto_class(language_model_kind(transformers.AutoConfig.from_pretrained(path, **load_options)))


@torch.no_grad()
def restore_base_(model: Any, folder: Path) -> None:
    """Put a model's weights back to those it was loaded with, or its adapter to the one before training.

    Raises:
        RunError: If they cannot be loaded again.
    """
    if hasattr(model, "peft_config"):
        load_adapter_(model, folder / BASE_ADAPTER)
        return
    if trains_scales(model):
        reset_factors_(model)
        return
    try:
        load_options = load_options_of(model.name_or_path, folder, trust_remote_code=is_trusted(model.config))
        path, options = source_of(model.name_or_path, load_options=load_options)
        base = type(model).from_pretrained(path, dtype=model.dtype, **options)
    except (OSError, ValueError) as error:
        raise RunError(
            f"The base {model.name_or_path!r} can no longer be loaded: rebuild the wanted step with "
            f"'zokernel replay --base BASE --journal {folder} --output_dir DIR --step N'."
        ) from error
    targets = dict(model.named_parameters())
    for name, tensor in base.named_parameters():
        targets[name].copy_(tensor)
