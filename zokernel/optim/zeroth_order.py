r"""The base of every zeroth-order optimizer: perturb, evaluate, add scalars times seeded directions.

One step is

.. math:: \theta \leftarrow (1 - \eta\lambda)\, \theta - \eta \sum_p c_p z_p, \qquad z_p = z(seed, step, p)

where an estimator finds the :math:`c_p` from forward passes.  A method is a choice of directions, estimator and update;
this class keeps the books: names of parameters, the step counter, restoring the weights when anything goes wrong.

Gradient accumulation needs no support here: a step is made of losses, so a closure that returns the mean loss over
several micro-batches accumulates them exactly, at no memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from zokernel.directions import Dense, make_restore
from zokernel.directions.base import Directions
from zokernel.directions.families.fixed import Fixed
from zokernel.directions.terms import Factors, Values
from zokernel.errors import LossError, UsageError
from zokernel.estimators.base import Estimate, Estimator, Offsets
from zokernel.optim.averaging.moves import Move
from zokernel.optim.parameters import Params, name_parameters, trainable

logger = logging.getLogger(__name__)

Closure = Callable[[], Tensor | float]
Evaluator = Callable[["ZerothOrderOptimizer", Closure, Sequence[Offsets]], list[float]]
"""(optimizer, closure, points) -> losses, in the order of the points; the weights may be left perturbed."""


def in_turn(optimizer: ZerothOrderOptimizer, closure: Closure, points: Sequence[Offsets]) -> list[float]:
    """Take the losses one after the other, moving the weights from point to point."""
    losses = []
    for offsets in points:
        optimizer.move_to(offsets)
        losses.append(float(closure()))
    return losses


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Optimizer whose ``step(closure)`` only evaluates the loss, without gradients.

    Args:
        params: A module, an iterable of tensors or of ``(name, tensor)`` pairs, or parameter groups of either.
            Directions are keyed by the parameter's name, or by its position when it has none.
        estimator: Turns forward passes into projected gradients.
        directions: Directions of random directions; dense Rademacher directions when not given.
        lr: Learning rate (step size of the gradient estimate).
        weight_decay: Decoupled weight decay: every step multiplies the weights by ``1 - lr * weight_decay``.
        momentum: Heavy-ball momentum on the gradient estimate; needs one fp32 copy of the parameters when not zero.
        seed: Seed of all directions of the run.
        restore: How the weights find back after a perturbation: ``fold`` (the default: up to rounding, as part of the
            update), ``grid`` (exact, no memory, fp32 weights) or ``copy`` (exact, one copy, any dtype).

    Attributes:
        named_params: Every parameter by name.
        step_count: Steps taken.
        num_forwards: Times the closure was called.
        last_estimate: Coefficients and losses of the last step.
        points_visited: Times the weights were moved to a point.
        evaluator: How the losses at a step's points are taken; one after the other by default.
        last_move: What the last step added to the weights, from which it can be replayed; ``None`` for methods whose
            update is more than scalars times directions.
        loop_calls_step: Set by a training loop that takes the step itself and later calls ``step()`` bare.

    Raises:
        UsageError: If there is nothing to train, a setting is out of range, or a weight cannot be perturbed.
    """

    first_order: ClassVar[bool] = False
    memory_copies: ClassVar[float] = 0.0  # fp32 copies of the trained parameters that the method always keeps

    def __init__(
        self,
        params: Params,
        *,
        estimator: Estimator,
        lr: float,
        directions: Directions | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        seed: int = 0,
        restore: str = "fold",
    ):
        if not (math.isfinite(lr) and lr >= 0):
            raise UsageError(f"lr must be a finite number >= 0, not {lr}.")
        if weight_decay < 0:
            raise UsageError(f"weight_decay must be >= 0, not {weight_decay}.")
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum must be in [0, 1), not {momentum}.")
        super().__init__(trainable(params), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.named_params = name_parameters(self.param_groups)
        self.estimator = estimator
        self.directions = directions if directions is not None else Dense("rademacher")
        self.seed = seed
        self.step_count = 0
        self.num_forwards = 0
        self.points_visited = 0
        self.last_estimate: Estimate | None = None
        self.last_move: Move | None = None
        # A training loop that ends each step with a bare step(), as transformers' does, takes the step itself earlier.
        self.loop_calls_step = False
        self.evaluator: Evaluator = in_turn
        self.restore_mode = restore
        if restore == "grid" and not self.is_replayable:
            raise UsageError(
                f"restore='grid' keeps the weights on a grid, but this {type(self).__name__} adds more than scalars "
                "times directions and would leave it: use restore='fold' or 'copy'."
            )
        self._versions: list[int] = []
        self._rebase()

    @property
    def forwards_per_step(self) -> int:
        """How many times the coming step calls the closure."""
        return self.estimator.forwards_at(self.step_count)

    def effective_lr(self) -> float:
        r"""Return the learning rate times the estimator's mean gain, so that methods can be compared fairly.

        A method with :math:`E[\hat g] = C\,\nabla L` at learning rate :math:`\eta` moves, on average, as one with an
        unbiased estimator does at :math:`C \eta` (theory C.2.11).  With momentum :math:`\beta` the mean displacement is
        a further :math:`1/(1-\beta)` larger.  With several parameter groups this is the first one's.
        """
        group = self.param_groups[0]
        return group["lr"] * self.estimator.gain_at(self.step_count) / (1.0 - group["momentum"])

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Returns the loss (a scalar) on one fixed batch.  It is called ``forwards_per_step`` times under
                ``no_grad`` with perturbed weights, so it must not draw a new batch and the model must be deterministic
                (``model.eval()``).

        Returns:
            Mean of the losses evaluated.

        Raises:
            UsageError: If there is no closure.
            RunError: If a loss is NaN or infinite; the weights are back where they were before the step.
        """
        if closure is None:
            if self.loop_calls_step and self.last_estimate is not None:
                return self.last_estimate.loss
            raise UsageError(
                f"{type(self).__name__}.step needs a closure that returns the loss: step(lambda: loss(...))."
            )
        if self.changed_by_others:
            self._rebase()
        self.before_estimate()
        try:
            estimate = self.estimate(closure)
        except BaseException:
            self._restore.restore()
            self.after_estimate()
            raise
        self.last_estimate = estimate
        self.update(estimate)
        if not self.is_replayable:
            self.resync()
        self._versions = [tensor._version for tensor in self.named_params.values()]
        self.step_count += 1
        return estimate.loss

    @property
    def changed_by_others(self) -> bool:
        """Whether anything but this optimizer has written to the weights since its last step."""
        return [tensor._version for tensor in self.named_params.values()] != self._versions

    def record(self) -> list[float]:
        """Return the numbers from which the last step can be repeated: the losses at its points."""
        if self.last_estimate is None:
            raise UsageError("There is no step to record yet: call step(closure) first.")
        return self.last_estimate.losses

    def _rebase(self) -> None:
        """Take the weights as they are for the unperturbed ones: at the start, and when someone else changed them."""
        eps = getattr(self.estimator, "eps", 0.01)
        self._restore = make_restore(self.restore_mode, self.directions, self.named_params, seed=self.seed, reach=eps)
        self._versions = [tensor._version for tensor in self.named_params.values()]

    def resync(self) -> None:
        """Tell the restore mode that the weights, changed by more than moves along directions, are the ones to keep."""
        self._restore.load_state_dict(self._restore.state_dict())

    @property
    def is_replayable(self) -> bool:
        """Whether every step is scalars times seeded directions, so that :attr:`last_move` says all about it."""
        return not any(group["momentum"] > 0 for group in self.param_groups)

    def before_estimate(self) -> None:
        """Prepare the weights or the directions of the coming step; nothing by default."""

    def after_estimate(self) -> None:
        """Undo what :meth:`before_estimate` did to the weights when a step fails; nothing by default."""

    def estimate(self, closure: Closure) -> Estimate:
        """Estimate the gradient at the weights; they may be left perturbed, for :meth:`update` to restore."""
        points = self.estimator.points(seed=self.seed, step=self.step_count)
        losses = [self.checked(loss) for loss in self.evaluator(self, closure, points)]
        if self.step_count == 0 and len(set(losses)) == 1 < len(losses):
            logger.warning(
                "All %d losses of the first step are equal (%g): the closure may not see the weights being perturbed, "
                "or eps is below the loss's rounding.",
                len(losses),
                losses[0],
            )
        return self.estimator.combine(losses, seed=self.seed, step=self.step_count)

    def move_to(self, offsets: Offsets) -> None:
        r"""Make the weights :math:`\theta + \sum_i offsets_i z_i`, with this step's directions."""
        self.points_visited += 1
        self._restore.move_to(self.step_count, offsets)

    @property
    def visits_points(self) -> bool:
        """Whether the evaluator moves the weights from point to point, as it says itself."""
        return getattr(self.evaluator, "visits_points", True)

    @property
    def repeats_moves(self) -> bool:
        """Whether the weights after a step also depend, by rounding, on the points visited in it."""
        return self._restore.replays_moves

    def checked(self, loss: float) -> float:
        """Count one evaluation of the loss and return it.

        Raises:
            LossError: If it is not finite.
        """
        self.num_forwards += 1
        if not math.isfinite(loss):
            raise LossError(
                f"The loss is {loss} at step {self.step_count + 1}: the weights were put back to before this step; "
                "lower the learning rate or eps, or train in fp32."
            )
        return loss

    def update(self, estimate: Estimate) -> None:
        """Move the weights along the estimate: decoupled weight decay, then a plain or heavy-ball step."""
        heavy = [group["momentum"] > 0 for group in self.param_groups]
        self.move(
            [
                {} if is_heavy else {i: -group["lr"] * c for i, c in estimate.coefficients.items()}
                for group, is_heavy in zip(self.param_groups, heavy)
            ]
        )
        by_name = {name: group for (group, names), h in zip(self.groups(), heavy) if h for name in names}
        for batch in self.batches(list(by_name)):
            buffers = self.buffers("momentum_buffer", batch)
            self.add_estimate(buffers, estimate, decay={name: by_name[name]["momentum"] for name in batch})
            self.add_values(buffers, {name: -by_name[name]["lr"] for name in batch})

    def move(self, scales: Sequence[Mapping[int, float]]) -> Move:
        r"""Restore the weights and move them, :math:`\theta \leftarrow (1-\eta\lambda)\theta + \sum_i scale_i z_i`.

        Args:
            scales: For every parameter group, the factor on each direction of this step by index.

        Returns:
            The move, which is also :attr:`last_move` if there is nothing more to the step.
        """
        decays = tuple(1 - group["lr"] * group["weight_decay"] for group in self.param_groups)
        move = Move(self.step_count, tuple(dict(by_index) for by_index in scales), decays)
        self.last_move = move if self.is_replayable else None
        update: dict[str, dict[int, float]] = {}
        decay: dict[str, float] = {}
        for (_, names), by_index, factor in zip(self.groups(), move.scales, decays):
            # One object a group: what tensors share is then looked at once.
            update |= dict.fromkeys(names, by_index)
            decay |= dict.fromkeys(names, factor)
        self._restore.commit(self.step_count, update, decay=decay)
        return move

    def add_estimate(
        self, tensors: Mapping[str, Tensor], estimate: Estimate, *, decay: float | Mapping[str, float] = 1.0
    ) -> None:
        r"""Compute :math:`t \leftarrow decay\,t + \hat g` for tensors shaped like the parameters of their names."""
        indices, scales = list(estimate.coefficients), list(estimate.coefficients.values())
        self.directions.add_(tensors, scales, seed=self.seed, step=self.step_count, index=indices, decay=decay)

    def dense_estimate(self, names: Sequence[str], estimate: Estimate) -> dict[str, Tensor]:
        r"""Return :math:`\hat g` as fp32 tensors, for methods whose update is more than a sum of directions."""
        tensors = {name: torch.zeros_like(self.named_params[name], dtype=torch.float32) for name in names}
        self.add_estimate(tensors, estimate)
        return tensors

    def add_values(self, values: Mapping[str, Tensor], factor: float | Mapping[str, float]) -> None:
        """Add ``factor`` times fp32 tensors to the weights of their names, with the rounding of their dtype.

        Weights in bf16 and fp16 are rounded stochastically: to nearest, they would lose most updates.
        """
        for name, value in values.items():
            weight, scale = self.named_params[name], factor[name] if isinstance(factor, Mapping) else factor
            if weight.dtype in (torch.bfloat16, torch.float16):
                self.add_terms({name: Values(value.contiguous())}, scale)
            else:
                weight.add_(value, alpha=scale)

    def add_terms(self, terms: Mapping[str, Values | Factors], factor: float) -> None:
        """Add ``factor`` times given values or factors to the weights, stochastically rounded if in bf16 or fp16."""
        for name, term in terms.items():
            weight = self.named_params[name]
            low = weight.dtype in (torch.bfloat16, torch.float16)
            place = {"seed": self.seed, "step": self.step_count, "index": 0}
            Fixed({name: term}).add_({name: weight}, factor, stochastic=low, **place)

    def batches(self, names: Sequence[str]) -> list[list[str]]:
        """Split names into those that temporaries are made for at a time: one, unless directions couple the tensors."""
        law = getattr(self.directions, "law", None)
        together = law is not None and not law.independent
        return [list(names)] if together else [[name] for name in names]

    def buffers(self, key: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Return one state tensor a parameter, in fp32 or wider and zero when new."""
        found = {}
        for name in names:
            tensor = self.named_params[name]
            state = self.state[tensor]
            if key not in state:
                state[key] = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            found[name] = state[key]
        return found

    def groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Return every parameter group with the names of its parameters."""
        by_id = {id(tensor): name for name, tensor in self.named_params.items()}
        return [(group, [by_id[id(tensor)] for tensor in group["params"]]) for group in self.param_groups]

    def extra_state(self) -> dict[str, Any]:
        """Return what must be saved beside torch's own state: the counters and the seed that address the directions."""
        return {
            "step": self.step_count,
            "seed": self.seed,
            "num_forwards": self.num_forwards,
            "restore": self._restore.state_dict(),
            "directions": getattr(self.directions, "state_dict", dict)(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned."""
        self.step_count, self.num_forwards, self.seed = state["step"], state["num_forwards"], state["seed"]
        self._restore.seed = self.seed
        if state["directions"]:
            self.directions.load_state_dict(state["directions"])  # type: ignore[attr-defined]
        self._restore.load_state_dict(state["restore"])
        self._versions = [tensor._version for tensor in self.named_params.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state: torch's own, and under ``zeroth_order`` what addresses the directions."""
        return super().state_dict() | {"zeroth_order": self.extra_state()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``: the next step draws the directions that the saved run would have drawn.

        State keeps the dtype it was saved with.  (torch casts it to the parameter's, which would round the fp32
        momentum of bf16 weights.)

        Raises:
            UsageError: If the state was saved by another kind of optimizer.
        """
        if "zeroth_order" not in state_dict:
            raise UsageError(
                f"This state was not saved by a zeroth-order optimizer; {type(self).__name__} cannot load it."
            )
        kept = {key: value for key, value in state_dict.items() if key != "zeroth_order"}
        super().load_state_dict(kept | {"state": {}})
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        saved_ids = [saved for group in state_dict["param_groups"] for saved in group["params"]]
        for saved, tensor in zip(saved_ids, tensors):
            for key, value in state_dict["state"].get(saved, {}).items():
                copied = value.detach().clone().to(tensor.device) if isinstance(value, Tensor) else value
                self.state[tensor][key] = copied
        self.load_extra_state(state_dict["zeroth_order"])
