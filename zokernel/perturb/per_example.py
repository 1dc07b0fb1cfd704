r"""Every example's loss at perturbed weights of its own, in one forward over the batch.

Row i of the batch passes through :math:`\theta + \Delta_i`, with a change of its own in every layer; see
:mod:`zokernel.perturb.stacked` for how a layer does that.  A step takes as many forwards of the batch as an estimator
of a single loss takes losses, and keeps no more rows in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zokernel.directions import Directions
from zokernel.errors import UsageError
from zokernel.estimators.base import Offsets
from zokernel.estimators.per_example import offsets_of
from zokernel.perturb.base import Closure, Perturb
from zokernel.perturb.changes import stack
from zokernel.perturb.in_place import IN_PLACE
from zokernel.perturb.stacked import RowsError, StackedParameters


@dataclass(frozen=True)
class Examples:
    """A micro-batch whose examples have losses of their own.

    Attributes:
        count: How many examples it holds, B.
        losses: Returns their losses, (B,), at the weights as they are.
        rows: The example that each row of the batch belongs to, in their order; equally many rows of each, one after
            the other, when not given.
    """

    count: int
    losses: Closure
    rows: Sequence[int] | None = None


class PerExampleRows(Perturb):
    r"""Take the losses of all examples of a batch, each at weights perturbed along directions of its own.

    The closure returns the loss of every example, (B,), as with ``reduction="none"``; all that the model computes for
    an example must be in the rows of that example.  One number is the loss of one example, which a warning says.

    Args:
        batches: Returns the micro-batches of the step.  Without it, the batch is what the closure of the step
            evaluates; the number of its examples is seen from one more forward when it changes.
        max_bytes: Bound on the perturbed copies of one forward.

    Attributes:
        first: Number of the first example in the whole batch, of which other processes may have the examples before it.

    Raises:
        UsageError: When losses are taken, if there is not one loss per example, the trained tensors do not fit, or a
            layer uses one in an unknown way.

    Example:
        >>> import torch, zokernel
        >>> from zokernel.estimators import PerExample, TwoPoint
        >>> layer, inputs = torch.nn.Linear(3, 1), torch.randn(4, 3)
        >>> optimizer = zokernel.optim.ZerothOrder(
        ...     layer, lr=0.01, estimator=PerExample(TwoPoint()), perturb=PerExampleRows())
        >>> loss = optimizer.step(lambda: layer(inputs).square().mean(1))
        >>> len(optimizer.last_estimate.coefficients)
        4
    """

    name = "per_example"

    def __init__(self, batches: Callable[[], Sequence[Examples]] | None = None, *, max_bytes: int = 1 << 30):
        self.batches, self.max_bytes = batches, max_bytes
        self._buffers: dict[str, Tensor] = {}
        self._examples, self._warned = 1, batches is not None
        self.first = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_buffers": {}}

    def attach(
        self, parameters: Mapping[str, Tensor], directions: Directions, *, seed: int, reach: float = 0.01
    ) -> None:
        """Take these weights, as they are, for the unperturbed ones; see :meth:`Perturb.attach`."""
        if directions.couples_tensors:
            raise UsageError(f"{directions!r} couples the tensors, which examples cannot do each for itself.")
        super().attach(parameters, directions, seed=seed, reach=reach)

    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Return the losses of all examples at the first point, then those at the second, and so on."""
        if self.batches is not None:
            by_point = self._losses(self.batches(), points, step)
        else:
            by_point = self._losses_of(closure, points, step)
        return [loss for at_point in by_point for loss in at_point]

    def num_examples(self) -> int:
        """Return how many examples the coming step has.

        Raises:
            UsageError: If that is not known before.
        """
        if self.batches is None:
            raise UsageError(
                "Processes number the examples of a step together: give PerExampleRows the micro-batches, "
                "PerExampleRows(lambda: [Examples(count, losses)])."
            )
        return sum(batch.count for batch in self.batches())

    def _losses(self, batches: Sequence[Examples], points: Sequence[Offsets], step: int) -> list[list[float]]:
        by_point: list[list[float]] = [[] for _ in points]
        begin = self.first
        for batch in batches:
            for at_point, point in zip(by_point, points, strict=True):
                at_point += self._point_losses(batch, point, begin, step)
            begin += batch.count
        return by_point

    def _losses_of(self, closure: Closure, points: Sequence[Offsets], step: int) -> list[list[float]]:
        """Return the losses of one batch, of as many examples as the last unless it turns out to have others."""
        try:
            return self._losses([Examples(self._examples, closure)], points, step)
        except RowsError as error:
            self._examples = error.examples or len(example_losses(closure()))
        return self._losses([Examples(self._examples, closure)], points, step)

    def _point_losses(self, batch: Examples, point: Offsets, begin: int, step: int) -> list[float]:
        """Return the losses of a micro-batch, whose first example is number ``begin`` of the step."""
        parameters, weights = self.weights.tensors, self.weights
        if point:
            rows = range(batch.count) if batch.rows is None else batch.rows
            row_offsets = [offsets_of(point, begin + row) for row in rows]
            changes = stack(
                parameters, weights.directions, row_offsets, self.max_bytes, self._buffers, seed=weights.seed, step=step
            )
            with StackedParameters(parameters.values(), changes, len(row_offsets)):
                losses = example_losses(batch.losses())
        else:
            losses = example_losses(batch.losses())
        if len(losses) != batch.count:
            raise RowsError(f"The closure returned {len(losses)} losses for {batch.count} examples.", len(losses))
        if len(losses) == 1 and not self._warned:
            warnings.warn(
                "The closure returns one loss, so the batch counts as one example with one direction: return the loss "
                'of every example, (B,), as reduction="none" gives them.',
                UserWarning,
                stacklevel=8,
            )
            self._warned = True
        values: list[float] = losses.tolist()
        return values


def per_example_perturb(perturb: str | Perturb, method: str) -> Perturb:
    """Return the way of perturbing of a method whose examples see weights of their own.

    Args:
        perturb: What the user requested.  The weights stay, so every way of restoring them comes to the same, and
            ``in_place`` is what generic code passes.
        method: The method's name, for the message.

    Raises:
        UsageError: If another way was requested.

    Example:
        >>> per_example_perturb("in_place", "grzo").name
        'per_example'
    """
    name = perturb.name if isinstance(perturb, Perturb) else perturb
    if isinstance(perturb, Perturb) and name == "per_example":
        return perturb
    if name not in ("per_example", *IN_PLACE):
        raise UsageError(f"Every example sees weights of its own with {method}: leave out perturb.")
    return PerExampleRows()


def example_losses(loss: Tensor | float) -> Tensor:
    """Return the losses of a batch's examples, (B,), as a closure returned them; one number is that of one example.

    Raises:
        UsageError: If it returned anything else.
    """
    losses = torch.as_tensor(loss).detach()
    if losses.ndim > 1:
        raise UsageError(
            f"Directions per example need the loss of every example, (B,), and the closure returned "
            f"{tuple(losses.shape)}: take the mean over everything but the examples."
        )
    return losses.view(-1)
