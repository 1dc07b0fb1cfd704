r"""What each way to hold the weights of a run, a setup, takes in memory; no weight is read.

All follows from the configuration.  Weights are counted on a model without memory, by units
(:mod:`zokernel.offload.units`).  Of activations those of the widest layer are counted, which is what is held at a time
without gradients, or the logits of the scored positions.  Of streamed weights what each loss keeps between two blocks
is added.  The memory of the libraries is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zokernel.finetune.models.kind import Kind, empty_model
from zokernel.finetune.models.quantized_layers import bytes_once_quantized, number_of_scales, quantized_layers
from zokernel.offload.units import find_units
from zokernel.perturb.copy_schedule import STRETCH
from zokernel.readable import readable_bytes

# How a base is quantized while it is loaded, and what asks for it; of bitsandbytes, then of torchao.
QUANTIZED = {
    "8bit": "--load_in_8bit true",
    "4bit": "--load_in_4bit true",
    "torchao:int8": "--quantization torchao:int8",
    "torchao:int4": "--quantization torchao:int4",
}
SCALES = "--train scales"
ALL_WEIGHTS, ADAPTER = "all weights", "an adapter"  # what is trained
FACTOR = 4  # bytes of the trained factor on a scale
UNKNOWN = "unknown"  # in the table
BLOCK = 512  # scored positions whose logits are in memory at a time
THREAD = 6 * 2**20  # what the library of matrix products keeps per thread, and the thread's heap, as measured


@dataclass(frozen=True)
class Sizes:
    """What the memory of a model's run depends on.

    Attributes:
        blocks: Bytes of all blocks.
        block: Bytes of the largest one.
        outside: Bytes of the weights outside of blocks.
        itemsize: Bytes of a weight.
        hidden: Numbers between two blocks, per token.
        widest: Numbers that a block's widest layer holds, per token.
        vocabulary: Scores per token.
        cached: Keys and values of all blocks, per token.
        quantized: Bytes of all weights once some are quantized, by the names of :data:`QUANTIZED`; without those that
            would quantize nothing.
        scales: Scales that they then have, by the same names.
    """

    blocks: int
    block: int
    outside: int
    itemsize: int
    hidden: int
    widest: int
    vocabulary: int
    cached: int
    quantized: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.blocks + self.outside

    @property
    def copies(self) -> int:
        """Bytes of perturbed copies that ``in_forward`` holds at a time."""
        return min(self.weights, STRETCH * self.itemsize)

    def activations(self, tokens: int, *, losses: int = 1, scored: int | None = None) -> int:
        """Return the bytes of activations of a forward.

        Args:
            tokens: Tokens of the batch.
            losses: Losses that share the forward pass.
            scored: Positions of the batch whose logits are needed; all of them if not given.
        """
        layer = losses * tokens * (4 * self.hidden + self.widest) * self.itemsize
        logits = min(losses * (tokens if scored is None else scored), BLOCK) * self.vocabulary
        # Losses are taken in float32.
        return max(layer, losses * tokens * self.hidden * self.itemsize + logits * (self.itemsize + 4))

    def streamed(self, tokens: int, *, losses: int, scored: int | None = None) -> int:
        """Return the bytes of activations of losses that share a pass over streamed weights.

        One loss computes at a time, but each has a thread.

        Args:
            tokens: Tokens of the batch.
            losses: How many losses share the pass.
            scored: Positions of the batch whose logits are needed; all of them if not given.
        """
        one = self.activations(tokens, scored=scored)
        return one + (losses - 1) * min(one, THREAD) + self.border(tokens, losses=losses)

    def border(self, tokens: int, *, losses: int) -> int:
        """Return the bytes that the losses of a step keep between two blocks: the embeddings and what a block gave."""
        return 2 * losses * tokens * self.hidden * self.itemsize


@dataclass(frozen=True)
class Setup:
    """One way to hold the weights of a run, in bytes.

    Attributes:
        flags: What to write on the command line.
        trains: ``all weights``, ``an adapter`` or ``scales``.
        weights: Weights in the memory where the model computes, copies of them included.
        activations: Activations of a step.
        cache: Keys and values while text is written.
        host: Weights in host memory, if the model computes elsewhere.
        read: Bytes that a step reads from the disk.
        written: Bytes that a step writes to the disk.
        moved: Bytes that a step copies between host and device.
        note: What is not in numbers.
        size_known: Whether the size of the weights is known; if it is not, ``weights`` is 0.
    """

    flags: str
    trains: str
    weights: int
    activations: int
    cache: int
    host: int = 0
    read: int = 0
    written: int = 0
    moved: int = 0
    note: str = ""
    size_known: bool = True

    @property
    def memory(self) -> int:
        """Bytes that are needed where the model computes, as far as they are known."""
        return self.weights + self.activations + self.cache


def measure(architecture: Any, dtype: torch.dtype, *, kind: Kind = "causal") -> Sizes:
    """Return the sizes of a model, from its configuration.

    Args:
        architecture: The configuration.
        dtype: Type in which weights are held.
        kind: Which kind of language model it is.

    Raises:
        UsageError: If the configuration describes no model that can be built.
    """
    model = empty_model(architecture, kind)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    blocks: list[int] = []
    outside = widest = 0
    for unit in find_units(model):
        own = [parameters[name] for name in unit.names]
        count = sum(parameter.numel() for parameter in own)
        if not unit.is_block:
            outside += count
            continue
        blocks.append(count)
        # A gated layer holds two products and their own product.
        widest = max([widest, *(3 * max(parameter.shape[-2:]) for parameter in own if parameter.ndim > 1)])
    bitsandbytes, torchao = (
        quantized_layers(architecture, kind, name, model=model) for name in ("4bit", "torchao:int8")
    )
    layers = {name: bitsandbytes if name.endswith("bit") else torchao for name in QUANTIZED}
    layers = {name: quantized for name, quantized in layers.items() if quantized.shapes}
    whole = sum(blocks) + outside
    text = architecture.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    shared = getattr(text, "num_key_value_heads", None) or heads
    return Sizes(
        blocks=sum(blocks) * dtype.itemsize,
        block=max(blocks, default=0) * dtype.itemsize,
        outside=outside * dtype.itemsize,
        itemsize=dtype.itemsize,
        hidden=text.hidden_size,
        widest=widest,
        vocabulary=text.vocab_size,
        cached=2 * len(blocks) * text.hidden_size // heads * shared,
        quantized={
            name: (whole - quantized.quantized) * dtype.itemsize
            + bytes_once_quantized(name, quantized.shapes, dtype.itemsize)
            for name, quantized in layers.items()
        },
        scales={name: number_of_scales(name, quantized.shapes) for name, quantized in layers.items()},
    )


def list_setups(
    sizes: Sizes, *, losses: int, rows: int, tokens: int, writes: int = 0, gpu: bool = False
) -> list[Setup]:
    """Return the setups of a model, for each kind of training the quickest first.

    Args:
        sizes: Of the model.
        losses: Losses of a step.
        rows: Rows of a batch.
        tokens: Tokens of a row.
        writes: Tokens that are written after each row, if any are.
        gpu: Whether the model computes on a GPU.

    Returns:
        What each takes.
    """
    batch = rows * tokens
    one, every = sizes.activations(batch), sizes.activations(batch, losses=losses)
    cache = rows * (tokens + writes) * sizes.cached * sizes.itemsize if writes else 0
    whole = sizes.weights
    setups = [Setup("--perturb in_forward", ALL_WEIGHTS, whole + sizes.copies, one, cache)]
    if sizes.itemsize >= 4:  # below, roundings would not leave the weights where they were
        setups.insert(0, Setup("--perturb in_place", ALL_WEIGHTS, whole, one, cache))
    setups += [
        Setup("--lora true --perturb stacked", ADAPTER, whole, every, cache),
        Setup("--lora true", ADAPTER, whole, one, cache),
    ]
    setups += [
        Setup(f"--lora true {QUANTIZED[name]}", ADAPTER, nbytes, one, cache) for name, nbytes in sizes.quantized.items()
    ]
    setups += [
        Setup(f"{SCALES} {QUANTIZED[name]}", "scales", nbytes + FACTOR * sizes.scales[name], one, cache)
        for name, nbytes in sizes.quantized.items()
        if name.startswith("torchao")
    ]
    return setups + _streamed_setups(sizes, sizes.streamed(batch, losses=losses), cache, gpu=gpu)


def _streamed_setups(sizes: Sizes, activations: int, cache: int, *, gpu: bool) -> list[Setup]:
    """Return the setups that stream the weights.

    Args:
        sizes: Of the model.
        activations: Bytes of the activations of a step.
        cache: Bytes of keys and values while text is written.
        gpu: Whether the model computes on a GPU.
    """
    whole, outside, blocks = sizes.weights, sizes.outside + sizes.copies, sizes.blocks
    if gpu:
        on_device = 2 * sizes.block + outside
        return [
            Setup("--offload cpu", ALL_WEIGHTS, on_device, activations, cache, host=blocks, moved=2 * blocks),
            Setup("--lora true --offload cpu", ADAPTER, on_device, activations, cache, host=blocks, moved=blocks),
        ]
    return [
        Setup("--offload cpu", ALL_WEIGHTS, whole + sizes.copies, activations, cache),
        Setup("--lora true --offload cpu", ADAPTER, whole, activations, cache),
        Setup("--offload disk", ALL_WEIGHTS, sizes.copies, activations, cache, read=whole, written=whole),
        Setup(
            "--offload disk --offload_updates journal",
            ALL_WEIGHTS,
            outside + sizes.block,
            activations,
            cache,
            read=whole,
            note="step t repeats t - 1 updates",
        ),
        Setup("--lora true --offload disk", ADAPTER, 0, activations, cache, read=whole),
    ]


def fastest_setup(setups: Sequence[Setup], free: int, trains: str, host: int | None = None) -> Setup | None:
    """Return the setup that costs least time among those that fit.

    The order is: nothing is moved, less is copied to a device, less is read and written; then less memory for copies.

    Args:
        setups: The setups.
        free: Free bytes where the model computes.
        trains: ``all weights``, ``an adapter`` or ``scales``.
        host: Free bytes of host memory, if that is another one.

    Returns:
        The setup; None if none fits.
    """
    fit = [
        setup for setup in setups if setup.trains == trains and setup.memory <= free and setup.host <= (host or free)
    ]
    order = {id(setup): number for number, setup in enumerate(setups)}
    return min(
        fit,
        key=lambda setup: (setup.moved + setup.read + 2 * setup.written, bool(setup.note), order[id(setup)]),
        default=None,
    )


def table(setups: Sequence[Setup], free: int, host: int | None = None) -> str:
    """Return the setups as a table.

    Args:
        setups: The setups.
        free: Free bytes where the model computes.
        host: Free bytes of host memory, if that is another one.
    """
    heads = ("setup", "trained", "weights", "activations", "cache", "memory", "read", "written", "fits")
    rows = [
        (
            setup.flags,
            setup.trains,
            readable_bytes(setup.weights) if setup.size_known else UNKNOWN,
            *map(readable_bytes, (setup.activations, setup.cache)),
            readable_bytes(setup.memory) if setup.size_known else UNKNOWN,
            readable_bytes(setup.read or setup.moved),
            readable_bytes(setup.written),
            "no" if setup.memory > free or setup.host > (host or free) else "yes" if setup.size_known else UNKNOWN,
        )
        for setup in setups
    ]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in cells)
        for cells in (list(enumerate(zip(row, widths))) for row in [heads, *rows])
    ]
    lines += [
        "",
        f"Read and written per step; {readable_bytes(free)} are free.  The libraries take 0.4 to 0.7 GiB more.",
    ]
    return "\n".join(lines)
