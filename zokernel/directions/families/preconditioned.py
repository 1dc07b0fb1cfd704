r"""Directions scaled by the inverse root of a diagonal, as HiZOO scales them by a Hessian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zokernel.directions.backends import dispatch
from zokernel.directions.base import Directions
from zokernel.directions.families.dense import Dense
from zokernel.directions.terms import Job, Term, Values
from zokernel.directions.weights.placement import Placement, place_all

# Elements whose directions are held at a time: a temporary as large as an embedding would be a fifth of a small model.
WINDOW = 1 << 21


class Preconditioned(Directions):
    r"""Directions :math:`H^{-1/2} z` with a diagonal H by tensor name, generated a window of a tensor at a time.

    Args:
        base: Dense directions z.

    Attributes:
        curvature: H by name, positive, float32; ones when new, and read anew at every use.
    """

    seeded = False

    def __init__(self, base: Dense):
        super().__init__()
        self.base = base
        self.curvature: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"Preconditioned({self.base!r})"

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin with H = 1."""
        for name, tensor in tensors.items():
            self.curvature[name] = torch.ones_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format)

    def gain(self) -> float:
        """Return the mean of 1/H."""
        total = sum(float(h.reciprocal().sum(dtype=torch.float64)) for h in self.curvature.values())
        return total / sum(h.numel() for h in self.curvature.values())

    def draw(self, name: str, begin: int, end: int, *, seed: int, step: int, index: int) -> Tensor:
        """Return z at positions ``begin`` to ``end`` of a tensor, (end - begin,) float32."""
        curvature = self.curvature[name]
        z = torch.zeros(end - begin, dtype=torch.float32, device=curvature.device)
        place = Placement(name, z, z, (curvature.numel(),), (begin,))
        (term,) = self.base.terms([place], seed=seed, step=step, index=index)
        if term is not None:
            dispatch.sweep([Job(place, (term,), (1.0,))], self.backend)
        return z

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the scaled directions of whole tensors as values; see :meth:`Directions.terms`."""
        result: list[Term | None] = []
        for place in places:
            z = self.draw(place.name, 0, place.numel, seed=seed, step=step, index=index)
            for begin, end in windows(z):
                z[begin:end] *= self.curvature[place.name].view(-1)[begin:end].rsqrt()
            result.append(Values(z.view(place.shape)))
        return result

    def sweep_(self, tensors: Mapping[str, Tensor], scale: Any, **kwargs: Any) -> dict[str, float]:
        """Sweep one window after the other, so that only its directions are held; see :meth:`Directions.sweep_`."""
        peaks: dict[str, float] = {}
        step, index = (v if isinstance(v, int) else [*v, 0][0] for v in (kwargs["step"], kwargs["index"]))
        kwargs["rounding"] = kwargs.get("rounding") or (step, index)
        for place in place_all(tensors):
            name, local = place.name, place.local
            if not local.is_contiguous() or tuple(local.shape) != place.shape:
                peaks |= super().sweep_({name: tensors[name]}, scale, **kwargs)
                continue
            for number, (begin, end) in enumerate(windows(local)):
                # Windows count positions from their own start: they need their own bits to round with.
                rounding = kwargs["rounding"][0], kwargs["rounding"][1] + (number << 20)
                window = _Window(self, begin, end)
                found = window.sweep_({name: local.view(-1)[begin:end]}, scale, **kwargs | {"rounding": rounding})
                peaks[name] = max(peaks.get(name, 0.0), found[name])
        return peaks


class _Window(Directions):
    """The directions of :class:`Preconditioned` on a stretch of one tensor."""

    def __init__(self, whole: Preconditioned, begin: int, end: int):
        super().__init__(whole.backend)
        self.whole, self.begin, self.end = whole, begin, end

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the scaled directions of the stretch; see :meth:`Directions.terms`."""
        (place,) = places
        z = self.whole.draw(place.name, self.begin, self.end, seed=seed, step=step, index=index)
        return [Values(z.mul_(self.whole.curvature[place.name].view(-1)[self.begin : self.end].rsqrt()))]


def windows(tensor: Tensor) -> list[tuple[int, int]]:
    """Return begin and end of the stretches of at most ``WINDOW`` elements that make up a tensor."""
    return [(begin, min(begin + WINDOW, tensor.numel())) for begin in range(0, tensor.numel(), WINDOW)]
