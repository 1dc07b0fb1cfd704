"""Private APIs of transformers: methods of ``Trainer`` that are overridden, its attributes, and those of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch takes seconds to load
    from torch import Tensor, nn


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
    """Return the sum of losses that the loop of ``Trainer`` keeps between two log lines, and the step of the last one.

    Private: ``Trainer._tr_loss``, ``_globalstep_last_logged``.  The first log line after a checkpoint is the mean over
    steps on both sides of it, so these belong to the checkpoint.
    """
    return {"tr_loss": trainer._tr_loss, "last_logged": trainer._globalstep_last_logged}


def set_loop_sums(trainer: Any, sums: dict[str, Any]) -> None:
    """Set the sums that :func:`loop_sums` returned; the loop zeroes them before ``on_train_begin``.

    Private: the attributes named there, and ``Trainer._total_loss_scalar``.  The mean loss of a call to ``train`` is
    over the steps of that call, so those before the checkpoint are taken out of its sum.
    """
    trainer._tr_loss = sums["tr_loss"].to(trainer.args.device)
    trainer._total_loss_scalar = -float(sums["tr_loss"])
    trainer._globalstep_last_logged = sums["last_logged"]


def set_train_batch_size(trainer: Any, size: int) -> None:
    """Set how many examples each device reads in one micro-batch, before the loop begins.

    Private: ``Trainer._train_batch_size``, which the loop reads.  It is copied from the arguments when the trainer is
    made, and the largest batch that fits is found later.
    """
    trainer._train_batch_size = size


def use_one_gpu(arguments: Any) -> int:
    """Let a process compute on one GPU, and return how many it would have used.

    Private: ``TrainingArguments._n_gpu``.  With several GPUs and one process, transformers wraps the model in
    ``DataParallel``, which runs replicas that no perturbation reaches; it has no setting against that.
    """
    gpus: int = arguments.n_gpu
    arguments._n_gpu = min(gpus, 1)
    return gpus


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


def full_precision_suffixes(model: Any) -> set[str]:
    """Return the ends of the names of the modules that bitsandbytes leaves in full precision, as T5 does ``wo``.

    Private: ``PreTrainedModel._keep_in_fp32_modules``, which transformers passes on to bitsandbytes.  Nothing public
    says what will not be quantized.
    """
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def converts_weights(model: Any) -> bool:
    """Return whether transformers saves a model's weights under other names, or in other shapes, than its modules have.

    Private: ``PreTrainedModel._weight_conversions``, and the module ``transformers.conversion_mapping``, which is not
    documented.  ``save_pretrained`` and ``from_pretrained`` convert weights, and nothing public says whether they do.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return False
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:  # the model was not loaded: save_pretrained looks there
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return bool(conversions)


def offloaded_parameter(model: Any, name: str) -> Tensor:
    """Return one parameter of a model that was loaded with ``device_map={"": "disk"}``, in the form it computes with.

    Private: ``transformers.integrations.accelerate``, which is not documented.  Nothing public reads a single weight
    through the conversions of a checkpoint.
    """
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(model, name)
