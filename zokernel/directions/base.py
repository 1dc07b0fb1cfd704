r"""What every family of random directions can do: be generated, or be added to weights without being stored.

A direction is a pure function of ``(seed, step, index, tensor name, element position)``.  Nothing depends on the order
in which tensors are visited, on chunking or sharding, on the device, or on the global random state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

Scale = float | Sequence[float]


@runtime_checkable
class Directions(Protocol):
    r"""A family of random directions :math:`z` with :math:`E z z^T = I` (unless its docstring says otherwise)."""

    def __call__(self, like: Mapping[str, Tensor], *, seed: int, step: int, index: int) -> dict[str, Tensor]:
        """Return direction ``index`` of ``step``: one tensor for each name, shaped and typed as in ``like``."""
        ...

    def add_(
        self,
        tensors: Mapping[str, Tensor],
        scale: Scale | Mapping[str, Scale],
        *,
        seed: int,
        step: int | Sequence[int],
        index: int | Sequence[int],
        decay: float | Mapping[str, float] = 1.0,
        stochastic: bool = False,
    ) -> None:
        r"""Compute :math:`\theta \leftarrow decay \cdot \theta + \sum_i scale_i z_i` in place, in one read and write.

        Args:
            tensors: Weights by name, changed in place.
            scale: One number an index; or, when tensors differ (parameter groups), a mapping from name to such numbers.
            seed: Seed of the whole run.
            step: Step of the run; or one step an index, to add directions of several steps.
            index: Which direction of that step; a list adds several directions in the same sweep.
            decay: Factor on the old weights (weight decay), one for all or by name.
            stochastic: Round the result stochastically instead of to nearest (low-precision weights).
        """
        ...
