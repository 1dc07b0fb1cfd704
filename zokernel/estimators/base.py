r"""What an estimator does: turn a few forward passes into projected gradients.

An estimator names points :math:`\theta + \sum_i offsets_i z_i` and, given the losses there, returns coefficients
:math:`c_i`; the gradient estimate is :math:`\hat g = \sum_i c_i z_i`.  The points depend on the seed and the step
alone, so the losses may be taken one after the other, in one batch, on several machines or from a journal.  Directions
are never materialised, and nothing here knows how they are made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from zokernel.errors import UsageError
from zokernel.values import is_number, is_whole

Offsets = Mapping[int, float]
"""Coefficient of each direction by index: the point theta + sum_i offsets_i z_i."""
Evaluate = Callable[[Offsets], float]


@dataclass(frozen=True)
class Estimate:
    r"""What one step's forward passes say.

    Attributes:
        coefficients: :math:`c_i` by direction index, such that :math:`\hat g = \sum_i c_i z_i`.
        losses: Every loss evaluated, in order.
        curvature: :math:`z_p^T H z_p` of every direction, from estimators that measure it.
        loss_std: Standard deviation of the perturbed losses, from estimators that divide by it.
        centre: Loss at the unperturbed weights, from estimators that evaluate it.
        factor: What parts of the update have multiplied the coefficients by, see :attr:`scaled`.
    """

    coefficients: dict[int, float]
    losses: list[float] = field(repr=False)
    curvature: tuple[float, ...] | None = None
    loss_std: float | None = None
    centre: float | None = None
    factor: float = 1.0

    @property
    def scaled(self) -> dict[int, float]:
        """The coefficients times :attr:`factor`."""
        return {index: coefficient * self.factor for index, coefficient in self.coefficients.items()}

    @property
    def loss(self) -> float:
        r"""Mean of the losses evaluated in this step (for symmetric estimators, :math:`L(\theta)` to second order)."""
        return sum(self.losses) / len(self.losses)


class Estimator(ABC):
    r"""A gradient estimator :math:`\hat g = \sum_i c_i z_i` from forward passes.

    Attributes:
        num_perturbations: How many directions one estimate uses at most.
        numbers_per_point: How many numbers :meth:`combine` takes for each point: its loss, or a derivative besides;
            None if one for every example.
        eps: Radius of the perturbation, in units of the weights; None if the weights are not moved.
    """

    num_perturbations: int
    numbers_per_point: ClassVar[int | None] = 1
    eps: float | None = None

    @property
    def reach(self) -> float:
        """Largest perturbation to make room for, in units of the weights: ``eps``, or a hundredth without one."""
        return 0.01 if self.eps is None else self.eps

    @abstractmethod
    def points(self, *, seed: int, step: int) -> list[Offsets]:
        """Return where the losses of ``step`` are wanted, in the order in which they are evaluated."""

    @abstractmethod
    def combine(self, losses: Sequence[float], *, seed: int, step: int) -> Estimate:
        """Return the projected gradients of ``step`` from the losses at its :meth:`points`, in their order."""

    def forwards_at(self, step: int) -> int:
        """Return how many losses the estimate of ``step`` needs."""
        return len(self.points(seed=0, step=step))

    def gain_at(self, step: int, last: Estimate | None = None) -> float:
        r"""Return :math:`C` of :math:`E[\hat g] = C \nabla L`, to leading order in the radius: one, if unbiased.

        Args:
            step: Step of the run.
            last: The estimate of the step before, for estimators whose gain depends on the losses.
        """
        return 1.0

    def __call__(self, evaluate: Evaluate, *, seed: int, step: int) -> Estimate:
        """Evaluate the points of ``step`` one after the other and return the projected gradients."""
        losses = [evaluate(offsets) for offsets in self.points(seed=seed, step=step)]
        return self.combine(losses, seed=seed, step=step)


def check_radius(eps: float, num_perturbations: int) -> None:
    """Refuse a smoothing radius or a number of directions that is not positive.

    Raises:
        UsageError: If one of them is not.
    """
    if not (is_number(eps) and eps > 0):
        raise UsageError(f"eps must be positive, not {eps!r}: 1e-3 suits most models.")
    if not is_whole(num_perturbations):
        raise UsageError(f"num_perturbations must be a whole number of at least 1, not {num_perturbations!r}.")


def check_total_steps(total_steps: int | None, schedule: str | None) -> None:
    """Refuse a length of the run that is no number of steps, or is missing where a schedule needs it.

    Args:
        total_steps: Length of the run.
        schedule: The schedule that needs it, for the message; None if there is none.

    Raises:
        UsageError: If it is.
    """
    if total_steps is None and schedule:
        raise UsageError(f"{schedule} needs total_steps, the number of steps of the run.")
    if total_steps is not None and not is_whole(total_steps):
        raise UsageError(f"total_steps must be a whole number of at least 1, not {total_steps!r}.")
