"""The part of an optimizer that outlives a step: parameter groups, state in checkpoints, and the averaged iterate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.estimators import Estimator
from zokernel.optim.copies import Copied
from zokernel.optim.parameters import (
    Origin,
    check_group,
    check_group_settings,
    check_tied_groups,
    name_parameters,
    trainable_group,
)
from zokernel.optim.saved_state import check_groups, check_parts, check_shapes, estimator_kind, shapes_of
from zokernel.optim.trained import Trained
from zokernel.optim.updates.averaging.averages import IterateAverage
from zokernel.optim.updates.base import Update
from zokernel.perturb import Perturb


class Checkpointed(Trained, Copied):
    """An optimizer of torch whose state addresses directions, beside what torch keeps.

    Attributes:
        updates: The parts of the update.
        estimator: Turns the losses of a step into coefficients.
        perturb: How the losses are taken, and how the weights are restored.
        num_forwards: Losses that its steps were made of: evaluated, replayed or told.
        last_factor: Factor that the update put on the last estimate.
    """

    updates: list[Update]
    estimator: Estimator
    num_forwards: int
    _versions: list[tuple[Any, bool]]
    last_factor: float
    _named_groups: list[tuple[dict[str, Any], list[str]]]
    _followers: list[Update]
    _origin = Origin()

    @property
    def perturb(self) -> Perturb:
        """How the losses at perturbed weights are taken, and how the weights are restored."""
        raise NotImplementedError

    def _attach(self) -> None:
        raise NotImplementedError

    def _refresh_base(self) -> None:
        """Before a step, take note of weights that someone else wrote to, and of parameters frozen or not any more."""
        changed = self.changed_by_others
        if self._choose_active():
            self.perturb.release()
            changed = True
        if changed:
            self._attach()

    def _is_dense(self, group: Mapping[str, Any]) -> bool:
        raise NotImplementedError

    def _check_density(self) -> None:
        """Refuse groups whose steps are more than scalars times directions where an average or a grid needs these.

        Raises:
            UsageError: If there is one: made so, added, or made so by a schedule that moves the momentum.
        """
        averages = any(isinstance(part, IterateAverage) for part in self.updates)
        if averages and (any(map(self._is_dense, self.param_groups)) or not self.directions.seeded):
            raise UsageError(
                "An average of the iterates is rebuilt from scalars and seeded directions, and this update adds more: "
                "average no momentum (also of a schedule), no Adam, no sign of the estimate and no preconditioned "
                "directions."
            )
        if self.perturb.restore_mode == "grid" and not self.moves_along_directions:
            raise UsageError(
                f"perturb='in_place:grid' keeps the weights on a grid, but this {type(self).__name__} adds more than "
                "scalars times directions and would leave it: set momentum to 0 (also in a schedule), or use "
                "'in_place' or 'in_place:copy'."
            )

    def _note_versions(self) -> None:
        raise NotImplementedError

    @property
    def changed_by_others(self) -> bool:
        """Whether anything but this optimizer has written to the weights, or replaced them, since its last step."""
        raise NotImplementedError

    @property
    def moves_along_directions(self) -> bool:
        """Whether every step is scalars times directions of that step."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters from the next step on.

        Args:
            param_group: ``params`` (a module, a tensor, or an iterable of tensors or ``(name, tensor)`` pairs) and
                settings of its own: ``lr``, ``weight_decay``, and ``momentum`` where the method has it.  Tensors of the
                module that the optimizer was made from are named as they are there.  To an average of the iterates they
                count as constant up to now.

        Raises:
            UsageError: If the group does not fit the others, or has a setting that holds for all groups.
        """
        is_started, count, names = bool(self.named_params), len(self.param_groups), set(self.named_params)
        group = trainable_group(param_group, self.param_groups, self._origin)
        check_group_settings(group, self)
        super().add_param_group(group)
        try:
            self.param_groups[-1] |= check_group(self.param_groups[-1])
            if is_started:
                self._check_density()
                self._name_parameters()
                self._choose_active()
                self.perturb.release()
                self.directions.prepare(self.named_params)
                self._attach()
                for part in self.updates:
                    part.attach(self)
        except UsageError:
            del self.param_groups[count:]
            for name in self.named_params.keys() - names:
                del self.named_params[name]
            if is_started:
                self._choose_active()
                self.perturb.release()
                self._attach()
            raise

    def _name_parameters(self) -> None:
        self.named_params |= name_parameters(self.param_groups)
        if self.tied_names():
            check_tied_groups(self.param_groups, self.defaults)

    def _after_copy(self) -> None:
        self._note_versions()
        self._named_groups = self.moving_groups()

    @property
    def evaluator(self) -> Any:
        """Gone since 0.2.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError("There is no optimizer.evaluator since 0.2: see optimizer.perturb.")

    @evaluator.setter
    def evaluator(self, value: Any) -> None:
        raise UsageError("There is no optimizer.evaluator since 0.2: assign optimizer.perturb instead.")

    def averaged_weights(self) -> dict[str, Tensor]:
        r"""Return the averaged iterate :math:`\theta^{ag}` by parameter name, in the parameters' dtypes.

        Raises:
            UsageError: If the update has no :class:`~zokernel.optim.updates.averaging.averages.IterateAverage`.
        """
        for part in self.updates:
            if isinstance(part, IterateAverage):
                return self.under_all_names(part.averaged_weights(self))
        raise UsageError("There is no averaged iterate: set averaging to 'fp32', 'int8' or 'journal'.")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged iterate into the model for the length of a ``with`` block, as for evaluation."""
        with self._holding(self.averaged_weights()):
            yield

    @contextmanager
    def _holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Hold other values for the length of a ``with`` block, as if nobody had changed the weights."""
        untouched = not self.changed_by_others
        self._swap(values)
        try:
            yield
        finally:
            self._swap(values)
            if untouched:
                self._note_versions()

    @torch.no_grad()
    def _swap(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self.named_params.items():  # each memory once, also that of tied weights
            current = tensor.detach().clone()
            tensor.copy_(values[name])
            values[name] = current

    def extra_state(self) -> dict[str, Any]:
        """Return what must be saved beside torch's own state: counters, the seed, and the state of the parts."""
        return {
            "step": self.step_count,
            "seed": self.seed,
            "num_forwards": self.num_forwards,
            "last_factor": self.last_factor,
            "perturb": self.perturb.weights.state_dict(),
            "parts": self._parts(),
            "parameters": shapes_of(self.named_params),
            "directions": self.directions.state_dict(),
            "updates": [part.state_dict() for part in self.updates],
        }

    def _parts(self) -> dict[str, str]:
        """Return what decides which state there is, for messages."""
        on_grid = self.perturb.restore_mode == "grid"
        return {
            "update": " + ".join(type(part).__name__ for part in self.updates),
            "directions": type(self.directions).__name__,
            "estimator": estimator_kind(self.estimator),
            "perturb": "in_place:grid" if on_grid else "without a grid",
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned."""
        self.step_count, self.num_forwards, self.seed = state["step"], state["num_forwards"], state["seed"]
        self.last_factor = state["last_factor"]
        self.directions.load_state_dict(state["directions"])
        for part, saved in zip(self.updates, state["updates"], strict=True):
            part.load_state_dict(saved)
            part.attach(self)
        self._refresh_base()
        self.perturb.weights.seed = self.seed
        self.perturb.weights.load_state_dict(state["perturb"])
        self._note_versions()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state: torch's own, and under ``zeroth_order`` what addresses the directions."""
        return super().state_dict() | {"zeroth_order": self.extra_state()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``: the next step draws the directions that the saved run would have drawn.

        State keeps the dtype it was saved with.  (torch casts it to the parameter's, which would round the fp32
        momentum of bf16 weights.)

        Settings of the groups, such as learning rates, are those of the state, as in torch.

        Raises:
            UsageError: If the state was saved by another kind of optimizer, for other parameters, or by an earlier
                version of zokernel; nothing is loaded then.
        """
        saved = state_dict.get("zeroth_order")
        if saved is None:
            raise UsageError(
                f"This state was not saved by a zeroth-order optimizer; {type(self).__name__} cannot load it."
            )
        if "perturb" not in saved:
            raise UsageError(
                "This state was saved by zokernel 0.1, whose optimizers kept other state: continue with that version, "
                "or start from its weights."
            )
        check_parts(saved["parts"], self._parts())
        check_groups(state_dict["param_groups"], self.param_groups)
        own_shapes = shapes_of(self.named_params)
        check_shapes(saved.get("parameters", own_shapes), own_shapes)
        torch_state = {key: value for key, value in state_dict.items() if key != "zeroth_order"}
        super().load_state_dict(torch_state | {"state": {}})
        self._named_groups = self.moving_groups()  # torch has made new dictionaries
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        saved_ids = [identity for group in state_dict["param_groups"] for identity in group["params"]]
        for identity, tensor in zip(saved_ids, tensors):
            for key, value in state_dict["state"].get(identity, {}).items():
                copied = value.detach().clone().to(tensor.device) if isinstance(value, Tensor) else value
                self.state[tensor][key] = copied
        self.load_extra_state(saved)
