r"""Directions scaled by the inverse root of a diagonal curvature (HiZOO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokernel.directions.backends import dispatch
from zokernel.directions.base import Directions, Sweep
from zokernel.directions.families.dense import Dense
from zokernel.directions.placement import Placement, pieces, place
from zokernel.directions.terms import Job, Term, Values
from zokernel.errors import UsageError

WINDOW = 1 << 21
"""Elements whose directions are held at a time: those of a whole embedding would be a fifth of a small model."""


class Preconditioned(Directions):
    r"""Directions :math:`\tilde z = H^{-1/2} z` with a positive diagonal H and dense z.

    Then :math:`E[(g \cdot \tilde z)\,\tilde z] = H^{-1} g`.  The directions are generated for a window of a tensor at a
    time, so only H is stored.  A DTensor's H is sharded as the weights are; positions are those of the whole tensor.

    Args:
        base: The directions z, with independent coordinates.

    Attributes:
        curvature: H by tensor name: float32, contiguous, of the tensor's shape; ones after :meth:`prepare`.  It is read
            at every use.  A checkpoint must hold it, so an optimizer keeps the same tensors in its own state.

    Raises:
        UsageError: If the coordinates of z depend on each other.

    Example:
        >>> weights = {"w": torch.zeros(2)}
        >>> directions = Preconditioned(Dense("rademacher"))
        >>> directions.prepare(weights)
        >>> directions.curvature["w"].copy_(torch.tensor([4.0, 25.0]))
        tensor([ 4., 25.])
        >>> directions(weights, seed=0, step=0, index=0)["w"].abs()
        tensor([0.5000, 0.2000])

    References:
        Zhao et al. (2024), Second-Order Fine-Tuning without Pain for LLMs: A Hessian Informed Zeroth-Order Optimizer,
        arXiv:2402.15173.
    """

    seeded = False

    def __init__(self, base: Dense):
        super().__init__(base.backend)
        if base.couples_tensors:
            raise UsageError(f"Preconditioned directions need independent coordinates, unlike {base!r}: use gaussian.")
        self.base, self.distribution = base, base.distribution
        self.curvature: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"Preconditioned({self.base!r})"

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Set H to one for tensors that have none yet.

        Args:
            tensors: Weights by name.
        """
        for name, tensor in tensors.items():
            if name not in self.curvature:
                like = tensor.detach()
                ones = torch.ones_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
                self.curvature[name] = ones

    def gain(self) -> float:
        """Return the mean of 1 / H: the mean step is 1 / H times the gradient.

        With a sharded H every process must call it.
        """
        total = sum(float(_whole(h.reciprocal().sum(dtype=torch.float64))) for h in self.curvature.values())
        return total / sum(h.numel() for h in self.curvature.values()) if self.curvature else 1.0

    def learn(
        self, curvatures: Sequence[float], smooth: float, *, seed: int, step: int, names: Sequence[str] | None = None
    ) -> None:
        r"""Move H towards the curvature that a step has measured along each of its directions.

        .. math:: H \leftarrow (1-\alpha) H + \frac{\alpha}{2P} \sum_i |c_i|\, H z_i^2

        Args:
            curvatures: The second difference :math:`c_i` of the loss along each of the P directions of the step.
            smooth: :math:`\alpha`, the weight of the new curvature, in [0, 1).
            seed: Seed of the run.
            step: Step of the run.
            names: Tensors that moved in the step; all when not given.
        """
        for name in self.curvature if names is None else names:
            curvature = self.curvature[name]
            placement = place(name, curvature)
            for begin, end in windows(placement):
                parts = pieces(placement, begin, end)
                if not parts:
                    continue
                growth = torch.full((end - begin,), 1 - smooth, dtype=torch.float32, device=placement.local.device)
                for index, value in enumerate(curvatures):
                    z = self.draw(name, begin, end, seed=seed, step=step, index=index)
                    growth.add_(z.square_(), alpha=smooth * abs(value) / 2 / len(curvatures))
                for part in parts:
                    part.local.mul_(_part_of(growth, part))

    def draw(self, name: str, begin: int, end: int, *, seed: int, step: int, index: int) -> Tensor:
        """Return z, without H, at positions ``begin`` to ``end`` of a whole tensor.

        Args:
            name: The tensor's name.
            begin: First position.
            end: Position after the last.
            seed: Seed of the run.
            step: Step of the run.
            index: Which direction of that step.

        Returns:
            (end - begin,) float32.
        """
        curvature = self.curvature[name]
        z = torch.zeros(end - begin, dtype=torch.float32, device=curvature.device)
        placement = Placement(name, z, z, (curvature.numel(),), (begin,))
        (term,) = self.base.terms([placement], seed=seed, step=step, index=index)
        if term is not None:
            dispatch.sweep([Job(placement, (term,), (1.0,))], self.backend)
        return z

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the scaled directions of whole tensors as values; see :meth:`Directions.terms`.

        Elements that other processes hold are not scaled.
        """
        result: list[Term | None] = []
        for whole in places:
            z = self.draw(whole.name, 0, whole.numel, seed=seed, step=step, index=index)
            for begin, end in windows(whole):
                self._scale(z[begin:end], whole.name, begin, end)
            result.append(Values(z.view(whole.shape)))
        return result

    def _sweep_places(self, places: Sequence[Placement], sweep: Sweep) -> dict[str, float]:
        """Sweep one window after the other, so that only its directions are held."""
        peaks = dict.fromkeys([whole.name for whole in places], 0.0)
        for whole in places:
            for number, (begin, end) in enumerate(windows(whole)):
                parts = pieces(whole, begin, end)
                # Windows count positions from their own start: they need their own bits to round with.
                rounding = sweep.rounding[0], sweep.rounding[1] + (number << 20)
                if parts:
                    window_peaks = _Window(self, begin, end)._sweep_places(parts, sweep._replace(rounding=rounding))
                    peaks[whole.name] = max(peaks[whole.name], window_peaks[whole.name])
        return peaks

    def _scale(self, z: Tensor, name: str, begin: int, end: int) -> None:
        """Scale z at positions ``begin`` to ``end`` by the part of H that is held here."""
        for part in pieces(place(name, self.curvature[name]), begin, end):
            _part_of(z, part).mul_(part.local.rsqrt())


class _Window(Directions):
    """The directions of :class:`Preconditioned` on a stretch of one tensor, which is held in one or several parts."""

    def __init__(self, whole: Preconditioned, begin: int, end: int):
        super().__init__(whole.backend)
        self.whole, self.begin, self.end = whole, begin, end

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the scaled directions of the stretch for each of its parts; see :meth:`Directions.terms`."""
        name = places[0].name
        z = self.whole.draw(name, self.begin, self.end, seed=seed, step=step, index=index)
        self.whole._scale(z, name, self.begin, self.end)
        return [Values(z)] * len(places)


def windows(tensor: Tensor | Placement) -> list[tuple[int, int]]:
    """Return begin and end of the stretches of at most ``WINDOW`` elements that make up a whole tensor."""
    numel = tensor.numel if isinstance(tensor, Placement) else tensor.numel()
    return [(begin, min(begin + WINDOW, numel)) for begin in range(0, numel, WINDOW)]


def _part_of(values: Tensor, part: Placement) -> Tensor:
    (begin,) = part.offset
    return values[begin : begin + part.local.numel()]


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
