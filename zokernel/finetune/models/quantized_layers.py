"""Which layers of a model are quantized while it is loaded, and how many bytes they take then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from zokernel.finetune.models.kind import Kind, empty_model
from zokernel.finetune.models.stacked import short_names, stacked_parameters
from zokernel.private_apis import full_precision_suffixes

GROUP = 32  # numbers of a row that share a scale of torchao:int4, where all rows can be divided so


@dataclass(frozen=True)
class Layers:
    """The layers of a model that are quantized while it is loaded, and what stays as it is.

    Attributes:
        shapes: Outputs and inputs of each quantized layer, by name.
        count: Parameters of the model.
        stacked: Parameters that hold one matrix for every expert, which no library quantizes, by name.
    """

    shapes: dict[str, tuple[int, int]]
    count: int
    stacked: dict[str, int]

    @property
    def quantized(self) -> int:
        """Parameters that are quantized."""
        return sum(outputs * inputs for outputs, inputs in self.shapes.values())

    def describe_experts(self) -> str:
        """Return in words which experts are not quantized; empty if the model has none in one tensor."""
        if not self.stacked:
            return ""
        share = 100 * sum(self.stacked.values()) / self.count
        return f"{', '.join(short_names(self.stacked, parts=3))}, {share:.0f} % of the model"


def quantized_layers(architecture: Any, kind: Kind, quantization: str, *, model: Any = None) -> Layers:
    """Return which layers of a model are quantized while it is loaded.

    These are the linear layers but the head.  bitsandbytes also quantizes the ``Conv1D`` of GPT-2, and leaves what
    transformers keeps in full precision for models of its kind (``wo`` of T5).

    Args:
        architecture: The model's configuration.
        kind: Which kind of language model it is.
        quantization: How it is quantized, by the names of
            :func:`~zokernel.finetune.models.quantization.requested_quantization`.
        model: The model, if it is there already; its shapes are looked at.

    Example:
        >>> from transformers import GPT2Config
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)
        >>> [len(quantized_layers(config, "causal", asked).shapes) for asked in ("4bit", "torchao:int8")]
        [4, 0]
    """
    from transformers.pytorch_utils import Conv1D

    model = empty_model(architecture, kind) if model is None else model
    head = model.get_output_embeddings()
    parameters = dict(model.named_parameters())
    last, by_bitsandbytes = [*parameters][-1], quantization.endswith("bit")
    types = (nn.Linear, Conv1D) if by_bitsandbytes else (nn.Linear,)
    full = tuple(full_precision_suffixes(model)) if by_bitsandbytes else ()
    shapes = {}
    for name, layer in model.named_modules():
        if type(layer) in types and layer is not head and last != f"{name}.weight" and not name.endswith(full):
            outputs, inputs = layer.weight.shape if type(layer) is nn.Linear else reversed(layer.weight.shape)
            shapes[name] = (int(outputs), int(inputs))
    stacked = {name: parameter.numel() for name, parameter in stacked_parameters(model).items()}
    return Layers(shapes, sum(parameter.numel() for parameter in parameters.values()), stacked)


def group_size(shapes: dict[str, tuple[int, int]]) -> int | None:
    """Return how many numbers of a row share a scale of ``torchao:int4``; None if a row has one.

    Example:
        >>> group_size({"up": (48, 32)}), group_size({"up": (48, 32), "down": (32, 48)})
        (32, None)
    """
    return GROUP if all(inputs % GROUP == 0 for _, inputs in shapes.values()) else None


def bytes_once_quantized(quantization: str, shapes: dict[str, tuple[int, int]], itemsize: int) -> int:
    """Return how many bytes linear layers take when they are quantized while they are loaded.

    Args:
        quantization: See :func:`~zokernel.finetune.models.quantization.requested_quantization`.
        shapes: Outputs and inputs of each, by name.
        itemsize: Bytes of a number of the model's type, in which torchao keeps the scales of 4 bits; others are fp32.

    Example:
        >>> bytes_once_quantized("4bit", {"up": (64, 64)}, 4), bytes_once_quantized("torchao:int8", {"up": (64, 64)}, 4)
        (2304, 4416)
    """
    count, scales = sum(outputs * inputs for outputs, inputs in shapes.values()), number_of_scales(quantization, shapes)
    if quantization == "4bit":
        return -(-count // 2) + 4 * scales
    # torchao has zero points of one byte, too.
    return count + scales * {"8bit": 4, "torchao:int8": 4 + 1}.get(quantization, itemsize + 1)


def number_of_scales(quantization: str, shapes: dict[str, tuple[int, int]]) -> int:
    """Return how many scales linear layers have when they are quantized while they are loaded.

    Example:
        >>> number_of_scales("torchao:int4", {"up": (64, 64)}), number_of_scales("torchao:int8", {"up": (64, 64)})
        (128, 64)
    """
    if quantization == "4bit":
        return sum(-(-outputs * inputs // 64) for outputs, inputs in shapes.values())
    group = group_size(shapes) if quantization == "torchao:int4" else None
    return sum(outputs * (inputs // group if group else 1) for outputs, inputs in shapes.values())
