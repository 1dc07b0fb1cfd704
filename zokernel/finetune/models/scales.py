r"""Trained scales: all that is trained of a quantized model is by how much its scales change.

A weight of torchao is :math:`W = \Delta \odot (Q - o)`, with integers Q, zero points o and one scale :math:`\Delta` for
each row, or for each group of a row.  Integers and zero points stay.  Trained are the factors r, 1 at the start, in

.. math:: W = (\max(r, 0)\, \Delta) \odot (Q - o)

so that eps and learning rate are shares of a scale, whatever its size.  What is saved is a quantized model with the
scales :math:`\max(r, 0)\, \Delta`, which transformers alone loads, and the factors beside it.

References:
    Shang et al. (2025), Fine-tuning Quantized Neural Networks with Zeroth-order Optimization, arXiv:2505.13430, which
    perturbs the scales themselves.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernel.errors import RunError, UsageError
from zokernel.finetune.models.model_files import sort_metadata_, weight_files
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.check import draws_by_example
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.resolve import setting_sources
from zokernel.finetune.settings.zo_arguments import AUTO
from zokernel.readable import plural

logger = logging.getLogger(__name__)

FACTORS_FILE = "scales.safetensors"
METHOD = "qzo"  # with clipped slopes


def with_scales(arguments: ModelArguments, config: ZOConfig, command: Sequence[str] = ()) -> ZOConfig:
    """Return the settings of a run that trains scales; those given if it trains something else.

    Args:
        arguments: What is trained.
        config: What the user asked for.
        command: The command line, if it came from there.

    Raises:
        UsageError: If the losses of several scales are to be taken in one forward.
    """
    if arguments.train != "scales":
        return config
    if config.perturb in ("stacked", "per_example"):
        raise UsageError(
            f"--perturb {config.perturb} gives rows of one batch weights of their own, which a quantized layer with "
            "trained scales has no form for: use in_place or in_forward."
        )
    if "method" in setting_sources(config, command):
        if config.method != AUTO and draws_by_example(config):
            raise UsageError(
                f"{config.method} gives every example directions of its own, which a quantized layer with trained "
                "scales has no form for: choose another method, such as qzo."
            )
        return config
    config = copy.copy(config)
    config.method = METHOD
    logger.info("method: %s, the default for scales, which clips slopes.", METHOD)
    return config


class ScaledLinear(nn.Module):
    """A linear layer of torchao whose scales are multiplied by trained factors.

    Args:
        linear: The layer; its weight is shared.

    Attributes:
        weight: The quantized weight, (O, I).
        scale: The factors, one per scale, float32.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        stored: Any = linear.weight
        self.scale = nn.Parameter(torch.ones(stored.scale.shape, device=stored.scale.device))
        self.register_state_dict_post_hook(_as_plain_linear)

    def scaled(self) -> Tensor:
        """Return the quantized weight with its scales multiplied: the integers are shared."""
        stored: Any = self.weight.detach()
        names, context = stored.__tensor_flatten__()
        parts = {name: getattr(stored, name) for name in names}
        parts["scale"] = (self.scale.relu() * parts["scale"]).to(parts["scale"].dtype)
        return type(stored).__tensor_unflatten__(parts, context, None, None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., O) of inputs (..., I)."""
        return F.linear(inputs, self.scaled(), self.bias)


def train_scales_(model: Any) -> Any:
    """Make the scales of a quantized model its only trained parameters.

    Args:
        model: A model of transformers that torchao has quantized, changed in place.

    Returns:
        The model; ``save_pretrained`` writes it with its new scales.

    Raises:
        UsageError: If it has no such scales.
    """
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and _has_scale(layer)}
    if not layers:
        raise UsageError(
            "The model has no layers with a floating-point scale of torchao to train: use --quantization torchao:int8 "
            "or torchao:int4."
        )
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, ScaledLinear(layer))
    model.save_pretrained = partial(_save, model)
    return model


def log_trained_scales(model: nn.Module) -> None:
    """Log that the scales of a model are what is trained."""
    layers = scaled_layers(model)
    count = sum(layer.scale.numel() for layer in layers.values())
    counts = plural(count, "scale"), plural(len(layers), "layer")
    logger.info("Trained: a factor on each of %s of %s, and nothing else.", *counts)


def scaled_layers(model: nn.Module) -> dict[str, ScaledLinear]:
    """Return the layers whose scales are trained, by name; none of a model that is trained otherwise."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ScaledLinear)}


def trains_scales(model: nn.Module) -> bool:
    """Return whether the scales of a model are trained."""
    return next(_layers(model), None) is not None


@torch.no_grad()
def load_factors_(model: nn.Module, folder: Path) -> None:
    """Put the factors that were saved in a folder into the model.

    Raises:
        RunError: If there are none, or they are another model's.
    """
    from safetensors.torch import load_file

    file = folder / FACTORS_FILE
    if not file.is_file():
        raise RunError(f"{folder} holds no {FACTORS_FILE}: it was not written by a run with --train scales.")
    saved, layers = load_file(file), scaled_layers(model)
    if {name: factors.shape for name, factors in saved.items()} != {
        n: layer.scale.shape for n, layer in layers.items()
    }:
        raise RunError(f"{file} holds the factors of another model: load the one that its run was started with.")
    for name, factors in saved.items():
        layers[name].scale.copy_(factors)


@torch.no_grad()
def reset_factors_(model: nn.Module) -> None:
    """Put the scales back to those that the model was loaded with."""
    for layer in _layers(model):
        layer.scale.fill_(1.0)


def _layers(model: nn.Module) -> Iterator[ScaledLinear]:
    return (module for module in model.modules() if isinstance(module, ScaledLinear))


def _has_scale(layer: nn.Linear) -> bool:
    """Return whether the weight of a layer is of integers with floating-point scales, as torchao wraps them."""
    stored: Any = layer.weight
    if not hasattr(stored, "__tensor_flatten__"):
        return False
    names, _ = stored.__tensor_flatten__()
    return {"qdata", "scale"} <= set(names) and stored.scale.is_floating_point()


def _as_plain_linear(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Let a state dictionary show the quantized weight with its new scales, as any linear layer of torchao has it."""
    assert isinstance(layer, ScaledLinear)
    state[f"{prefix}weight"] = layer.scaled().detach()
    del state[f"{prefix}scale"]


def _save(model: Any, folder: str | Path, *args: Any, **kwargs: Any) -> None:
    """Save as ``save_pretrained`` does, and the factors by themselves, which a checkpoint is continued from."""
    from safetensors.torch import save_file

    if model.hf_quantizer.pre_quantized:
        # transformers would undo how the stored parts became one tensor, which it cannot; their names are the same.
        kwargs.setdefault("save_original_format", False)
    type(model).save_pretrained(model, folder, *args, **kwargs)
    for file in weight_files(Path(folder)):
        sort_metadata_(file)
    factors = {name: layer.scale.detach().contiguous() for name, layer in scaled_layers(model).items()}
    save_file(factors, Path(folder) / FACTORS_FILE)
