"""What the header of a journal says about its run: the model, its weights and the order of the examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zokernel.errors import UsageError
from zokernel.finetune.data.sampling import ORDER_VERSION
from zokernel.finetune.models.scales import trains_scales
from zokernel.journal import weights_sha256
from zokernel.journal.hashes import frozen_sha256, quantized_sha256
from zokernel.secrets import hide_in_text
from zokernel.without_adapter import without_adapter

# What must be the same for the journal's losses to be those that the run would compute again.
_BASE = "base_sha256"
_IDENTITY = ("method", "options", "groups", "parameters", _BASE, "frozen_sha256", "data_order", "perturb")
_OPTIONAL_IDENTITY = ("quantized_sha256",)  # of a quantized base, where both journals have it


def data_order(dataset: Any, *, seed: int, batch: int, sampling: str, drop_last: bool) -> dict[str, Any]:
    """Return what decides which examples each step sees.

    Args:
        dataset: The training examples.
        seed: Seed of their order.
        batch: Examples per step, of all processes.
        sampling: How they are grouped.
        drop_last: Whether a last batch that is smaller is left out.
    """
    examples = getattr(dataset, "examples", None)
    digest = hashlib.sha256()
    for example in examples or ():
        digest.update(repr(example).encode())
    length = len(dataset) if hasattr(dataset, "__len__") else None
    return {
        "seed": seed,
        "batch": batch,
        "sampling": sampling,
        "sampler": ORDER_VERSION,
        "drop_last": drop_last,
        "examples": digest.hexdigest() if examples is not None else length,
    }


def weight_hashes(model: nn.Module) -> dict[str, str]:
    """Return the hashes of a model's trained, frozen and quantized weights, for the header."""
    parameters = dict(model.named_parameters())
    trained = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
    quantized = quantized_sha256(parameters)
    return {
        _BASE: weights_sha256(trained),
        "frozen_sha256": frozen_sha256(parameters, trained),
        **({"quantized_sha256": quantized} if quantized else {}),
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return what makes the model again: its class, its type, and what it was loaded from."""
    adapter = hasattr(model, "peft_config")
    bare = without_adapter(model)
    quantized = getattr(bare, "is_quantized", False)
    return {
        **({"quantization": bare.config.quantization_config.to_dict()} if quantized else {}),
        **({"trained": "scales"} if trains_scales(bare) else {}),
        "class": type(bare).__name__,
        "dtype": str(next(bare.parameters()).dtype).removeprefix("torch."),
        "adapter": adapter,
        "name_or_path": hide_in_text(getattr(bare, "name_or_path", "")),
    }


def check_same_run(folder: Path, previous: Mapping[str, Any], header: Mapping[str, Any], *, loaded: bool) -> None:
    """Refuse another run's journal; weights that a checkpoint has replaced need not be those of its base.

    Args:
        folder: The output folder.
        previous: The header of the journal that is there.
        header: That of the run.
        loaded: Whether a checkpoint has replaced the weights.

    Raises:
        UsageError: If the journal is that of other settings, data or weights.
    """
    optional = [key for key in _OPTIONAL_IDENTITY if key in previous and key in header]
    different = [key for key in (*_IDENTITY, *optional) if previous.get(key) != header[key]]
    if loaded and _BASE in different:
        different.remove(_BASE)
    if different:
        advice = "repeat that run's settings to continue it"
        if different == [_BASE]:
            advice = "give the model it began with (make the model anew before resuming in the same process)"
        differences = _differences(previous, header, different)
        raise UsageError(
            f"The journal in {folder} was written by another run ({differences}): {advice}, or choose "
            "another output_dir."
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], keys: list[str]) -> str:
    """Name what differs in words: the settings inside dictionaries, and hashes by what they are hashes of."""
    words = {
        _BASE: "base weights",
        "frozen_sha256": "frozen weights",
        "quantized_sha256": "quantized weights",
        "groups": "parameter groups",
    }
    differences = []
    for key in keys:
        if isinstance(old.get(key), dict) and key != "parameters":
            inner = sorted(k for k in old[key].keys() | new[key].keys() if old[key].get(k) != new[key].get(k))
            differences += [f"{k}: {old[key].get(k)} there, {new[key].get(k)} here" for k in inner if k != "examples"]
            differences += ["other training examples"] if "examples" in inner else []
        elif key in ("method", "perturb"):
            differences.append(f"{key}: {old.get(key)} there, {new[key]} here")
        else:
            differences.append(f"other {words.get(key, key)}")
    return "; ".join(differences)
