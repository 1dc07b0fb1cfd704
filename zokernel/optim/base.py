r"""The base of every zeroth-order optimizer: perturb, evaluate, add scalars times seeded directions.

One step is

.. math:: \theta \leftarrow (1 - \eta\lambda)\, \theta - \eta \sum_p c_p z_p, \qquad z_p = z(seed, step, p)

where an estimator finds the :math:`c_p` from forward passes.  A method is a choice of directions, estimator and update;
this class keeps the books: names of parameters, the step counter, restoring the weights when anything goes wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zokernel.directions import Dense, make_restore
from zokernel.directions.base import Directions
from zokernel.errors import RunError, UsageError
from zokernel.estimators.base import Estimate, Estimator

Closure = Callable[[], Tensor | float]
Params = nn.Module | Iterable[Any]


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Optimizer whose ``step(closure)`` only evaluates the loss, without gradients.

    Args:
        params: A module, an iterable of tensors or of ``(name, tensor)`` pairs, or parameter groups of either.  Directions
            are keyed by the parameter's name, or by its position when it has none.
        estimator: Turns forward passes into projected gradients.
        directions: Family of random directions; dense Rademacher directions when not given.
        lr: Learning rate (step size of the gradient estimate).
        weight_decay: Decoupled weight decay: every step multiplies the weights by ``1 - lr * weight_decay``.
        momentum: Heavy-ball momentum on the gradient estimate; needs one fp32 copy of the parameters when not zero.
        seed: Seed of all directions of the run.
        restore: How the weights find back after a perturbation: ``fold`` (the default: the restore is part of the
            update, three sweeps a step), ``grid`` (exact, no memory) or ``copy`` (exact, one copy).

    Raises:
        UsageError: If there is nothing to train, a setting is out of range, or a weight cannot be perturbed.
    """

    first_order: ClassVar[bool] = False
    needs_memory_copies: ClassVar[float] = 0.0

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
        self.last_estimate: Estimate | None = None
        # A training loop that ends each step with a bare step(), as transformers' does, takes the step itself earlier.
        self.loop_calls_step = False
        self._restore = make_restore(restore, self.directions, self.named_params, seed=seed)

    @property
    def forwards_per_step(self) -> int:
        """How many times one step calls the closure."""
        return self.estimator.num_forwards

    def effective_lr(self) -> float:
        r"""Return the learning rate times the estimator's mean gain, so that methods can be compared fairly.

        A method with :math:`E[\hat g] = C\,\nabla L` at learning rate :math:`\eta` moves, on average, as one with an
        unbiased estimator does at :math:`C \eta` (theory C.2.11).  With momentum :math:`\beta` the mean displacement is
        a further :math:`1/(1-\beta)` larger.
        """
        group = self.param_groups[0]
        return group["lr"] * self.estimator.gain / (1.0 - group["momentum"])

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
            raise UsageError(f"{type(self).__name__}.step needs a closure that returns the loss: step(lambda: loss(...)).")

        def evaluate(offsets: Mapping[int, float]) -> float:
            self._restore.move_to(self.step_count, offsets)
            loss = float(closure())
            self.num_forwards += 1
            if not math.isfinite(loss):
                raise RunError(
                    f"The loss is {loss} at step {self.step_count + 1}: the weights were put back to before this step; "
                    "lower the learning rate or eps, or train in fp32."
                )
            return loss

        try:
            estimate = self.estimator(evaluate, seed=self.seed, step=self.step_count)
        except BaseException:
            self._restore.restore()
            raise
        self.last_estimate = estimate
        self.update(estimate)
        self.step_count += 1
        return estimate.loss

    def update(self, estimate: Estimate) -> None:
        """Move the weights along the estimate: decoupled weight decay, then a plain or heavy-ball step."""
        decay = self.decay_factors()
        plain: dict[str, dict[int, float]] = {}
        for group, names in self._groups():
            heavy = group["momentum"] > 0
            for name in names:
                plain[name] = {} if heavy else {i: -group["lr"] * c for i, c in estimate.coefficients.items()}
        self._restore.commit(self.step_count, plain, decay=decay)
        for group, names in self._groups():
            if group["momentum"] > 0:
                self._momentum_update(group, names, estimate)

    def _momentum_update(self, group: dict[str, Any], names: list[str], estimate: Estimate) -> None:
        buffers = {}
        for name in names:
            state = self.state[self.named_params[name]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(self.named_params[name], dtype=torch.float32)
            buffers[name] = state["momentum_buffer"]
        indices, scales = list(estimate.coefficients), list(estimate.coefficients.values())
        self.directions.add_(
            buffers, scales, seed=self.seed, step=self.step_count, index=indices, decay=group["momentum"]
        )
        for name, buffer in buffers.items():
            self.named_params[name].add_(buffer.to(self.named_params[name].dtype), alpha=-group["lr"])

    def decay_factors(self) -> dict[str, float]:
        """Return ``1 - lr * weight_decay`` of every parameter, by name."""
        return {name: 1 - group["lr"] * group["weight_decay"] for group, names in self._groups() for name in names}

    def _groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        by_id = {id(tensor): name for name, tensor in self.named_params.items()}
        return [(group, [by_id[id(tensor)] for tensor in group["params"]]) for group in self.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state: torch's own, plus the step counter and the seed that address the directions."""
        state = super().state_dict()
        state["zeroth_order"] = {"step": self.step_count, "seed": self.seed, "num_forwards": self.num_forwards}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``: the next step draws the directions that the saved run would have drawn."""
        counters = state_dict["zeroth_order"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "zeroth_order"})
        self.step_count, self.num_forwards = counters["step"], counters["num_forwards"]
        self.seed = counters["seed"]
        self._restore.seed = counters["seed"]


def trainable(params: Params) -> Any:
    """Return ``params`` in a form that ``torch.optim.Optimizer`` takes, with names where there are any."""
    if isinstance(params, nn.Module):
        return [(name, p) for name, p in params.named_parameters() if p.requires_grad] or _nothing_to_train()
    if isinstance(params, Tensor):
        raise UsageError("params must be a module or an iterable of tensors, not a single tensor: pass [tensor].")
    params = list(params)
    return params or _nothing_to_train()


def _nothing_to_train() -> Any:
    raise UsageError("There is nothing to train: no parameter has requires_grad=True.")


def name_parameters(param_groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return every parameter by name: its own, or its position as text when the groups carry no names.

    Args:
        param_groups: Groups as ``torch.optim.Optimizer`` keeps them.

    Returns:
        Name to tensor, in order.

    Raises:
        UsageError: If a weight is not floating point (quantized weights cannot be perturbed).
    """
    named: dict[str, Tensor] = {}
    for group in param_groups:
        names = group.get("param_names")
        for position, tensor in enumerate(group["params"]):
            name = names[position] if names else str(len(named))
            if not tensor.is_floating_point():
                raise UsageError(
                    f"Parameter {name!r} is stored as {tensor.dtype}, which cannot be perturbed: "
                    "dequantize the model, or train a LoRA adapter on top of it."
                )
            named[name] = tensor
    return named
