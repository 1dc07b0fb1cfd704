"""The journal of a training run: written while it trains, replayed when it continues.

A run with a journal is resumed by running its loop again: data order, schedule, callbacks, logs and random state come
out as they did, because it is the same loop.  Only what costs forward passes is taken from the journal: the losses of
each step and the results of each evaluation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zokernel.errors import RunError, UsageError
from zokernel.finetune.storage.checkpoint import checkpoints, remove_folder, whole_folder
from zokernel.finetune.storage.journal_header import check_same_run, describe_model, weight_hashes
from zokernel.finetune.storage.replay import BASE_ADAPTER, restore_base_
from zokernel.journal import Event, Journal, JournalWriter, make_header, replay_, weights_sha256
from zokernel.journal.reader import FILE_NAME
from zokernel.journal.replay import record_of
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.perturb.base import Closure
from zokernel.readable import plural

logger = logging.getLogger(__name__)


class RunJournal:
    """Records a run, and replays what an earlier process of the same run recorded.

    Args:
        folder: The output folder.
        model: The model, which holds the base weights.
        continues: Whether to go on with the journal that is in the folder.
        overwrite: Whether a journal that is not continued may be replaced.
        writes: Whether this process writes the journal.

    Attributes:
        previous: The journal that is continued, if any.
        replaying: Whether the last step was taken from it.

    Raises:
        UsageError: If a journal is there that is not to be continued or overwritten.
        RunError: If it is damaged.
    """

    def __init__(self, folder: Path, model: Any, *, continues: bool, overwrite: bool, writes: bool):
        self._folder, self._model, self._writes = folder, model, writes
        self.path = folder / FILE_NAME
        self.previous: Journal | None = None
        self.replaying = False
        self._writer: JournalWriter | None = None
        self._steps_taken = 0
        if self.path.exists() and continues:
            self.previous = read_journal(self.path)
        elif self.path.exists() and not overwrite:
            raise UsageError(
                f"{folder} holds the journal of an earlier run: call trainer.train(resume_from_checkpoint=True) to "
                "continue it, set trainer.args.overwrite_output_dir = True before trainer.train() to replace it by a "
                "run from the model's present weights, or make a trainer with another output_dir to keep both."
            )
        self._hashes = weight_hashes(model)
        self._unrecorded: set[str] = set()
        self._evaluations: dict[tuple[int, str], dict[str, Any]] = {}
        for event in self.previous.events if self.previous else ():
            if event["event"] == "evaluation":
                self._evaluations[event["step"], event["prefix"]] = event["metrics"]

    @property
    def num_steps(self) -> int:
        """Steps that need no forward passes any more."""
        return self.previous.num_steps if self.previous else 0

    def restore_base(self) -> None:
        """Give the model the weights that the journal begins with, which an earlier run of this process moved.

        Raises:
            RunError: If they cannot be loaded again.
        """
        restore_base_(self._model, self._folder)
        self._hashes = weight_hashes(self._model)

    def begin(
        self,
        step: int,
        optimizer: ZerothOrder,
        *,
        method: str,
        options: Mapping[str, Any],
        data_order: Mapping[str, Any],
    ) -> None:
        """Check, before the first step of the loop, that the journal is this run's; or begin a new one.

        Args:
            step: How many steps the weights have taken: those of the checkpoint that was loaded.
            optimizer: The optimizer of the run.
            method: Its name.
            options: The keyword arguments it was made with.
            data_order: What decides which examples each step sees: see
                :func:`~zokernel.finetune.storage.journal_header.data_order`.

        Raises:
            UsageError: If the journal is that of other settings, data or weights.
        """
        if self._steps_taken > step:
            raise RunError(
                f"The batch no longer fits in memory after {plural(self._steps_taken, 'step')}, and a journal cannot "
                "begin again half-way: give a smaller per_device_train_batch_size and overwrite_output_dir=True."
            )
        header = make_header(
            optimizer,
            method,
            # Weight decay is the groups' own.
            {name: value for name, value in options.items() if name != "weight_decay"},
            **self._hashes,
            model=describe_model(self._model),
            data_order=dict(data_order),
        )
        self._steps_taken = step
        if self.previous is not None:
            check_same_run(self._folder, self.previous.header, header, loaded=step > 0)
            if self.num_steps > step:
                logger.info(
                    "Continuing: %s taken from the journal, without forward passes.",
                    f"step {self.num_steps} is"
                    if self.num_steps == step + 1
                    else f"steps {step + 1} to {self.num_steps} are",
                )
            return
        if step > 0:
            raise UsageError(
                f"{self._folder} has no journal of the {plural(step, 'step')} before the checkpoint, so none can go "
                "on: resume with save_strategy 'no', or in the folder of the run that wrote the checkpoint."
            )
        if self._writes:
            self._create(header)

    def _create(self, header: dict[str, Any]) -> None:
        """Begin a new journal, in place of an earlier run's if there is one."""
        for checkpoint in checkpoints(self._folder) if self.path.exists() else ():
            remove_folder(checkpoint)  # of the run that is overwritten, which nobody may continue from
        if hasattr(self._model, "peft_config"):
            # A new adapter is random: without these few bytes nobody could replay the run.
            with whole_folder(self._folder / BASE_ADAPTER) as scratch:
                self._model.save_pretrained(scratch)
        self._writer = JournalWriter.create(self.path, header)

    def step(self, optimizer: ZerothOrder, closure: Closure) -> float:
        """Take the coming step: from the journal if it is there, else by evaluating the closure and recording it.

        Returns:
            The step's loss.

        Raises:
            RunError: If something else changed the weights, or the learning rate is not the recorded one.
        """
        if optimizer.changed_by_others:
            raise RunError(
                "Something other than the optimizer changed the weights between two steps, which no journal can "
                "replay: leave them alone (or restore their values through the optimizer), or set save_strategy 'no'."
            )
        number = optimizer.step_count
        self.replaying = number < self.num_steps
        if self.replaying:
            assert self.previous is not None
            record = self.previous.steps[number]
            rates = {group["lr"] for group in optimizer.param_groups}
            if rates != set(record.learning_rates):
                raise UsageError(
                    f"Step {number + 1} had learning rate {max(record.learning_rates):g} and would now have "
                    f"{max(rates):g}: the rate, its schedule or the run's length changed; repeat the run's settings."
                )
            loss = optimizer.replay(record.losses)
        else:
            loss = optimizer.step(closure)
            self._append(record_of(optimizer))
        self._steps_taken = optimizer.step_count
        return loss

    def evaluation(self, step: int, prefix: str) -> dict[str, Any] | None:
        """Return the metrics of an evaluation that the journal holds; None if it has to be done."""
        metrics = self._evaluations.get((step, prefix))
        return dict(metrics) if metrics is not None and step <= self.num_steps else None

    def add_evaluation(self, step: int, prefix: str, metrics: Mapping[str, Any]) -> None:
        """Record an evaluation of the weights after the last step, but for metrics that JSON cannot hold."""
        if step < self.num_steps:
            return
        values = _as_json(metrics)
        if names := metrics.keys() - values.keys() - self._unrecorded:
            self._unrecorded |= names
            logger.warning("%s: not in the journal, which holds numbers, texts and lists.", ", ".join(sorted(names)))
        self._append(Event({"event": "evaluation", "step": step, "prefix": prefix, "metrics": values}))

    def end(self, optimizer: ZerothOrder) -> None:
        """Record the hash of the weights the loop ended with, or check it if it is recorded already.

        Raises:
            RunError: If a replayed run ended with other weights than the run itself.
        """
        optimizer.perturb.weights.restore()  # weights in files may have updates to make
        digest, step = weights_sha256(optimizer.named_params), optimizer.step_count
        recorded = [
            e for e in (self.previous.events if self.previous else ()) if e["event"] == "end" and e["step"] == step
        ]
        if recorded and recorded[-1]["weights_sha256"] != digest:
            raise RunError(
                f"The replay of {self.path} ended with other weights than the run had at step {step}: the machine, "
                "torch or zokernel has changed since; start over with overwrite_output_dir=True."
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

    def replay_to(self, step: int) -> None:
        """Give the model the weights of an earlier step, from its base and the journal.

        Raises:
            RunError: If the base cannot be loaded again.
        """
        self.close()
        restore_base_(self._model, self._folder)
        replay_(dict(self._model.named_parameters()), Journal.read(self.path), step=step)

    def _append(self, record: Any) -> None:
        if not self._writes:
            return
        if self._writer is None:
            assert self.previous is not None
            if self.previous.torn_bytes:
                logger.info("%s: %d bytes of a torn last record were dropped.", self.path, self.previous.torn_bytes)
            self._writer = JournalWriter.append_to(self.previous)
        self._writer.append(record)


def read_journal(path: Path) -> Journal:
    """Return the journal of a run that is continued.

    Raises:
        RunError: If it is damaged.
    """
    try:
        return Journal.read(path)
    except RunError as error:
        raise RunError(f"{error} Otherwise, start over with overwrite_output_dir=True.") from error


def _as_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON can hold of metrics; numbers of numpy and torch are floats."""
    values = {}
    for name, value in metrics.items():
        try:
            values[name] = json.loads(json.dumps(value, default=float))
        except (TypeError, ValueError, RuntimeError):
            continue
    return values
