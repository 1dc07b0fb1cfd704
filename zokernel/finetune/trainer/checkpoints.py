"""The part of the trainer that writes and reads checkpoints: whole or absent, and without pickles."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState

from zokernel.errors import UsageError
from zokernel.files import write_json
from zokernel.finetune.settings.record import RunSettings, as_json
from zokernel.finetune.storage import checkpoint as files
from zokernel.finetune.storage.run_folder import explained_errors
from zokernel.finetune.storage.run_journal import RunJournal
from zokernel.finetune.storage.state_file import load_state, save_state
from zokernel.finetune.trainer.loop_optimizer import bare
from zokernel.private_apis import loop_sums, set_train_batch_size
from zokernel.secrets import hide_in_text, hide_in_values

# Arguments that a trainer reads only while it is made.
_FIXED = {
    *("output_dir", "method", "objective", "freeze_layers", "freeze_vectors", "zo_parallel", "zo_point_ranks"),
    *("perturb", "precision", "bf16", "fp16", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("early_stopping_patience", "label_smoothing_factor", "neftune_noise_alpha"),
}


class CheckpointTrainer(Trainer):
    """``transformers.Trainer`` whose checkpoints hold safetensors and JSON only.

    Args:
        settings: What the run is going to do.
        **kwargs: As for ``transformers.Trainer``, without ``args``.

    Attributes:
        settings: What the run is going to do; decisions that are taken late replace it.
        args: The settings in the form that the loop takes; this trainer's own copy.
        journal: The run's journal while it trains, if it keeps one.
        trial: What a search of hyperparameters tries in the last call of ``train``; None without a search.
    """

    args: Any
    trial: Any

    def __init__(self, settings: RunSettings, **kwargs: Any):
        self.settings, self.trial = settings, None
        super().__init__(args=loop_arguments(settings), **kwargs)
        self.journal: RunJournal | None = None
        self._loop_state: dict[str, Any] | None = None

    def decide(self, source: str, **values: Any) -> None:
        """Settle what was left open until now; ``source`` says who decided."""
        self.settings = self.settings.with_(source, **values)
        self.fill_in(values)

    def fill_in(self, names: Iterable[str]) -> None:
        """Set some of ``args`` to what the settings say."""
        filled = vars(loop_arguments(self.settings))
        vars(self.args).update({name: filled[name] for name in names})

    def take_over(self) -> None:
        """Record what was changed in ``args`` since the trainer was made: it counts for the run that begins.

        Raises:
            UsageError: If the trainer was made with it.
        """
        old, new = (as_json(args.to_dict()) for args in (loop_arguments(self.settings), self.args))
        changed = {name: new[name] for name in old if new[name] != old[name]}
        if fixed := sorted(changed.keys() & _FIXED):
            raise UsageError(f"The trainer was made with another {fixed[0]}: make a new one to change that.")
        changed = {name: value for name, value in changed.items() if name in self.settings.values()}
        if not changed:
            return
        self.settings = self.settings.with_("user", **changed)
        self.fill_in(["load_best_model_at_end"])
        if "per_device_train_batch_size" in changed:
            set_train_batch_size(self, self.args.train_batch_size)
        self.forget_optimizer()

    def _hp_search_setup(self, trial: Any) -> None:
        """Take over what a search of hyperparameters tries."""
        super()._hp_search_setup(trial)
        self.take_over()

    def forget_optimizer(self) -> None:
        """Let the loop make its optimizer anew, and the schedule with it."""
        self.optimizer = None

    @property
    def folder(self) -> Path:
        """The folder of the run: the output folder or, in a search of hyperparameters, that of the trial within it."""
        return Path(self._get_output_dir(self.trial))

    @property
    def bare_optimizer(self) -> Any:
        """The optimizer itself, without wrappers."""
        return bare(self.optimizer)

    @property
    def bare_model(self) -> Any:
        """The model itself, without any wrapper of a distributed run."""
        return self.accelerator.unwrap_model(self.model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that is there whole or not at all."""
        if self.args.save_strategy == "journal":
            return
        self.store_flos()
        if self.journal is not None:
            self.journal.sync()
        folder = Path(self._get_output_dir(trial))
        target, best = folder / f"checkpoint-{self.state.global_step}", self.state.best_global_step
        if best and (best == self.state.global_step or (folder / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        stateful: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                stateful[type(callback).__name__] = callback.state()
        with files.whole_folder(target) if self.args.should_save else nullcontext(files.hidden_path(target)) as scratch:
            self.accelerator.wait_for_everyone()
            self.save_model(str(scratch), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(scratch))
                self.accelerator.wait_for_everyone()
                self._save_rng_state(str(scratch))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(scratch / files.TRAINER_STATE))
        if self.args.should_save:
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(target))
            files.rotate(folder, limit=self.args.save_total_limit, best=self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as ``save_pretrained`` does, each file whole or not at all."""
        folder = Path(output_dir or str(self.args.output_dir))
        if _internal_call or not self.args.should_save:
            super().save_model(str(folder), _internal_call)
            return
        with explained_errors(folder), files.scratch_folder(folder) as scratch:
            super().save_model(str(scratch), _internal_call)
            files.move_files(scratch, folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write weights, configuration, tokenizer and arguments; the last as JSON, where transformers pickles them."""
        folder, model = Path(output_dir or str(self.args.output_dir)), self.bare_model
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
            model.save_pretrained(folder, state_dict=state_dict)
        else:
            safetensors.torch.save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        arguments = self.args.to_dict() | {"load_best_model_at_end": self.settings["load_best_model_at_end"]}
        write_json(folder / "training_args.json", hide_in_values(arguments))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            files.save_training_state(
                Path(output_dir), optimizer=self.bare_optimizer, scheduler=self.lr_scheduler, extra=loop_sums(self)
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._loop_state = files.load_training_state(
                Path(checkpoint), optimizer=self.bare_optimizer, scheduler=self.lr_scheduler
            )

    def _save_rng_state(self, output_dir: str) -> None:
        path = Path(output_dir) / files.STATE_FOLDER / f"random-{self.args.process_index}.safetensors"
        save_state(path, files.random_state(self.args.device))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / files.STATE_FOLDER / f"random-{self.args.process_index}.safetensors"
        if not path.exists():
            raise UsageError(f"{path} is missing: continue on as many processes as the checkpoint was written by.")
        files.set_random_state(load_state(path), self.args.device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        files.load_weights(self.bare_model if model is None else model, Path(resume_from_checkpoint))


def loop_arguments(settings: RunSettings) -> Any:
    """Return the settings as the loop of transformers takes them.

    It would read the best checkpoint as a second copy of the model; here the weights come tensor by tensor.
    """
    filled = settings.with_("auto", load_best_model_at_end=False).arguments()
    filled.run_name = filled.run_name and hide_in_text(filled.run_name)  # loggers write it to their files
    return filled


@contextmanager
def silence_best_model_warning(settings: RunSettings) -> Iterator[None]:
    """Keep ``EarlyStoppingCallback`` from warning that a run does not end with its best weights, if it does.

    It looks at what :func:`loop_arguments` changed.
    """
    callbacks = logging.getLogger("transformers.trainer_callback")
    no_warning = _NoFalseWarning() if settings["load_best_model_at_end"] else logging.Filter()
    callbacks.addFilter(no_warning)
    try:
        yield
    finally:
        callbacks.removeFilter(no_warning)


class _NoFalseWarning(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "without load_best_model_at_end" not in record.getMessage()
