"""What is known about a step once it has been taken: the record that logs, warnings and displays are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepRecord:
    """One step of a run.

    Attributes:
        step: Its number, from one.
        loss: Mean of the losses that were taken.
        projected_gradient: Root mean square of the projected gradients; None for first-order methods.
        forwards: Forward passes of this step.
        seconds: Seconds of this step.
        replayed: Whether it was taken from the journal.
        bytes_sent: Bytes that this process has sent so far; None in a run of one process.
        slope: Root mean square of the slopes along the directions, without any factor of the method; None if unknown.
        plain_rate: Rate at which the step is one of plain descent along these slopes; None if it is no such step.
        directions: Directions of the step.
    """

    step: int
    loss: float
    projected_gradient: float | None
    forwards: int
    seconds: float
    replayed: bool = False
    bytes_sent: int | None = None
    slope: float | None = None
    plain_rate: float | None = None
    directions: int = 1


class Consumer(Protocol):
    """Whatever looks at the record of every step."""

    def on_record(self, record: StepRecord) -> None:
        """Look at the record of the step that was just taken."""


def projected_gradient(coefficients: Mapping[int, float]) -> float:
    """Return the root mean square of P projected gradients from coefficients, each of which is one of them over P.

    Example:
        >>> projected_gradient({0: 1.5, 1: -1.5})
        3.0
    """
    values = coefficients.values()
    return math.sqrt(sum(value * value for value in values) * len(values))
