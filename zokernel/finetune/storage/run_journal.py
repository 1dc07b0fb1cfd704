"""The journal of a training run: written while it trains, played back when it continues.

A run with a journal is resumed by running its loop again: data order, schedule, callbacks, logs and random state come
out as they did, because it is the same loop.  Only what costs forward passes is taken from the journal: the losses of
each step and the results of each evaluation.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from zokernel.errors import RunError, UsageError
from zokernel.finetune.data.sampling import ORDER_VERSION
from zokernel.finetune.storage.checkpoint import whole_folder
from zokernel.finetune.storage.replay import BASE_ADAPTER, load_base_
from zokernel.journal import Event, Journal, JournalWriter, make_header, replay_, weights_sha256
from zokernel.journal.hashes import sampled_sha256
from zokernel.journal.reader import FILE_NAME
from zokernel.journal.replay import record_of
from zokernel.optim.zeroth_order import Closure, ZerothOrderOptimizer
from zokernel.perturb.recorded import replay_step

if TYPE_CHECKING:
    from zokernel.finetune.trainer.zo_trainer import ZOTrainer

logger = logging.getLogger(__name__)

# What must be the same for the journal's losses to be those that the run would compute again.
_IDENTITY = ("method", "options", "groups", "parameters", "base_sha256", "frozen_sha256", "data_order", "visits_points")


class RunJournal:
    """Records a run of :class:`ZOTrainer`, and plays back what an earlier process of the same run recorded.

    Args:
        trainer: The trainer, before its optimizer is made: the model holds the base weights.
        continues: Whether to go on with the journal that is in the output folder.

    Attributes:
        found: The journal that is continued, if any.
        replaying: Whether the step just taken came from it.

    Raises:
        UsageError: If a journal is there that is not to be continued or overwritten.
        RunError: If it is damaged.
    """

    def __init__(self, trainer: ZOTrainer, *, continues: bool):
        self._trainer = trainer
        self._folder = Path(str(trainer.args.output_dir))
        self.path = self._folder / FILE_NAME
        self.found: Journal | None = None
        self.replaying = False
        self._writer: JournalWriter | None = None
        self._taken = 0
        if self.path.exists() and continues:
            self.found = Journal.read(self.path)
        elif self.path.exists() and not trainer.args.overwrite_output_dir:
            raise UsageError(
                f"{self._folder} holds the journal of an earlier run: pass resume_from_checkpoint=True to continue it, "
                "overwrite_output_dir=True to start anew, or choose another output_dir."
            )
        parameters = dict(trainer.bare_model.named_parameters())
        trained = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        frozen = {name: tensor for name, tensor in parameters.items() if not tensor.requires_grad}
        self._hashes = {"base_sha256": weights_sha256(trained), "frozen_sha256": sampled_sha256(frozen)}
        self._evaluations: dict[tuple[int, str], dict[str, float]] = {}
        for event in self.found.events if self.found else ():
            if event["event"] == "evaluation":
                self._evaluations[event["step"], event["prefix"]] = event["metrics"]

    @property
    def num_steps(self) -> int:
        """Steps that need no forward passes any more."""
        return self.found.num_steps if self.found else 0

    def begin(self, step: int) -> None:
        """Check, before the first step of the loop, that the journal is this run's; or begin a new one.

        Args:
            step: How many steps the weights have taken: those of the checkpoint that was loaded.

        Raises:
            UsageError: If the journal is that of other settings, data or weights.
        """
        if self._taken > step:
            raise RunError(
                f"The batch no longer fits in memory after {self._taken} steps, and a journal cannot begin again half-"
                "way: give a smaller --per_device_train_batch_size and --overwrite_output_dir true."
            )
        trainer = self._trainer
        header = make_header(
            trainer.bare_optimizer,
            trainer.args.method,
            trainer.args.method_options() | {"lr": trainer.args.learning_rate},
            **self._hashes,
            model=_describe(trainer.bare_model),
            data_order=_data_order(trainer),
        )
        header["options"].pop("weight_decay", None)  # it is the groups' own
        self._taken = step
        if self.found is not None:
            different = [key for key in _IDENTITY if self.found.header[key] != header[key]]
            if different:
                what = _differences(self.found.header, header, different)
                raise UsageError(
                    f"The journal in {self._folder} was written by another run ({what}): "
                    "repeat that run's settings to continue it, or choose another output_dir."
                )
            if self.num_steps > step:
                logger.info(
                    "Continuing: steps %d to %d are taken from the journal, without forward passes.",
                    step + 1,
                    self.num_steps,
                )
            return
        if step > 0:
            raise UsageError(
                f"{self._folder} has no journal of the {step} steps before the checkpoint, so none can go on: resume "
                "with save_strategy 'no', or in the folder of the run that wrote the checkpoint."
            )
        if trainer.args.should_save:
            if hasattr(trainer.bare_model, "peft_config"):
                # A new adapter is random: without these few bytes nobody could replay the run.
                with whole_folder(self._folder / BASE_ADAPTER) as scratch:
                    trainer.bare_model.save_pretrained(scratch)
            self._writer = JournalWriter.create(self.path, header)

    def step(self, optimizer: ZerothOrderOptimizer, closure: Closure) -> float:
        """Take the coming step: from the journal if it is there, else by evaluating the closure and recording it.

        Returns:
            The step's loss.

        Raises:
            RunError: If something else changed the weights, or the learning rate is not the recorded one.
        """
        if optimizer.changed_by_others:
            raise RunError(
                "Something other than the optimizer changed the weights between two steps, which no journal can "
                "replay: leave them alone (or put back their values through the optimizer), or set save_strategy 'no'."
            )
        number = optimizer.step_count
        self.replaying = number < self.num_steps
        if self.replaying:
            assert self.found is not None
            record = self.found.steps[number]
            rates = {group["lr"] for group in optimizer.param_groups}
            if rates != set(record.learning_rates):
                raise UsageError(
                    f"Step {number + 1} had learning rate {max(record.learning_rates):g} and would now have "
                    f"{max(rates):g}: the rate, its schedule or the run's length changed; repeat the run's settings."
                )
            loss = replay_step(optimizer, record.losses, visits_points=self.found.header["visits_points"])
        else:
            visited = optimizer.points_visited
            loss = optimizer.step(closure)
            if optimizer.repeats_moves and (optimizer.points_visited > visited) != optimizer.visits_points:
                raise RunError(
                    f"{type(optimizer.evaluator).__name__} does not say whether it moves the weights, and a replay "
                    "must do the same to round the same: set its attribute visits_points."
                )
            self._append(record_of(optimizer))
        self._taken = optimizer.step_count
        return loss

    def evaluation(self, step: int, prefix: str) -> dict[str, float] | None:
        """Return the metrics of an evaluation that the journal holds; None if it has to be done."""
        found = self._evaluations.get((step, prefix))
        return dict(found) if found is not None and step <= self.num_steps else None

    def add_evaluation(self, step: int, prefix: str, metrics: Mapping[str, float]) -> None:
        """Record an evaluation of the weights after the last step."""
        if step >= self.num_steps:
            numbers = {key: float(value) for key, value in metrics.items()}
            self._append(Event({"event": "evaluation", "step": step, "prefix": prefix, "metrics": numbers}))

    def end(self, optimizer: ZerothOrderOptimizer) -> None:
        """Record the hash of the weights the loop ended with, or check it if it is recorded already.

        Raises:
            RunError: If a replayed run ended with other weights than the run itself.
        """
        digest, step = weights_sha256(optimizer.named_params), optimizer.step_count
        recorded = [e for e in (self.found.events if self.found else ()) if e["event"] == "end" and e["step"] == step]
        if recorded and recorded[-1]["weights_sha256"] != digest:
            raise RunError(
                f"The replay of {self.path} ended with other weights than the run had at step {step}: the machine, "
                "torch or zokernel has changed since; start anew with --overwrite_output_dir true."
            )
        if not recorded and step >= self.num_steps:
            self._append(Event({"event": "end", "step": step, "weights_sha256": digest}))

    def sync(self) -> None:
        """Force the journal to the disk, before anything counts on it."""
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def rewind(self, step: int) -> None:
        """Give the model the weights of an earlier step, from its base and the journal.

        Raises:
            RunError: If the base cannot be loaded again.
        """
        self.close()
        model = self._trainer.bare_model
        load_base_(model, self._folder)
        replay_(dict(model.named_parameters()), Journal.read(self.path), step=step)

    def _append(self, record: Any) -> None:
        if not self._trainer.args.should_save:
            return
        if self._writer is None:
            assert self.found is not None
            if self.found.torn_bytes:
                logger.info("%s: %d bytes of a torn last record were dropped.", self.path, self.found.torn_bytes)
            self._writer = JournalWriter.append_to(self.found)
        self._writer.append(record)


def _describe(model: nn.Module) -> dict[str, Any]:
    adapter = hasattr(model, "peft_config")
    bare: Any = model.get_base_model() if adapter else model  # type: ignore[operator]
    return {
        "class": type(bare).__name__,
        "dtype": str(next(bare.parameters()).dtype).removeprefix("torch."),
        "adapter": adapter,
        "name_or_path": getattr(bare, "name_or_path", ""),
    }


def _data_order(trainer: ZOTrainer) -> dict[str, Any]:
    """Return what decides which examples each step sees."""
    args = trainer.args
    examples = getattr(trainer.train_dataset, "examples", None)
    digest = hashlib.sha256()
    for example in examples or ():
        digest.update(repr(example).encode())
    return {
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.data_ranks,
        "sampling": str(args.train_sampling_strategy),
        "sampler": ORDER_VERSION,
        "drop_last": args.dataloader_drop_last,
        "examples": digest.hexdigest() if examples is not None else _length(trainer.train_dataset),
    }


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], keys: list[str]) -> str:
    """Name what differs in words: the settings inside dictionaries, and hashes by what they are hashes of."""
    words = {"base_sha256": "base weights", "frozen_sha256": "frozen weights", "groups": "parameter groups"}
    found = []
    for key in keys:
        if isinstance(old[key], dict) and key != "parameters":
            inner = sorted(k for k in old[key].keys() | new[key].keys() if old[key].get(k) != new[key].get(k))
            found += [f"{k}: {old[key].get(k)} there, {new[key].get(k)} here" for k in inner if k != "examples"]
            found += ["other training examples"] if "examples" in inner else []
        elif key in ("method",):
            found.append(f"method: {old[key]} there, {new[key]} here")
        else:
            found.append(f"other {words.get(key, key)}")
    return "; ".join(found)
