"""Every private API of torch, transformers, accelerate and trl that this package uses, and why.

What such an API does may change in any version, so nothing private is used anywhere else, and each of these has a test
that fails when it is gone or behaves otherwise.  A public API is used wherever all allowed versions have one.

Functions with a line "Private" in their docstring wrap a private function or attribute.  Methods of ``Trainer`` that
are overridden cannot be wrapped: :data:`TRAINER_HOOKS` lists them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch takes seconds to load
    from torch import Tensor, nn

TRIED = {
    "torch": ("2.11.0", "2.13.0"),
    "transformers": ("5.6.2", "5.23.0"),
    "accelerate": ("1.10.0", "1.15.0"),
    "peft": ("0.18.0", "0.21.2"),
    "trl": ("1.16.0", "1.16.0"),
}
"""The versions that all of this was tried with."""


class Hook(NamedTuple):
    """A private method of ``transformers.Trainer`` that is overridden or called, or a private parameter of a method."""

    parameters: tuple[str, ...]
    """Its parameters, after ``self``."""
    reason: str
    """Why no public API will do."""


TRAINER_HOOKS = {
    "_get_train_sampler": Hook(
        ("train_dataset",), "The order of examples must depend on seed and epoch alone; no callback can change it."
    ),
    "_get_eval_sampler": Hook(
        ("eval_dataset",), "Losses before and after are paired by example, so every evaluation has the same batches."
    ),
    "_determine_best_metric": Hook(
        ("metrics", "trial"), "Without checkpoints, the best step is noted where the loop finds a better metric."
    ),
    "_save_checkpoint": Hook(
        ("model", "trial"), "A checkpoint is written whole or not at all, and on_save comes after it was written."
    ),
    "_save": Hook(
        ("output_dir", "state_dict"), "save_model calls it on each kind of model; it would pickle the arguments."
    ),
    "_save_optimizer_and_scheduler": Hook(("output_dir",), "torch.save would pickle; these are safetensors and JSON."),
    "_load_optimizer_and_scheduler": Hook(("checkpoint",), "The counterpart: torch.load would unpickle."),
    "_save_rng_state": Hook(("output_dir",), "torch.save would pickle the random states."),
    "_load_rng_state": Hook(("checkpoint",), "The counterpart: torch.load would unpickle."),
    "_load_from_checkpoint": Hook(
        ("resume_from_checkpoint", "model"), "It would hold all weights twice; here they are read tensor by tensor."
    ),
    "_push_from_checkpoint": Hook(
        ("checkpoint_folder",), "The replaced _save_checkpoint pushes to the hub as the original does."
    ),
    "_hp_search_setup": Hook(
        ("trial",), "What a search of hyperparameters tries is recorded before the optimizer is made; no callback can."
    ),
    "_get_output_dir": Hook(("trial",), "In a search of hyperparameters, each trial has a folder of its own."),
    "_prepare_inputs": Hook(
        ("inputs",), "Losses of a batch are taken outside training_step, too, and need it on the device."
    ),
}
"""Private methods of ``transformers.Trainer`` that are overridden or called."""

SAVE_MODEL = Hook(
    ("output_dir", "_internal_call"),
    "The loop passes _internal_call when it saves a checkpoint, which is made whole by other means.",
)
"""``Trainer.save_model``, a public method that is called with a private parameter."""


def loop_sums(trainer: Any) -> dict[str, Any]:
    """Return the sums of losses that the loop of ``Trainer`` keeps between two log lines.

    Private: ``Trainer._tr_loss``, ``_total_loss_scalar``, ``_globalstep_last_logged``.  The first log line after a
    checkpoint is the mean over steps on both sides of it, so these belong to the checkpoint.
    """
    return {
        "tr_loss": trainer._tr_loss,
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
    }


def set_loop_sums(trainer: Any, sums: dict[str, Any]) -> None:
    """Set the sums that :func:`loop_sums` returned; the loop zeroes them before ``on_train_begin``.

    Private: the attributes named there.
    """
    trainer._tr_loss = sums["tr_loss"].to(trainer.args.device)
    trainer._total_loss_scalar = sums["total_loss"]
    trainer._globalstep_last_logged = sums["last_logged"]


def set_train_batch_size(trainer: Any, size: int) -> None:
    """Set how many examples each device reads in one micro-batch, before the loop begins.

    Private: ``Trainer._train_batch_size``, which the loop reads.  It is copied from the arguments when the trainer is
    made, and the largest batch that fits is found later.
    """
    trainer._train_batch_size = size


_NOTED_BY_TRL = ("_metrics", "_total_train_tokens")


def noted_by_trl(trainer: Any) -> dict[str, Any]:
    """Return a copy of what a trainer of trl has noted of the losses it took; empty for any other trainer.

    Private: ``SFTTrainer._metrics`` and ``_total_train_tokens``, and those of other trainers of trl.  Every call of
    ``compute_loss`` adds to them, a loss that is only tried, too, and nothing public takes that back.
    """
    return copy.deepcopy({name: vars(trainer)[name] for name in _NOTED_BY_TRL if name in vars(trainer)})


def set_noted_by_trl(trainer: Any, noted: dict[str, Any]) -> None:
    """Set what :func:`noted_by_trl` returned.

    Private: the attributes named there.
    """
    vars(trainer).update(noted)


def tokens_counted_by_trl(trainer: Any) -> int:
    """Return how many tokens a trainer of trl has counted in training; 0 for any other trainer.

    Private: ``SFTTrainer._total_train_tokens``.  It is logged as ``num_tokens``, but not after every step.
    """
    return vars(trainer).get("_total_train_tokens", 0)


def count_tokens_once(trainer: Any, before: int, losses: int) -> None:
    """Count the tokens of a batch once, of which each of a step's losses was counted by a trainer of trl.

    Private: ``SFTTrainer._total_train_tokens`` and ``_metrics``.  Every call of ``compute_loss`` counts, and a step
    calls it for the same batch again and again.

    Args:
        trainer: Any trainer; those of others count no tokens.
        before: What :func:`tokens_counted_by_trl` returned before the step.
        losses: How many losses of the batch were taken since.
    """
    noted = vars(trainer)
    if "_total_train_tokens" in noted and losses:
        noted["_total_train_tokens"] = before + (noted["_total_train_tokens"] - before) // losses
        noted["_metrics"]["train"]["num_tokens"] = [noted["_total_train_tokens"]]


def exit_at_once(code: int) -> None:
    """End the process without running what is left to run.

    Private: ``os._exit``.  It is documented in spite of its name: after Ctrl-C in the middle of an import, everything
    else would raise errors of half-loaded libraries.
    """
    import os

    os._exit(code)


def flags_of(parser: Any) -> list[Any]:
    """Return the flags of a parser of argparse.

    Private: ``ArgumentParser._actions``.  argparse lists them in no public way.
    """
    return list(parser._actions)


def attention_implementation(model: Any) -> str | None:
    """Return which attention a model of transformers runs, such as ``sdpa``; None of any other model.

    Private: ``PreTrainedConfig._attn_implementation``.  There is a public setter, and nothing public that reads it.
    """
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def repeated_blocks(model: nn.Module) -> set[str]:
    """Return the names of the classes of the blocks that a model of transformers repeats.

    Private: ``PreTrainedModel._no_split_modules``.  What transformers keeps in one piece when it spreads a model over
    devices is what the model repeats, and nothing public names it.
    """
    return {kind for module in model.modules() for kind in getattr(module, "_no_split_modules", None) or ()}


def kept_in_full(model: Any) -> set[str]:
    """Return the ends of the names of the modules that bitsandbytes leaves in full precision, as T5 does ``wo``.

    Private: ``PreTrainedModel._keep_in_fp32_modules``, which transformers passes on to bitsandbytes.  Nothing public
    says what will not be quantized.
    """
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def converts_weights(model: Any) -> bool:
    """Return whether transformers saves a model's weights under other names, or in other shapes, than its modules have.

    Private: ``PreTrainedModel._weight_conversions``, and the module ``transformers.conversion_mapping``, which is not
    documented.  ``save_pretrained`` and
    ``from_pretrained`` convert weights, and nothing public says whether they do.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return False
    found: Any = getattr(model, "_weight_conversions", None)
    if found is None:  # of a model that was not loaded, save_pretrained asks this
        from transformers.conversion_mapping import get_model_conversion_mapping

        found = get_model_conversion_mapping(model, add_legacy=False)
    return bool(found)


def offloaded_parameter(model: Any, name: str) -> Tensor:
    """Return one parameter of a model that was loaded with ``device_map={"": "disk"}``, in the form it computes with.

    Private: ``transformers.integrations.accelerate``, which is not documented.  Nothing public reads a single weight
    through the conversions of a checkpoint.
    """
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(model, name)


def keep_in_place(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Let ``module.to(...)`` and its kind move everything in a module except some of its parameters.

    Private: ``Module._apply``, by which torch moves and converts modules.  A trainer moves the whole model to its
    device, and nothing public exempts weights that are copied there one block at a time.
    """
    kept = {id(tensor) for tensor in tensors}

    def apply_to_others(inner: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        held = dict(inner._parameters)
        for name, parameter in held.items():
            if id(parameter) in kept:
                del inner._parameters[name]
        try:
            return type(inner)._apply(inner, fn, recurse)
        finally:
            moved = dict(inner._parameters)
            inner._parameters.clear()
            inner._parameters.update({name: moved.get(name, parameter) for name, parameter in held.items()})

    for inner in module.modules():
        if any(id(parameter) in kept for parameter in inner.parameters(recurse=False)):
            vars(inner)["_apply"] = partial(apply_to_others, inner)


def compile_nothing(accelerator: Any) -> None:
    """Keep accelerate from compiling the whole model, as ``--torch_compile`` makes it do.

    Private: ``AcceleratorState.dynamo_plugin``.  transformers chooses the backend through the environment, before any
    public method of the trainer can change it.
    """
    from accelerate.utils import DynamoBackend

    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO


def cache_no_casts(accelerator: Any) -> None:
    """Keep autocast from caching the low-precision copies of weights.

    Private: ``Accelerator.autocast_handler``.  It is a public argument of the accelerator, which transformers makes and
    passes no such argument.
    """
    from accelerate.utils import AutocastKwargs

    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)


def synchronise_no_gradients(accelerator: Any) -> None:
    """Keep accelerate from wrapping models in ``DistributedDataParallel``.

    Private: that ``Accelerator.prepare`` calls ``prepare_model`` of the same object.  Its argument ``evaluation_mode``
    is public, but transformers calls ``prepare`` with the optimizer as well, and then leaves it out.
    """
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)


def deal_batches(loader: Any, processes: int, rank: int) -> bool:
    """Make a loader of accelerate read every ``processes``-th batch, beginning with number ``rank``.

    Private: ``BatchSamplerShard.num_processes`` and ``process_index``.  accelerate deals batches to all processes, and
    has no setting by which some of them read the same.

    Returns:
        Whether it is a loader whose batches are dealt; if not, it was left alone.
    """
    sampler: Any = getattr(loader, "batch_sampler", None)
    if not hasattr(sampler, "process_index"):
        return False
    sampler.num_processes, sampler.process_index = processes, rank
    return True


def use_one_gpu(arguments: Any) -> int:
    """Let a process compute on one GPU, and return how many it would have used.

    Private: ``TrainingArguments._n_gpu``.  With several GPUs and one process, transformers wraps the model in
    ``DataParallel``, which runs replicas that no perturbation reaches; it has no setting against that.
    """
    found: int = arguments.n_gpu
    arguments._n_gpu = min(found, 1)
    return found


write_count = attrgetter("_version")
"""Returns how often a tensor was written to in place, in any way that torch sees.

Private: ``Tensor._version``.  Autograd counts these writes, and a comparison of values would need a copy of all.
An assignment to ``tensor.data`` is not among them: it gives the tensor other memory.
"""


def note_step(optimizer: Any) -> None:
    """Let a learning rate schedule know that its optimizer took a step other than by ``step``.

    Private: ``Optimizer._opt_called``.  A schedule warns of steps that it has not seen, and watches ``step`` alone.
    """
    optimizer._opt_called = True


def standard_gamma(shape_parameters: Tensor, generator: Any) -> Tensor:
    """Return draws of Gamma(k, 1) for each k in ``shape_parameters``, with a generator of one's own.

    Private: ``torch._standard_gamma``.  ``torch.distributions.Gamma`` calls it with the global generator only.
    """
    import torch

    return torch._standard_gamma(shape_parameters, generator=generator)


def flatten_and_unflatten() -> tuple[Callable[[Any], tuple[list[Any], Any]], Callable[[list[Any], Any], Any]]:
    """Return ``flatten(tree)``, the (leaves, structure) of nested containers, and ``unflatten(leaves, structure)``.

    Private: ``torch.utils._pytree``.  These are the containers that torch's own functions take, named tuples included,
    and torch has no public name for it.
    """
    from torch.utils._pytree import tree_flatten, tree_unflatten

    return tree_flatten, tree_unflatten


def shard_offset(tensor: Any) -> tuple[int, ...]:
    """Return where the shard of this process begins in the whole of a ``DTensor``, in every dimension.

    Private: ``torch.distributed.tensor._utils.compute_local_shape_and_global_offset``.  A ``DTensor`` gives away its
    mesh and placements only, from which uneven shards would have to be worked out again.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def extension_file() -> str:
    """Return the file of torch's own extension module, through which the libraries it is linked with are found.

    Private: ``torch._C``.  Another copy of OpenMP, found in any other way, would start threads of its own.
    """
    import torch

    return torch._C.__file__


class ModuleState:
    """The hooks, the replaced ``forward`` and the training flag of modules, as they are now.

    Private: the dictionaries of a module's hooks.  Forwards that take turns each add and remove hooks of their own, and
    nothing public exchanges them.

    Args:
        modules: The modules.
    """

    _HOOKS = (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    )

    def __init__(self, modules: Sequence[nn.Module]):
        # The dictionaries themselves: who added a hook removes it from the one it was added to.
        kept = (*self._HOOKS, "training", "forward")
        self._states = [
            (vars(module), {key: vars(module)[key] for key in kept if key in vars(module)}) for module in modules
        ]

    def own(self) -> ModuleState:
        """Return the same state with hooks that can be added and removed without changing this one."""
        state = ModuleState(())
        state._states = [
            (module, {key: value.copy() if key in self._HOOKS else value for key, value in kept.items()})
            for module, kept in self._states
        ]
        return state

    def install(self) -> None:
        """Give the modules this state."""
        for module, kept in self._states:
            module.pop("forward", None)
            module.update(kept)
