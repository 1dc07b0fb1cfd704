r"""Ask and tell: the losses of a step are taken anywhere, in any order, and handed back.

A step asks for the losses at a few points :math:`\theta + \sum_i offsets_i z_i`.  A point is a function of the seed,
the step and its place among the step's points, so two integers name it.  Whoever has the weights before the step (a
copy, or the base and the journal) can make the weights at the point and take the loss there: another process, another
machine, or an engine that has no gradients.  Once all losses of the step are told, the step is the one that
:meth:`zokernel.optim.ZerothOrder.replay` makes of them.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zokernel.errors import LossError, UsageError
from zokernel.estimators import Estimator
from zokernel.optim.checkpointed import Checkpointed
from zokernel.perturb.in_place import loss_value
from zokernel.private_apis import note_step

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """Where a loss is wanted; JSON keeps it as a list of two integers.

    Attributes:
        step: Step of the run, from zero.
        index: Place among the points of that step.

    Example:
        >>> import json
        >>> Point(*json.loads(json.dumps(Point(3, 1))))
        Point(step=3, index=1)
    """

    step: int
    index: int  # type: ignore[assignment]  # tuple.index, which nobody needs of two numbers


Losses = Mapping[Point, Any] | Iterable[tuple[Sequence[int], Any]]
"""Loss by point, or pairs of a point and its loss."""


class AskTell(Checkpointed):
    """The part of an optimizer that takes its losses from anywhere.

    Attributes:
        estimator: Names the points of a step.
    """

    estimator: Estimator
    _told: Mapping[Point, float] = MappingProxyType({})
    _is_at_point = False

    def replay(self, record: Sequence[float], *, frozen: Collection[str] | None = None) -> float:
        """Repeat the step that recorded numbers led to."""
        raise NotImplementedError

    def _versions_now(self) -> list[tuple[Any, bool]]:
        raise NotImplementedError

    @property
    def told(self) -> dict[Point, float]:
        """The losses of the coming step that are known already, by point."""
        self._forget_stale_losses()
        return dict(self._told)

    def ask(self) -> list[Point]:
        """Return the points of the coming step whose losses have not been told.

        Asking changes nothing.  A point whose loss was lost on the way, with the worker that was to take it, is in the
        list again until it is told.

        Raises:
            UsageError: If the method needs more than one loss of each point.

        Example:
            >>> from zokernel.optim import MeZO
            >>> weight = torch.nn.Parameter(torch.ones(3))
            >>> optimizer = MeZO([("w", weight)], lr=0.05)
            >>> for _ in range(200):
            ...     for point in reversed(optimizer.ask()):
            ...         found = optimizer.tell({point: optimizer.weights_at(point)["w"].square().sum()})
            >>> found < 1e-2, optimizer.step_count
            (True, 200)
        """
        self._forget_stale_losses()
        points = [Point(self.step_count, index) for index in range(self._count())]
        return [point for point in points if point not in self._told]

    @torch.no_grad()
    def weights_at(self, point: Sequence[int]) -> dict[str, Tensor]:
        """Return copies of the trained tensors at a point of the coming step; the model's own stay where they are.

        They are what :func:`torch.func.functional_call` takes.  Of a model with an adapter they are the adapter's.
        They have the bits at which :meth:`step` takes its losses if weights are restored exactly (``in_place:copy``,
        ``in_place:grid``, ``in_forward``); those of ``in_place`` carry roundings of the points before.

        Args:
            point: What :meth:`ask` returned, here or in another process.

        Returns:
            Tensors by name, in the parameters' shapes, dtypes and devices.

        Raises:
            UsageError: If the point is not one of the coming step, or the method needs more than losses.
        """
        self._forget_stale_losses()
        self._check(point := _point(point), self._count())
        offsets = self.estimator.points(seed=self.seed, step=point.step)[point.index]
        copies = self.perturb.weights.copies_at(point.step, offsets)
        return self.under_all_names(
            {name: copies[name] if name in copies else p.detach().clone() for name, p in self.named_params.items()}
        )

    @contextmanager
    def at(self, point: Sequence[int]) -> Iterator[None]:
        """Put the weights at a point into the model for the length of a ``with`` block, then restore them exactly.

        Args:
            point: As for :meth:`weights_at`.
        """
        with self._holding(self.weights_at(point)):
            self._is_at_point = True
            try:
                yield
            finally:
                self._is_at_point = False

    def tell(self, losses: Losses) -> float | None:
        """Take losses at points of the coming step; when all are there, take the step.

        They may come in any order and in several calls.  The first loss of a point counts: one that comes again, as
        after a point was asked twice, is dropped, also when its step is over.

        Args:
            losses: Loss by point, or pairs of both: numbers or tensors of one element.

        Returns:
            The mean of the step's losses if the step was taken; None while some are missing.

        Raises:
            UsageError: If a point is none of this step or an earlier one, or a loss is not one number.
            LossError: If a loss is NaN or infinite; nothing of the call is kept.
        """
        self._forget_stale_losses()
        count, told = self._count(), dict(self._told)
        for point, loss in _pairs(losses):
            if point.step < self.step_count or point in told:
                logger.info("The loss at %s is already known; the first one is kept.", point)
                continue
            self._check(point, count)
            told[point] = loss_value(loss)
            if not math.isfinite(told[point]):
                raise LossError(
                    f"The loss at {point} is {told[point]}: no loss of this call was kept; lower the learning rate or "
                    "eps, or evaluate in fp32."
                )
        self._told = told
        if len(told) < count:
            return None
        self._told = {}
        note_step(self)
        return self.replay([told[point] for point in sorted(told)])

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned; losses told before belong to other weights."""
        super().load_extra_state(state)
        self._told = {}

    def _ask_tell_obstacle(self) -> str | None:
        """Return why losses at points are not all that a step takes; None if they are."""
        if self.estimator.numbers_per_point == 1:
            return None
        return f"{type(self.estimator).__name__} takes more than one loss at each point"

    def _count(self) -> int:
        """Return the number of points of the coming step."""
        if reason := self._ask_tell_obstacle():
            raise UsageError(
                f"This {type(self).__name__} has no ask and tell, because {reason}: call step(closure), or use a "
                "method such as mezo."
            )
        return self.estimator.forwards_at(self.step_count)

    def _check(self, point: Point, count: int) -> None:
        if point.step != self.step_count:
            raise UsageError(
                f"{point} is not a point of step {self.step_count}, which comes next here: bring both sides to the "
                "same step, as by replaying the journal."
            )
        if point.index not in range(count):
            raise UsageError(f"{point} is not a point: step {point.step} has {count}, counted from 0.")

    def _forget_stale_losses(self) -> None:
        """Forget told losses of weights that are not those of the coming step."""
        if self._is_at_point:
            raise UsageError("The weights are those of a point: ask and tell after the with block of at(point).")
        changed = self._versions != self._versions_now()
        if changed:
            self._refresh_base()
            self._note_versions()
        if self._told and (changed or next(iter(self._told)).step != self.step_count):
            logger.warning(
                "The weights have changed since losses were told, so all losses of step %d are needed again.",
                self.step_count,
            )
            self._told = {}


def _point(value: Any) -> Point:
    try:
        step, index = map(operator.index, value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{value!r} is not a point: pass what ask() returned, or its two integers.") from error
    return Point(step, index)


def _pairs(losses: Any) -> Iterator[tuple[Point, Any]]:
    for pair in losses.items() if isinstance(losses, Mapping) else losses:
        try:
            point, loss = pair
        except (TypeError, ValueError) as error:
            raise UsageError(f"{pair!r} is not a point with its loss: tell a dictionary of both, or pairs.") from error
        yield _point(point), loss
