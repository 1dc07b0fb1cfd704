r"""What a way of perturbing does: take the losses at a step's points, and bring the weights back.

A step asks for the losses at a few points :math:`\theta + \sum_i offsets_i z_i`.  One object answers: it may move the
weights from point to point, perturb them while the model runs, run all points in one forward, share them among
processes, or read the losses from a journal.  The same object then makes the update, because restoring the weights is
part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zokernel.directions import Directions, Restore, make_restore
from zokernel.errors import UsageError
from zokernel.estimators.base import Offsets

Closure = Callable[[], Tensor | float]
"""Returns the loss of one fixed batch, a scalar, at the weights as they are."""


class Perturb(ABC):
    """How a step's losses are taken and how the weights are restored.

    An object serves one optimizer, which calls :meth:`attach`.

    Attributes:
        name: What users write: ``perturb="in_place"``.
        restore_mode: How the weights are restored: ``fold``, ``grid``, ``copy``, or ``unmoved`` when only updates
            change them.
        weights: The weights, once attached: they can be moved along directions, restored and updated.
    """

    name: str
    restore_mode: str = "unmoved"

    weights: Restore
    _parameters: Mapping[str, Tensor] | None = None

    def attach(
        self, parameters: Mapping[str, Tensor], directions: Directions, *, seed: int, reach: float = 0.01
    ) -> None:
        """Take these weights, as they are, for the unperturbed ones.

        Args:
            parameters: Trained parameters by name.
            directions: The family of random directions.
            seed: Seed of the run.
            reach: Largest perturbation to expect (eps), in units of the weights.

        Raises:
            UsageError: If the weights or directions do not suit, or the object serves another optimizer.
        """
        if self._parameters is not None and self._parameters is not parameters:
            raise UsageError(f"This {type(self).__name__} serves another optimizer already: make one for each.")
        self.weights = make_restore(self.restore_mode, directions, parameters, seed=seed, reach=reach)
        self._parameters = parameters

    def release(self) -> None:
        """Serve no optimizer any more, so that another one, or other weights, can be attached."""
        self._parameters = None

    def __getattr__(self, name: str) -> Any:
        if name == "weights":
            raise UsageError(f"This {type(self).__name__} serves no optimizer yet: pass it as perturb=... to one.")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def walks_points(self) -> bool:
        """Whether the weights after a step also depend, by rounding, on the points visited: a replay must walk them."""
        return self.weights.walks_points

    @abstractmethod
    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Return the losses at ``points``, in their order; the weights may be left perturbed.

        Args:
            closure: Returns the loss at the weights as they are.
            points: Offset of each direction of the step, by index.
            step: Step of the run.
        """
