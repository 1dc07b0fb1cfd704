"""``--offload``: which runs can stream their weights, and what that costs, said before anything is loaded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from zokernel.errors import UsageError
from zokernel.finetune.models.adapters import part_to_train, trains_adapter
from zokernel.finetune.models.check import CheckedModel
from zokernel.finetune.models.memory_report import ConfiguredModel, describe_setups
from zokernel.finetune.models.streamed import StreamingOptions, load_streamed
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.check import check_output, draws_by_example, losses_per_step
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.resolve import setting_sources
from zokernel.finetune.settings.saving import derive
from zokernel.finetune.settings.zo_arguments import AUTO, is_first_order
from zokernel.offload.blocks import Blocks, streamed_blocks
from zokernel.offload.mapping import make_folder
from zokernel.offload.replayed import Replayed
from zokernel.offload.staged import Staged
from zokernel.offload.store import Memory
from zokernel.offload.working_copy import WorkingCopy
from zokernel.perturb.copy_schedule import STRETCH
from zokernel.readable import readable_bytes

logger = logging.getLogger(__name__)

TOKENS = 128  # of a row, in what is said before any row is read
STREAMED_PERTURB = ("auto", "in_forward", "stacked")


def with_offload(arguments: ModelArguments, config: ZOConfig, command: Sequence[str] = ()) -> ZOConfig:
    """Return the settings of a run whose weights stay in files; those given if they do not.

    Args:
        arguments: Which model, and where its weights are.
        config: What the user asked for.
        command: The command line, if it came from there.

    Raises:
        UsageError: If the run cannot stream its weights.

    Example:
        >>> config = ZOConfig(output_dir="runs/mine", method="mezo")
        >>> with_offload(ModelArguments(offload="ram"), config)
        Traceback (most recent call last):
        zokernel.errors.UsageError: --offload must be disk or cpu, not 'ram'.
    """
    full = part_to_train(arguments) == "full parameters"
    if arguments.offload is None:
        for name in ("offload_dir", "offload_updates"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name} is for weights that stay in files: add --offload disk.")
        return config
    _check_flags(arguments, full=full)
    _check_device(config, arguments.offload)
    _check_method(config, full=full)
    if arguments.offload_dir is not None:
        check_output(arguments.offload_dir, "--offload_dir")
    if arguments.merge_adapter:
        raise UsageError(
            "--merge_adapter changes the base, which stays in its files: merge afterwards, by 'zokernel merge'."
        )
    return _with_journal(config, setting_sources(config, command)) if full and config.do_train else config


def _check_flags(arguments: ModelArguments, *, full: bool) -> None:
    """Refuse flags of ``--offload`` that do not go together.

    Args:
        arguments: Which model, and where its weights are.
        full: Whether all weights are trained.
    """
    where, updates = arguments.offload, arguments.offload_updates
    if where not in ("disk", "cpu"):
        raise UsageError(f"--offload must be disk or cpu, not {where!r}.")
    if updates not in (None, "disk", "journal"):
        raise UsageError(f"--offload_updates must be disk or journal, not {updates!r}.")
    if updates is not None and (where == "cpu" or not full):
        raise UsageError(
            "--offload_updates says where the updates of all weights are kept, with --offload disk and no adapter: "
            "leave it out."
        )
    if where == "cpu" and arguments.offload_dir is not None:
        raise UsageError("--offload cpu keeps no files: leave out --offload_dir.")


def _check_device(config: ZOConfig, where: str) -> None:
    """Refuse a device that weights are not streamed to from where they are, ``disk`` or ``cpu``."""
    device = config.device.type
    if where == "disk" and device != "cpu":
        raise UsageError(
            f"--offload disk computes on the CPU only, and this run on {device}: use --offload cpu, or pass "
            "--use_cpu true."
        )
    if device not in ("cpu", "cuda"):
        raise UsageError(f"Weights are not streamed to {device}: leave out --offload.")


def _check_method(config: ZOConfig, *, full: bool) -> None:
    """Refuse ways to train that cannot read the weights block by block.

    Args:
        config: What the user asked for.
        full: Whether all weights are trained.
    """
    if is_first_order(config.method):
        raise UsageError(f"{config.method} takes gradients, for which weights are not streamed: leave out --offload.")
    if config.torch_compile:
        raise UsageError("Compiled blocks do not stream their weights: leave out --offload or --torch_compile.")
    if config.world_size > 1:
        raise UsageError(f"Weights are streamed by one process, and there are {config.world_size}: start one.")
    if config.perturb not in STREAMED_PERTURB or (full and config.perturb == "stacked"):
        raise UsageError(
            f"--perturb {config.perturb} would read all weights once for every loss, or hold copies of them: leave it "
            "out, and all losses of a step share one pass."
        )
    if config.method != AUTO and draws_by_example(config):
        raise UsageError(
            f"{config.method} gives every example directions of its own, for which weights are not streamed: choose "
            "another method, or leave out --offload."
        )


def _with_journal(config: ZOConfig, explicit: Mapping[str, str]) -> ZOConfig:
    """Return settings by which the journal alone is kept: every checkpoint would be another copy of all weights."""
    strategy = getattr(config.save_strategy, "value", config.save_strategy)
    if strategy != "journal" and "save_strategy" in explicit:
        raise UsageError(
            f"--save_strategy {strategy} would write a copy of all streamed weights each time: use journal, from which "
            "the run continues."
        )
    if config.load_best_model_at_end and "load_best_model_at_end" in explicit:
        raise UsageError(
            "--load_best_model_at_end true would go back to weights that are not kept: 'zokernel replay' makes those "
            "of any step from the journal."
        )
    config = copy.copy(config)
    derive(config, save_strategy="journal", load_best_model_at_end=False)
    logger.info("offload: save_strategy journal, and the run ends with its last weights.")
    return config


def _model_folder(checked: CheckedModel, arguments: ModelArguments) -> Path:
    """Return the folder of a model, fetched from the hub if it is there."""
    if Path(checked.path).is_dir():
        return Path(checked.path)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json"]
    return Path(snapshot_download(checked.path, revision=arguments.model_revision, allow_patterns=patterns))


def load_offloaded(checked: CheckedModel, arguments: ModelArguments, config: ZOConfig) -> nn.Module:
    """Load a model whose weights stay in files.

    Raises:
        UsageError: If its weights cannot be streamed.
    """
    configured = ConfiguredModel(checked.architecture, checked.dtype, checked.kind, arguments)
    logger.info(
        "Memory of each setup for rows of %d tokens (the estimate for the actual rows follows).\n%s",
        TOKENS,
        describe_setups(configured, losses_per_step(config), config.per_device_train_batch_size, TOKENS),
    )
    folder = _model_folder(checked, arguments)
    full = part_to_train(arguments) == "full parameters" and config.do_train
    target = Path(arguments.offload_dir or Path(str(config.output_dir)) / "offload")
    if target.resolve() == folder.resolve():
        raise UsageError(
            f"--offload_dir {target} is the model's own folder, whose files stay as they are: name another."
        )
    if full and arguments.offload == "disk":
        make_folder(target)  # what cannot be written is said before training
    streaming = StreamingOptions(
        target,
        trains_weights=full,
        where=str(arguments.offload),
        updates=arguments.offload_updates or "disk",
        device=config.device,
    )
    model = load_streamed(
        checked.architecture,
        folder,
        checked.dtype,
        streaming,
        kind=checked.kind,
        name=arguments.model_name_or_path,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )
    blocks = streamed_blocks(model)
    assert blocks is not None
    streamed = _describe_streaming(
        blocks, target if any(target.glob("*.safetensors")) else folder, config, trained=full
    )
    memory = "Memory: the adapter and activations." if trains_adapter(arguments) else "Memory: activations."
    logger.info("%s", streamed if full else f"{streamed}.  {memory}")
    return model


def _describe_streaming(blocks: Blocks, folder: Path, config: ZOConfig, *, trained: bool) -> str:
    """Return where the weights are, and what is read, copied and written; of trained ones what memory it takes, too."""
    store, sizes = blocks.store, [unit.nbytes for unit in blocks.units]
    outside = sum(unit.nbytes for unit in blocks.units if not unit.is_block)
    block = max(unit.nbytes for unit in blocks.units if unit.is_block)
    whole, parts = readable_bytes(sum(sizes)), f"in {len(sizes)} parts of at most {readable_bytes(max(sizes))}"
    passes, when = 1, "every batch"
    if config.do_train and config.objective == "reward":
        when = "every token that the model writes"
    elif config.do_train:
        passes, when = config.gradient_accumulation_steps, "every step"
    if isinstance(store, Staged):
        text = (
            f"Offload cpu: {whole} of weights {parts}; blocks stay in host memory, and {when} copies "
            f"{readable_bytes(passes * (sum(sizes) - outside))} to {store.device}"
            f"{f' and {readable_bytes(sum(sizes) - outside)} back per step' if trained else ''}.  Memory of "
            f"the device: {readable_bytes(2 * block)} for two blocks, {readable_bytes(outside)} of weights outside of "
            "blocks"
        )
    elif isinstance(store, Memory):
        text = (
            f"Offload cpu: this run computes on the CPU, where {whole} of weights stay in memory, {parts}; "
            "all losses of a step share one pass over them"
        )
    else:
        read = readable_bytes(passes * sum(sizes))
        text = f"Offload disk: {whole} of weights stay in {folder}, {parts}; {when} reads {read}"
    if not trained:
        return text
    if isinstance(store, WorkingCopy):
        text += f", and every step writes {whole} (beside it, {whole} of the first weights are kept)"
    if isinstance(store, Replayed):
        text += (
            " and writes nothing: step t repeats the updates of t - 1 steps on every block that is read.  Weights "
            f"outside of blocks ({readable_bytes(outside)}) stay in memory, and one updated block of "
            f"{readable_bytes(block)}"
        )
    return f"{text}.  Memory: {readable_bytes(_copies(blocks))} of perturbed copies, and activations."


def _copies(blocks: Blocks) -> float:
    """Return the bytes of perturbed copies that are held at a time."""
    sizes = [(sum(p.numel() for p in unit.tensors.values()), unit.nbytes) for unit in blocks.units]
    return max(min(count, STRETCH) * size / max(count, 1) for count, size in sizes)
