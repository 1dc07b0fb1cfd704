"""Saved weights into a model in place: tensor by tensor, or through transformers where names in files are others."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zokernel.errors import RunError, first_line
from zokernel.finetune.models.scales import load_factors_, scaled_layers, trains_scales
from zokernel.private_apis import converts_weights

LOADED_AT_ONCE = 1 << 24


@torch.no_grad()
def load_weights_(model: nn.Module, folder: Path) -> None:
    """Copy saved weights into a model in place, holding :data:`LOADED_AT_ONCE` bytes at a time beside it.

    Some models of transformers are saved with other names or shapes than those of their modules: the experts of Mixtral
    one by one, the head of GPT-NeoX as ``embed_out``.  transformers reads these, as a second copy of the model.

    Args:
        model: The model that was saved.
        folder: A checkpoint folder with ``.safetensors`` files.

    Raises:
        RunError: If the folder holds no weights, or they are another model's.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RunError(f"{folder} holds no .safetensors weights: the checkpoint is incomplete.")
    if trains_scales(model):
        load_factors_(model, folder)
        return
    if converts_weights(model):
        _load_converted_(model, folder)
        return
    for file in files:
        _load_file_(model, file)


def matches_saved_weights(model: nn.Module, folder: Path) -> bool:
    """Return whether the trained weights seem to be those in a folder, as far as the first row of each shows.

    A head that is new, or weights that were changed after they were loaded, are in no file.

    Args:
        model: The model, before its first step.
        folder: Where it was loaded from.
    """
    from safetensors import safe_open

    if trains_scales(model):
        return all(bool((layer.scale == 1).all()) for layer in scaled_layers(model).values())
    if converts_weights(model):
        return folder.is_dir()  # other names and shapes; transformers knows them
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    matching = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as archive:
            for name in trained.keys() & set(archive.keys()):
                saved, target = archive.get_slice(name), trained[name]
                if tuple(saved.get_shape()) != tuple(target.shape):
                    return False
                row = saved[:1] if target.ndim else archive.get_tensor(name)
                if torch.equal(row.to(target.dtype), target[:1].cpu() if target.ndim else target.cpu()):
                    matching.add(name)
    return matching == trained.keys()


def _load_file_(model: nn.Module, file: Path) -> None:
    from safetensors import safe_open

    targets = model.state_dict()
    with safe_open(file, "pt") as archive:
        names = list(archive.keys())
        shapes = {name: tuple(archive.get_slice(name).get_shape()) for name in names}
    for name, shape in shapes.items():
        if name not in targets or tuple(targets[name].shape) != shape:
            raise RunError(
                f"{file} holds {name!r} of shape {shape}, which this model does not have: it is another "
                "model's checkpoint."
            )
        target = targets[name] if shape else targets[name].view(1)
        length = max(1, LOADED_AT_ONCE * len(target) // max(1, target.nbytes))
        for begin in range(0, len(target), length):
            # Opened anew each time: pages of the file that were read count as memory until it is closed.
            with safe_open(file, "pt") as archive:
                rows = archive.get_slice(name)[begin : begin + length] if shape else archive.get_tensor(name)
                target[begin : begin + length].copy_(rows)


def _load_converted_(model: Any, folder: Path) -> None:
    targets = model.state_dict()
    # The widest type holds every bit of the others; the copy below rounds to what was saved.
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in targets.values() if tensor.is_floating_point()})
    try:
        saved, loading_info = type(model).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise RunError(
            f"{folder} could not be read as the weights of this {type(model).__name__} ({first_line(error)})."
        ) from error
    weights = saved.state_dict()
    differing = sorted(loading_info["missing_keys"] | loading_info["unexpected_keys"])
    differing += sorted(name for name in targets if name not in weights or weights[name].shape != targets[name].shape)
    if differing:
        raise RunError(
            f"{folder} could not be read as the weights of this {type(model).__name__} ({differing[0]!r} differs): it "
            "is another model's checkpoint."
        )
    for name, target in targets.items():
        target.copy_(weights[name])
