r"""The trained parameters of an optimizer: their names, groups, state, and what can be added to them.

Updates and averages work on this part of an optimizer alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokernel.directions import Directions
from zokernel.directions.families.fixed import Fixed
from zokernel.directions.terms import Factors, Values
from zokernel.directions.weights.restore import LOW_PRECISION
from zokernel.errors import UsageError
from zokernel.estimators.base import Estimate
from zokernel.optim.parameters import tied_names


class Trained:
    """Parameters by name, with the directions that move them.

    Attributes:
        named_params: Every parameter by name, tied weights under their first one.
        active: Those that the coming step perturbs and moves: all but the frozen ones.
        frozen: Names of the parameters that it leaves alone.
        directions: The family of random directions.
        seed: Seed of all directions of the run.
        step_count: Steps taken; the coming step's directions are those of this number.
        param_groups: Parameter groups, as torch keeps them.
        state: State by parameter, as torch keeps it.
    """

    named_params: dict[str, Tensor]
    active: dict[str, Tensor]
    frozen: tuple[str, ...] = ()
    directions: Directions
    seed: int
    step_count: int
    param_groups: list[dict[str, Any]]
    state: Any
    _trainable: set[str]
    _frozen_in_step: Collection[str] | None = None

    def _choose_active(self) -> bool:
        """Choose which parameters the coming step moves; return whether they are others than before.

        A parameter that has required gradients and no longer does is frozen.  Plain tensors never required any and are
        trained.
        """
        self._trainable |= {name for name, tensor in self.named_params.items() if tensor.requires_grad}
        if self._frozen_in_step is None:
            resting = {name for name in self._trainable if not self.named_params[name].requires_grad}
        else:
            resting = set(self._frozen_in_step)
        if resting == self.named_params.keys() - self.active.keys():
            return False
        moving = {name: tensor for name, tensor in self.named_params.items() if name not in resting}
        if not moving:
            raise UsageError("There is nothing to train: no parameter has requires_grad=True any more.")
        self.active = moving if resting else self.named_params
        self.frozen = tuple(name for name in self.named_params if name in resting)
        return True

    def moving_groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Return every parameter group with the names of those of its parameters that are not frozen."""
        return [(group, [name for name in names if name in self.active]) for group, names in self.groups()]

    def groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Return every parameter group with the names of its parameters."""
        by_id = {id(tensor): name for name, tensor in self.named_params.items()}
        return [
            (group, [by_id[id(tensor)] for tensor in group["params"] if id(tensor) in by_id])
            for group in self.param_groups
        ]

    def tied_names(self) -> dict[str, str]:
        """Return the other names of tied weights, each with the one that they are trained under."""
        is_tied = len(self.named_params) < sum(len(group["params"]) for group in self.param_groups)
        return tied_names(self.param_groups) if is_tied else {}

    def under_all_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by the names of parameters, those of tied weights under their other names, too."""
        return tensors | {name: tensors[first] for name, first in self.tied_names().items()}

    def batches(self, names: Sequence[str]) -> list[list[str]]:
        """Split names into those whose directions must be made together.

        Temporaries are made for one parameter at a time.  A direction on one tensor may depend on which other tensors
        there are; then all that move are taken at once, whichever were requested.
        """
        if not names:
            return []
        return [list(self.active)] if self.directions.couples_tensors else [[name] for name in names]

    def buffers(self, key: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Return one state tensor per parameter, in fp32 or wider and zero when new."""
        buffers = {}
        for name in names:
            tensor = self.named_params[name]
            state = self.state[tensor]
            if key not in state:
                state[key] = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            buffers[name] = state[key]
        return buffers

    def add_estimate(
        self, tensors: Mapping[str, Tensor], estimate: Estimate, *, decay: float | Mapping[str, float] = 1.0
    ) -> None:
        r"""Compute :math:`t \leftarrow decay\,t + \hat g` for tensors shaped like the parameters of their names.

        Where directions couple tensors, ``tensors`` must hold one for every parameter that moves.
        """
        scaled = estimate.scaled
        self.directions.add_(
            tensors, list(scaled.values()), seed=self.seed, step=self.step_count, index=list(scaled), decay=decay
        )

    def dense_estimate(self, names: Sequence[str], estimate: Estimate) -> dict[str, Tensor]:
        r"""Return :math:`\hat g` as fp32 tensors, for updates that are more than a sum of directions."""
        tensors = {name: torch.zeros_like(self.named_params[name], dtype=torch.float32) for name in names}
        self.add_estimate(tensors, estimate)
        return tensors

    def add(self, changes: Mapping[str, Tensor | Factors], factors: Mapping[str, float]) -> None:
        """Add multiples of fp32 tensors, or of low-rank factors, to the weights of their names.

        Weights in bf16 and fp16 are rounded stochastically: rounded to nearest, they would lose most updates.

        Args:
            changes: What to add, by name.
            factors: What each is multiplied by.
        """
        for name, change in changes.items():
            weight, factor = self.named_params[name], factors[name]
            low = weight.dtype in LOW_PRECISION
            if isinstance(change, Tensor) and not low:
                weight.add_(change, alpha=factor)
                continue
            term = Values(change.contiguous()) if isinstance(change, Tensor) else change
            place = {"seed": self.seed, "step": self.step_count, "index": 0}
            Fixed({name: term}).add_({name: weight}, factor, stochastic=low, **place)
