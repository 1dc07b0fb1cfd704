"""What a part of an update is, and a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from zokernel.directions.terms import Factors
from zokernel.estimators.base import Estimate
from zokernel.optim.affine_move import AffineMove
from zokernel.optim.trained import Trained

Step = Mapping[str, Tensor | Factors]
"""What a rule adds to each parameter, by name: a tensor, or the factors of a matrix."""


class Update:
    """One part of an update.  Every hook does nothing by default.

    Attributes:
        normalizes: Whether the first step's length is unknown before its losses are.
        keeps_to_directions: Whether the part changes the weights by nothing but multiples of directions.
        trained: The optimizer that the part serves; it serves one only, since it may keep state.
    """

    normalizes: ClassVar[bool] = False
    keeps_to_directions: ClassVar[bool] = True
    trained: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def attach(self, trained: Trained) -> None:
        """Prepare state; called once, when the optimizer has its parameters."""

    def transform(self, estimate: Estimate, trained: Trained) -> Estimate:
        """Return the estimate with other coefficients, or with another factor on them."""
        return estimate

    def after_move(self, trained: Trained, estimate: Estimate, moves: Sequence[AffineMove]) -> Sequence[AffineMove]:
        """Take note of what the step did to the weights, or change them further.

        Args:
            trained: The optimizer's parameters.
            estimate: The estimate that was followed.
            moves: What was done so far, one per parameter group.

        Returns:
            What has been done by now, for the parts that follow.
        """
        return moves

    def state_dict(self) -> dict[str, Any]:
        """Return the scalars that must be saved; tensors live in the optimizer's own state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""


class Rule(Update):
    """The part that turns the estimate into a step.

    Attributes:
        dense_where: Setting of a parameter group that makes its step more than scalars times directions when it is
            above zero; nothing if every group's step is.
    """

    dense_where: ClassVar[str | None] = None

    def group_defaults(self) -> dict[str, Any]:
        """Return settings that every parameter group may have its own value of."""
        return {}

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, float | dict[str, float]]:
        """Return the steps of some parameters as tensors, and what they are to be divided by: all, or by name."""
        raise NotImplementedError

    def effective_lr(self, group: Mapping[str, Any], gain: float) -> float:
        """Return the learning rate at which plain SGD on the exact gradient moves as far on average.

        Args:
            group: A parameter group.
            gain: Factor of the estimate on the gradient.
        """
        return group["lr"]
