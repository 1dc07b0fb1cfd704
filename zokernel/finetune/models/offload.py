"""``--offload disk``: which runs can stream their weights, and what that costs, said before anything is loaded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from zokernel.errors import UsageError
from zokernel.finetune.models.adapters import trained_by
from zokernel.finetune.models.check import CheckedModel
from zokernel.finetune.models.streamed import load_streamed
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.resolve import given_sources
from zokernel.finetune.settings.unsupported import is_first_order
from zokernel.offload.blocks import Blocks, streamed_blocks
from zokernel.perturb.in_forward import STRETCH

logger = logging.getLogger(__name__)

PERTURB = ("auto", "in_forward", "stacked")


def offloaded(arguments: ModelArguments, config: ZOConfig, command: Sequence[str] = ()) -> ZOConfig:
    """Return the settings of a run whose weights stay in files; those given if they do not.

    Args:
        arguments: Which model, and where its weights are.
        config: What the user asked for.
        command: The command line, if it came from there.

    Raises:
        UsageError: If the run cannot stream its weights.

    Example:
        >>> config = ZOConfig(output_dir="runs/mine", method="mezo")
        >>> offloaded(ModelArguments(offload="ram"), config)
        Traceback (most recent call last):
        zokernel.errors.UsageError: --offload must be disk or cpu, not 'ram'.
    """
    where = arguments.offload
    if where is None:
        if arguments.offload_dir is not None:
            raise UsageError("--offload_dir is where --offload disk keeps files: add --offload disk.")
        return config
    if where not in ("disk", "cpu"):
        raise UsageError(f"--offload must be disk or cpu, not {where!r}.")
    if config.device.type != "cpu":
        raise UsageError(
            f"Weights are streamed to the CPU only, and this run computes on {config.device.type}: leave out "
            "--offload, or pass --use_cpu true."
        )
    if where == "cpu":
        raise UsageError(
            "--offload cpu keeps weights in host memory for a GPU, and this run computes on the CPU: use --offload "
            "disk, or leave it out."
        )
    full = trained_by(arguments) == "full parameters"
    if is_first_order(config.method):
        raise UsageError(f"{config.method} takes gradients, for which weights are not streamed: leave out --offload.")
    if config.torch_compile:
        raise UsageError("Compiled blocks do not stream their weights: leave out --offload or --torch_compile.")
    if config.world_size > 1:
        raise UsageError(f"Weights are streamed by one process, and there are {config.world_size}: start one.")
    if config.perturb not in PERTURB or (full and config.perturb == "stacked"):
        raise UsageError(
            f"--perturb {config.perturb} would read all weights once for every loss, or hold copies of them: leave it "
            "out, and all losses of a step share one pass."
        )
    if arguments.merge_adapter:
        raise UsageError(
            "--merge_adapter changes the base, which stays in its files: merge afterwards, by 'zokernel merge'."
        )
    return _with_journal(config, given_sources(config, command)) if full and config.do_train else config


def _with_journal(config: ZOConfig, given: Mapping[str, str]) -> ZOConfig:
    """Return settings by which the journal alone is kept: every checkpoint would be another copy of all weights."""
    strategy = getattr(config.save_strategy, "value", config.save_strategy)
    if strategy != "journal" and "save_strategy" in given:
        raise UsageError(
            f"--save_strategy {strategy} would write a copy of all streamed weights each time: use journal, from which "
            "the run continues."
        )
    if config.load_best_model_at_end and "load_best_model_at_end" in given:
        raise UsageError(
            "--load_best_model_at_end true would go back to weights that are not kept: 'zokernel replay' makes those "
            "of any step from the journal."
        )
    config = copy.copy(config)
    config.save_strategy, config.load_best_model_at_end = "journal", False
    logger.info("offload: save_strategy journal, and the run ends with its last weights.")
    return config


def load_offloaded(checked: CheckedModel, arguments: ModelArguments, config: ZOConfig) -> nn.Module:
    """Load a model whose weights stay in files.

    Raises:
        UsageError: If its weights cannot be streamed.
    """
    folder = Path(checked.path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                checked.path, revision=arguments.model_revision, allow_patterns=["*.safetensors", "*.json"]
            )
        )
    full = trained_by(arguments) == "full parameters"
    target = Path(arguments.offload_dir or Path(str(config.output_dir)) / "offload")
    model = load_streamed(
        checked.architecture,
        folder,
        checked.dtype,
        kind=checked.kind,
        offload_dir=target,
        trains_weights=full,
        name=arguments.model_name_or_path,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )
    blocks = streamed_blocks(model)
    assert blocks is not None
    logger.info("%s", _told(blocks, target if target.exists() else folder, written=full))
    return model


def _told(blocks: Blocks, folder: Path, *, written: bool) -> str:
    sizes = [unit.nbytes for unit in blocks.units]
    gigabytes = sum(sizes) / 2**30
    told = (
        f"Offload disk: {gigabytes:.2f} GiB of weights stay in {folder}, in {len(sizes)} parts of at most "
        f"{max(sizes) / 2**20:.0f} MiB; every step reads {gigabytes:.2f} GiB"
    )
    if written:
        return (
            f"{told} and writes as much (beside it, {gigabytes:.2f} GiB of the first weights are kept).  Memory: "
            f"{_copies(blocks):.0f} MiB of perturbed copies, and activations."
        )
    return f"{told}, once for all its losses.  Memory: the adapter and activations."


def _copies(blocks: Blocks) -> float:
    """Return the MiB of perturbed copies that are held at a time."""
    sizes = [(sum(p.numel() for p in unit.tensors.values()), unit.nbytes) for unit in blocks.units]
    return max(min(count, STRETCH) * size / max(count, 1) for count, size in sizes) / 2**20
