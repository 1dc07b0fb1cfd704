"""Restore exactly in any dtype: from a copy of the weights, or by never moving them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zokernel.directions.base import Directions
from zokernel.directions.terms import Rule
from zokernel.directions.weights.restore import LOW_PRECISION, Draw, Restore, step_and_index, union_of_draws
from zokernel.errors import UsageError


class Unmoved(Restore):
    """Weights that only updates change, because the losses are perturbed elsewhere: exact, any dtype, no memory.

    Args:
        directions: Random directions.
        tensors: Weights by name.
        seed: Seed of the run; also of the rounding.
        stochastic: Round updates stochastically; by default only those of bfloat16 and float16 weights, whose nearest
            rounding would lose most updates.
    """

    def __init__(
        self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, stochastic: bool | None = None
    ):
        super().__init__(directions, tensors, seed=seed)
        self._rules = {
            name: Rule.STOCHASTIC
            if stochastic or (stochastic is None and tensor.dtype in LOW_PRECISION)
            else Rule.NEAREST
            for name, tensor in self.tensors.items()
        }

    def _move(self, target: dict[Draw, float]) -> None:
        if target:
            raise UsageError(
                "Weights with the restore mode 'unmoved' are never perturbed: perturb the forward instead "
                "(InForward, Stacked), or use perturb='in_place:copy'."
            )

    def _commit(self, step: int, update: dict[str, dict[Draw, float]], decay: float | Mapping[str, float]) -> None:
        draws = union_of_draws(update, {})
        self.directions.sweep_(
            self.tensors,
            self._scales(update, draws),
            rule=self._rules,
            seed=self.seed,
            decay=decay,
            rounding=(step, 0),
            **step_and_index(draws),
        )


class Copy(Unmoved):
    """Restore exactly from a copy of the weights: any dtype, sharded or not, at the price of the copy.

    Args:
        directions: Random directions.
        tensors: Weights by name.
        seed: Seed of the run; also of the rounding.
        stochastic: As for :class:`Unmoved`.
    """

    def __init__(
        self, directions: Directions, tensors: Mapping[str, Tensor], *, seed: int, stochastic: bool | None = None
    ):
        super().__init__(directions, tensors, seed=seed, stochastic=stochastic)
        self._theta = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the weights as they are now for the unperturbed ones.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        self._copy(self.tensors, self._theta)

    def _move(self, target: dict[Draw, float]) -> None:
        if self._offsets:
            self._copy(self._theta, self.tensors)
        if target:
            self.directions.add_(self.tensors, list(target.values()), seed=self.seed, **step_and_index(list(target)))

    def _commit(self, step: int, update: dict[str, dict[Draw, float]], decay: float | Mapping[str, float]) -> None:
        if self._offsets:
            self._copy(self._theta, self.tensors)
        super()._commit(step, update, decay)
        self._copy(self.tensors, self._theta)

    @staticmethod
    def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in target.items():
                tensor.copy_(source[name])
