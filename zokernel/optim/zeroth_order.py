r"""The optimizer: a family of directions, an estimator, an update and a way of perturbing, put together.

One step is

.. math:: \theta \leftarrow (1 - \eta\lambda)\, \theta - \eta \sum_p c_p z_p, \qquad z_p = z(seed, step, p)

The estimator names a few points and turns the losses there into the :math:`c_p`; ``perturb`` takes the losses; the
update turns the estimate into a step.  A published method is one choice of the four (see
:mod:`zokernel.optim.published`).  :mod:`zokernel.optim.reference` is the same step as a textbook writes it.

Gradient accumulation needs no support here: a step is made of losses, so a closure that returns the mean loss over
several micro-batches accumulates them exactly, without extra memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from zokernel.directions import Dense, Directions, get_directions
from zokernel.directions.weights.restore import memory_of
from zokernel.errors import LossError, RunError, UsageError
from zokernel.estimators import Estimate, Estimator, TwoPoint
from zokernel.optim.affine_move import AffineMove
from zokernel.optim.ask_tell import AskTell
from zokernel.optim.compose import check_tied, check_together, make_estimator, make_updates
from zokernel.optim.loss_watch import LossWatch
from zokernel.optim.options import ZerothOrderOptions, shared_options
from zokernel.optim.parameters import Origin, Params, check_group, trainable
from zokernel.optim.registry import register
from zokernel.optim.updates.base import Rule, Update
from zokernel.optim.without_gradients import refuse_backward, without_gradients
from zokernel.perturb import Perturb, Recorded, make_perturb
from zokernel.perturb.base import Closure
from zokernel.private_apis import write_count

logger = logging.getLogger(__name__)


@register("zeroth_order")
class ZerothOrder(AskTell):
    """Optimizer whose ``step(closure)`` only evaluates the loss, without gradients.

    Args:
        params: A module, an iterable of tensors or of ``(name, tensor)`` pairs, or parameter groups of either.
            Directions are keyed by the parameter's name, or by its position when it has none.
        lr: Learning rate (step size of the gradient estimate).
        directions: Family of random directions, or its text such as ``low_rank(2)``; dense Rademacher directions when
            not given.
        estimator: Turns losses into projected gradients, or its text such as ``one_sided(1e-3, 8)``;
            ``TwoPoint()`` when not given.
        update: One part of an update or several (see :mod:`zokernel.optim.updates`), or their text such as
            ``normalized(0.9) + adam``; a plain step when not given.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Attributes:
        perturb: How the losses are taken; assign another to change it between steps.
        num_forwards: Losses that its steps were made of: evaluated, replayed or told.
        last_estimate: Coefficients and losses of the last step.

    Raises:
        UsageError: If there is nothing to train, settings are out of range or do not go together.

    Example:
        >>> from zokernel.directions import LowRank
        >>> from zokernel.estimators import OneSided
        >>> from zokernel.optim.updates import Adam
        >>> layer, inputs = torch.nn.Linear(4, 3), torch.ones(2, 4)
        >>> optimizer = ZerothOrder(
        ...     layer, lr=0.02, directions=LowRank(2), estimator=OneSided(1e-3, 8), update=Adam())
        >>> losses = [optimizer.step(lambda: layer(inputs).square().mean()) for _ in range(100)]
        >>> losses[-1] < 0.1 * losses[0]
        True
    """

    first_order: ClassVar[bool] = False
    by_example: ClassVar[bool] = False  # whether it needs the loss of every example
    memory_copies: ClassVar[float] = 0.0  # fp32 copies of the trained parameters that the method always keeps
    watches_loss = True  # warn of losses that cannot be compared; a trainer that checks this itself sets it False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        directions: Directions | str | None = None,
        estimator: Estimator | str | None = None,
        update: Update | Sequence[Update] | str | None = None,
        **options: Unpack[ZerothOrderOptions],
    ):
        perturb, self.seed, weight_decay = shared_options(options, type(self))
        check_group({"lr": lr, "weight_decay": weight_decay})
        self.updates = make_updates(update)
        self._transforms = [part for part in self.updates if type(part).transform is not Update.transform]
        self._followers = [part for part in self.updates if type(part).after_move is not Update.after_move]
        defaults = {"lr": lr, "weight_decay": weight_decay, **self.rule.group_defaults()}
        self.named_params: dict[str, Tensor] = {}
        self.active, self._trainable = self.named_params, set()
        torch.optim.Optimizer.__init__(self, trainable(params), defaults)
        self.directions = get_directions(Dense("rademacher") if directions is None else directions)
        self.estimator = make_estimator(TwoPoint() if estimator is None else estimator)
        self.step_count = self.num_forwards = 0
        self.last_estimate: Estimate | None = None
        self.last_factor = math.nan if any(part.normalizes for part in self.updates) else 1.0
        self._record: list[float] = []
        self._versions: list[tuple[Any, bool]] = []
        self._perturb, self._watch, self._origin = perturb, LossWatch(params), Origin(params)
        self._name_parameters()
        self._choose_active()
        self.directions.prepare(self.named_params)
        self._check_parts()
        self._attach()
        for part in self.updates:
            part.attach(self)

    @property
    def changed_by_others(self) -> bool:
        """Whether anything but this optimizer has written to the weights, or replaced them, since its last step."""
        return [written for written, _ in self._versions_now()] != [written for written, _ in self._versions]

    def _versions_now(self) -> list[tuple[Any, bool]]:  # writes to each parameter, and whether it requires gradients
        location = memory_of if self.perturb.weights.stay else (lambda p: None)
        return [((write_count(p), location(p)), p.requires_grad) for p in self.named_params.values()]

    def _note_versions(self) -> None:
        self._versions = self._versions_now()

    def _check_parts(self) -> None:
        for part in self.updates:
            if part.trained not in (None, self):
                raise UsageError(f"{part!r} serves another optimizer already: make one for each.")
            part.trained = self

    @property
    def rule(self) -> Rule:
        """The part of the update that turns the estimate into a step."""
        return next(part for part in self.updates if isinstance(part, Rule))

    @property
    def perturb(self) -> Perturb:
        """How the losses at perturbed weights are taken, and how the weights are restored."""
        return self._perturb

    @perturb.setter
    def perturb(self, perturb: Perturb | str) -> None:
        previous, self._perturb = self._perturb, make_perturb(perturb)
        previous.release()
        try:
            self._attach()
        except BaseException:
            self._perturb = previous
            self._attach()
            raise

    def _attach(self) -> None:
        """Take the weights as they are for the unperturbed ones: at the start, and when someone else changed them."""
        self._check_density()
        check_together(self.estimator, self.perturb)
        check_tied(self.tied_names(), self.perturb)
        self.perturb.attach(self.active, self.directions, seed=self.seed, reach=self.estimator.reach)
        self._named_groups = self.moving_groups()  # the same dictionaries, found by name once
        self._note_versions()

    @property
    def moves_along_directions(self) -> bool:
        """Whether every step is scalars times directions of that step."""
        dense = any(map(self._is_dense, self.param_groups))
        return not dense and all(part.keeps_to_directions for part in self.updates)

    def _is_dense(self, group: Mapping[str, Any]) -> bool:
        """Return whether a group's step is more than scalars times directions."""
        setting = self.rule.dense_where
        return setting is None or group[setting] > 0

    @property
    def forwards_per_step(self) -> int:
        """How many times the coming step calls the closure."""
        return self.estimator.forwards_at(self.step_count)

    def effective_lr(self) -> float:
        r"""Return the learning rate at which plain SGD on the exact gradient moves as far on average.

        A method with :math:`E[\hat g] = C\,\nabla L` at learning rate :math:`\eta` moves, on average, as one with an
        unbiased estimator does at :math:`C \eta`, so methods are compared at equal effective rates.  Rules that
        normalise the gradient (sign, Adam) return the learning rate itself.  With several parameter groups this is the
        first one's.
        """
        gain = self.estimator.gain_at(self.step_count, self.last_estimate) * self.directions.gain() * self.last_factor
        return self.rule.effective_lr(self.param_groups[0], gain)

    @without_gradients
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Returns the loss (a scalar) on one fixed batch.  It is called ``forwards_per_step`` times under
                ``no_grad`` with perturbed weights, so it must not draw a new batch and the model must be deterministic
                (``model.eval()``).  A warning says so once; the first step may take one loss again to see.  It must not
                call ``backward``: no gradient is needed.

        Returns:
            Mean of the losses evaluated.

        Raises:
            UsageError: If there is no closure, or it calls ``backward``.
            LossError: If a loss is NaN or infinite; the weights are those before the step.
        """
        if closure is None:
            raise UsageError(
                f"{type(self).__name__}.step needs a closure that returns the loss: step(lambda: loss(...))."
            )
        return self._step(self.perturb, closure)

    @without_gradients
    def replay(self, record: Sequence[float], *, frozen: Collection[str] | None = None) -> float:
        """Repeat the step that recorded numbers led to: the same update, state and bits, without a forward pass.

        Args:
            record: What :meth:`record` returned after the step.  The optimizer must be where that step began, with its
                learning rates.
            frozen: Names of the parameters that the step left alone; those without ``requires_grad`` when not given.

        Returns:
            The step's loss.

        Raises:
            RunError: If the record does not fit the method's settings.

        Example:
            >>> def start():
            ...     weight = torch.nn.Parameter(torch.ones(3))
            ...     return weight, ZerothOrder([weight], lr=0.05)
            >>> weight, optimizer = start()
            >>> loss = optimizer.step(lambda: weight.square().sum())
            >>> again, replayed = start()
            >>> replayed.replay(optimizer.record()) == loss and torch.equal(weight, again)
            True
        """
        self._frozen_in_step = frozen
        try:
            self._refresh_base()
            return self._step(Recorded(self.perturb, record), lambda: math.nan)
        finally:
            self._frozen_in_step = None

    def _step(self, perturb: Perturb, closure: Closure) -> float:
        if not self.moves_along_directions:  # a schedule may have given a group momentum
            self._check_density()
        if self._versions != self._versions_now():
            self._refresh_base()
        try:
            points = self.estimator.points(seed=self.seed, step=self.step_count)
            take = self._watch.around(perturb, self.active) if self.watches_loss else perturb.losses
            with refuse_backward(self.active):
                numbers = take(closure, points, step=self.step_count)
            self._check_numbers(numbers, len(points))
            estimate = self.estimator.combine(numbers, seed=self.seed, step=self.step_count)
            transformed = estimate
            for part in self._transforms:
                transformed = part.transform(transformed, self)
        except BaseException:
            self.perturb.weights.restore()
            self._note_versions()
            raise
        self._record, self.last_estimate, self.last_factor = numbers, estimate, transformed.factor
        self.update(transformed)
        if not self.moves_along_directions:
            self.perturb.weights.resync()
        self._note_versions()
        self.step_count += 1
        return sum(estimate.losses) / len(estimate.losses)

    def _check_numbers(self, numbers: Sequence[float], num_points: int) -> None:
        expected = num_points * (self.estimator.numbers_per_point or max(1, len(numbers) // num_points))
        if len(numbers) != expected:
            raise RunError(
                f"Step {self.step_count + 1} needs {expected} losses and the journal holds {len(numbers)}: "
                "it was written with other settings."
            )
        self.num_forwards += num_points
        not_finite = [number for number in numbers if not math.isfinite(number)]
        if not_finite:
            raise LossError(
                f"The loss is {not_finite[0]} at step {self.step_count + 1}: the weights were put back to before this "
                "step; lower the learning rate or eps, or train in fp32."
            )
        if self.step_count == 0 and len(set(numbers)) == 1 < len(numbers):
            logger.warning(
                "All %d losses of the first step are equal (%g), so the step has no direction: eps may be below the "
                "loss's rounding, all answers may have the same reward, or the closure may not see the weights being "
                "perturbed.",
                len(numbers),
                numbers[0],
            )

    def record(self) -> list[float]:
        """Return the numbers from which the last step can be repeated: the losses at its points.

        Raises:
            UsageError: If there was no step.
        """
        if self.last_estimate is None:
            raise UsageError("There is no step to record yet: call step(closure) first.")
        return self._record

    def update(self, estimate: Estimate) -> None:
        """Restore the weights and step along the estimate, after decoupled weight decay."""
        dense = [self._is_dense(group) for group in self.param_groups]
        scaled = {index: c * estimate.factor for index, c in estimate.coefficients.items()}
        scales = [
            {} if is_dense else {i: -group["lr"] * c for i, c in scaled.items()}
            for group, is_dense in zip(self.param_groups, dense)
        ]
        moves: Sequence[AffineMove] = self.move(scales)
        dense_groups = (named for named, is_dense in zip(self._named_groups, dense) if is_dense)
        rates = {name: -group["lr"] for group, names in dense_groups for name in names}
        for batch in self.batches(list(rates)) if rates else ():
            step, divisor = self.rule.step(self, batch, estimate)
            changes = {name: change for name, change in step.items() if name in rates}
            by_name = divisor if isinstance(divisor, dict) else dict.fromkeys(changes, divisor)
            self.add(changes, {name: rates[name] / by_name[name] for name in changes})
        for part in self._followers:
            moves = part.after_move(self, estimate, moves)

    def move(self, scales: Sequence[Mapping[int, float]]) -> list[AffineMove]:
        r"""Restore the weights and move them, :math:`\theta \leftarrow (1-\eta\lambda)\theta + \sum_i scale_i z_i`.

        Args:
            scales: For every parameter group, the factor on each direction of this step by index.

        Returns:
            What was done to each parameter group.
        """
        moves: list[AffineMove] = []
        update: dict[str, Mapping[int, float]] = {}
        decay: dict[str, float] = {}
        for (group, names), by_index in zip(self._named_groups, scales):
            factor = 1 - group["lr"] * group["weight_decay"]
            moves.append(AffineMove(self.step_count, dict(by_index), factor, frozen=self.frozen))
            # One object per group: what tensors share is then looked at once.
            update |= dict.fromkeys(names, by_index)
            decay |= dict.fromkeys(names, factor)
        self.perturb.weights.commit(self.step_count, update, decay)
        return moves
