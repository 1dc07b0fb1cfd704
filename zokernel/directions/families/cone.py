r"""Directions in a cone around a running mean of the estimates (ConMeZO)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokernel.directions.base import Directions, Scale, Sweep, scales_of
from zokernel.directions.families.dense import Dense
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Term, Values
from zokernel.errors import UsageError
from zokernel.values import is_number, plain_number

AXIS = -1
"""The index under which :class:`_Parts` has the axis."""


class Cone(Directions):
    r"""Directions :math:`z = \sin(\alpha)\, u + \cos(\alpha)\, a` with dense u and an axis a of norm :math:`\sqrt d`.

    Then :math:`E[z z^T] = \sin^2(\alpha)\, I + \cos^2(\alpha)\, a a^T`.  The axis is :math:`\sqrt d\, m / |m|` with m a
    running mean of the estimates.  It is zero before the first of them.

    Args:
        base: The directions u.
        angle: :math:`\alpha`, between axis and direction, in radians, in (0, pi/2].

    Attributes:
        axis: a by tensor name: float32, contiguous, of the tensor's shape; zeros after :meth:`prepare`.  A checkpoint
            must hold it, so an optimizer keeps the same tensors in its own state.
        length: :math:`|m| / \sqrt d`.

    Raises:
        UsageError: If the angle is out of range.

    Example:
        >>> weights = {"w": torch.zeros(4)}
        >>> directions = Cone(Dense("rademacher"), angle=math.pi / 3)
        >>> directions.prepare(weights)
        >>> directions.turn({0: 2.0}, 0.5, seed=0, step=0, names=["w"])
        >>> round(float(directions.axis["w"].norm()), 4)
        2.0
        >>> z = directions(weights, seed=0, step=1, index=0)["w"]
        >>> u = directions.base(weights, seed=0, step=1, index=0)["w"]
        >>> torch.allclose(z, 0.75**0.5 * u + 0.5 * directions.axis["w"])
        True

    References:
        Behric et al. (2025), ConMeZO, arXiv:2511.02757.
    """

    seeded = False

    def __init__(self, base: Dense, angle: float):
        super().__init__(base.backend)
        angle = plain_number("angle", angle)
        if not (is_number(angle) and 0 < angle <= math.pi / 2):
            raise UsageError(f"The angle of a cone must be above 0 and at most pi/2 = 1.5708 radians, not {angle!r}.")
        self.base, self.angle = base, angle
        self.axis: dict[str, Tensor] = {}
        self.length = 0.0

    def __repr__(self) -> str:
        return f"Cone({self.base!r}, {self.angle})"

    @property
    def couples_tensors(self) -> bool:
        """Whether u does; see :attr:`Directions.couples_tensors`."""
        return self.base.couples_tensors

    def gain(self) -> float:
        r"""Return :math:`\sin^2(\alpha) + \cos^2(\alpha)\, |a|^2 / d`: one, once there is an axis.

        Along the axis itself a mean step is :math:`\sin^2(\alpha) + d \cos^2(\alpha)` times as long.
        """
        return math.sin(self.angle) ** 2 + (math.cos(self.angle) ** 2 if self.length else 0.0)

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the axis to zero for tensors that have none yet.

        Args:
            tensors: Weights by name.

        Raises:
            UsageError: If one is sharded over processes.
        """
        for name, tensor in tensors.items():
            if hasattr(tensor, "full_tensor"):
                raise UsageError(
                    f"Tensor {name!r} is sharded, and the axis of a cone is kept whole: train unsharded weights, or "
                    "use mezo."
                )
            if name not in self.axis:
                like = tensor.detach()
                zeros = torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
                self.axis[name] = zeros

    def state_dict(self) -> dict[str, Any]:
        """Return the length of the running mean; the axis is an optimizer's to save."""
        return {"length": self.length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.length = state["length"]

    def turn(
        self, coefficients: Mapping[int, float], beta: float, *, seed: int, step: int, names: Sequence[str]
    ) -> None:
        r"""Move the running mean towards a step's estimate and turn the axis to it.

        .. math:: m \leftarrow \beta m + (1-\beta) \sum_p c_p z_p, \qquad a = \sqrt d\, m / |m|

        Args:
            coefficients: :math:`c_p` by index.
            beta: Weight of the past, in [0, 1).
            seed: Seed of the run.
            step: Step whose directions the indices name.
            names: Tensors that moved in the step; d counts their elements.
        """
        moved = {name: self.axis[name] for name in names}
        along = (1 - beta) * math.cos(self.angle) * sum(coefficients.values())
        across = [(1 - beta) * math.sin(self.angle) * c for c in coefficients.values()]
        decay = beta * self.length + along
        self.base.add_(moved, across, seed=seed, step=step, index=list(coefficients), decay=decay)
        squares = [float(torch.linalg.vector_norm(axis, dtype=torch.float64)) ** 2 for axis in moved.values()]
        self.length = math.sqrt(math.fsum(squares) / sum(axis.numel() for axis in moved.values()))
        for axis in moved.values():
            axis.mul_(1 / self.length if self.length else 0.0)

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the directions of whole tensors as values; see :meth:`Directions.terms`.

        Sweeps add u and the axis as they are, without making their sum.
        """
        across = self.base({p.name: self.axis[p.name] for p in places}, seed=seed, step=step, index=index)
        sine, cosine = math.sin(self.angle), math.cos(self.angle)
        return [Values(across[p.name].mul_(sine).add_(self.axis[p.name], alpha=cosine)) for p in places]

    def _sweep_places(self, places: Sequence[Placement], sweep: Sweep) -> dict[str, float]:
        """Sweep over u and the axis as directions of their own."""
        names, count = [place.name for place in places], len(sweep.draws)
        old = None if sweep.old_scale is None else self._split(sweep.old_scale, names, count)
        scale, draws = self._split(sweep.scale, names, count), [*sweep.draws, (0, AXIS)]
        return _Parts(self)._sweep_places(places, sweep._replace(scale=scale, old_scale=old, draws=draws))

    def _split(self, scale: Scale | Mapping[str, Scale], names: Sequence[str], count: int) -> dict[str, list[float]]:
        """Return for each tensor the scale of every u, then that of the axis."""
        sine, cosine = math.sin(self.angle), math.cos(self.angle)
        of = {name: scales_of(scale, name, count) for name in names}
        return {name: [*(sine * s for s in scales), cosine * sum(scales)] for name, scales in of.items()}


class _Parts(Directions):
    """The parts of :class:`Cone`: u of every index, and the axis."""

    def __init__(self, cone: Cone):
        super().__init__(cone.backend)
        self.cone = cone

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return u, or the axis unless it is still zero; see :meth:`Directions.terms`."""
        if index != AXIS:
            return self.cone.base.terms(places, seed=seed, step=step, index=index)
        return [Values(self.cone.axis[place.name]) if self.cone.length else None for place in places]
