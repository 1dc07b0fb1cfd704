"""A journal of losses that an optimizer is told: after a restart it asks only for those that are missing.

A complete step is a record like any other.  Losses of a step that is not complete are events, which count until that
step's record follows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zokernel.errors import RunError, UsageError
from zokernel.journal.format import Event, Step
from zokernel.journal.reader import Journal
from zokernel.journal.replay import record_of, replay_steps
from zokernel.journal.writer import JournalWriter
from zokernel.optim.ask_tell import Losses, Point
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.readable import plural

PARTIAL_STEP = "told"
"""Name of the event that holds some losses of a step that is not complete."""


class ToldJournal:
    """An optimizer's journal that is written as losses are told, or continued.

    If the file exists, the optimizer is brought to where it ends: all complete steps are replayed, and the losses of
    the step after them are told.

    Args:
        path: The journal's file, conventionally ``journal.zkj``.
        optimizer: A new optimizer, on the base weights.
        header: What :func:`~zokernel.journal.make_header` returns for it.

    Raises:
        UsageError: If the optimizer has taken steps already.
        RunError: If the file is the journal of another run, or is damaged.

    Example:
        >>> import tempfile, torch
        >>> from zokernel.journal import make_header, weights_sha256
        >>> from zokernel.optim import MeZO
        >>> path = Path(tempfile.mkdtemp()) / "journal.zkj"
        >>> def start():
        ...     weights, options = {"w": torch.ones(3)}, {"num_perturbations": 2}
        ...     base = weights_sha256(weights)
        ...     optimizer = MeZO(weights.items(), lr=0.1, **options)
        ...     header = make_header(optimizer, "mezo", options, base_sha256=base)
        ...     return optimizer, ToldJournal(path, optimizer, header)
        >>> optimizer, journal = start()
        >>> journal.tell({point: 0.5 for point in optimizer.ask()[:3]})  # and here the process is killed
        >>> again, journal = start()
        >>> again.ask()
        [Point(step=0, index=3)]
        >>> journal.tell({(0, 3): 0.25}), again.step_count
        (0.4375, 1)
    """

    def __init__(self, path: str | Path, optimizer: ZerothOrder, header: Mapping[str, Any]):
        if optimizer.step_count:
            raise UsageError(
                f"The optimizer has taken {plural(optimizer.step_count, 'step')}: pass a new one on the base weights."
            )
        self.path, self.optimizer = Path(path), optimizer
        if not self.path.exists():
            self._writer = JournalWriter.create(self.path, dict(header))
            return
        journal = Journal.read(self.path)
        expected = json.loads(json.dumps(dict(header)))
        compared = expected.keys() - {"zokernel", "torch"}
        different = [key for key in expected if key in compared and journal.header.get(key) != expected[key]]
        if different:
            raise RunError(
                f"The journal {self.path} belongs to another run, with different {' and '.join(different)}: choose "
                "another file."
            )
        replay_steps(optimizer, journal.steps)
        self._writer = JournalWriter.append_to(journal)
        optimizer.tell(losses_of_open_step(journal))  # which the file holds already

    def tell(self, losses: Losses) -> float | None:
        """Tell the optimizer losses and write them down; see :meth:`ZerothOrder.tell`.

        Args:
            losses: Loss by point, or pairs of both.

        Returns:
            The mean of the step's losses if the step was taken; None while some are missing.
        """
        earlier = self.optimizer.told
        loss = self.optimizer.tell(losses)
        if loss is not None:
            self._writer.append(record_of(self.optimizer))
        elif new := [[*point, value] for point, value in self.optimizer.told.items() if point not in earlier]:
            self._writer.append(Event({"event": PARTIAL_STEP, "losses": new}))
        return loss

    def close(self) -> None:
        """Force everything to the disk and close the file."""
        self._writer.close()


def losses_of_open_step(journal: Journal) -> dict[Point, float]:
    """Return the losses that were told after the last complete step.

    Args:
        journal: A journal.
    """
    losses: dict[Point, float] = {}
    for record in journal.records:
        if isinstance(record, Step):
            losses = {}
        elif record.content["event"] == PARTIAL_STEP:
            losses |= {Point(step, index): loss for step, index, loss in record.content["losses"]}
    return losses
