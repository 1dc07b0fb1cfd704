r"""The base class of every family of directions: it adds a family's terms to weights, or returns them as tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from zokernel.directions.backends import dispatch
from zokernel.directions.philox import MAX_COUNT, stream_key
from zokernel.directions.placement import Placement, place_all
from zokernel.directions.terms import Job, Rule, Term
from zokernel.errors import UsageError

NO_ROUNDING = (0, 0, 0, 0)
Scale = float | Sequence[float]
"""One factor for all directions of a call, or one per direction."""
T = TypeVar("T")
V = TypeVar("V")


class Sweep(NamedTuple):
    """What one sweep does to some weights: the arguments of :meth:`Directions.sweep_`, except the weights."""

    scale: Scale | Mapping[str, Scale]
    rule: Rule | Mapping[str, Rule]
    seed: int
    draws: list[tuple[int, int]]
    decay: float | Mapping[str, float] = 1.0
    old_scale: Scale | Mapping[str, Scale] | None = None
    grid: Mapping[str, float] | None = None
    rounding: tuple[int, int] = (0, 0)


class Directions(ABC):
    """A family of random directions; subclasses say what a direction is by implementing :meth:`terms`.

    Args:
        backend: ``auto`` (the fastest for each tensor's device), ``numba``, ``triton`` or ``torch``.

    Attributes:
        seeded: Whether a direction is a function of (seed, step, index, name, position) and of what :meth:`prepare`
            took, so that it can be generated again at any later step.
    """

    seeded: bool = True

    def __init__(self, backend: str = "auto"):
        dispatch.check_backend(backend)
        self.backend = backend

    @property
    def couples_tensors(self) -> bool:
        """Whether the direction on one tensor depends on which other tensors are in the call.

        If so, every call must name all tensors of the run: a direction cannot be taken one tensor at a time.
        """
        return False

    def gain(self) -> float:
        r"""Return :math:`tr\, E[z z^T] / d` over the d coordinates that move: how much longer a mean step is."""
        return 1.0

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027  (most families need nothing)
        """Take what the family needs from unperturbed weights; an optimizer calls it once, before its first step.

        Args:
            tensors: Weights by name.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold so that a resumed run draws the same directions."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from a checkpoint.

        Args:
            state: What :meth:`state_dict` returned.
        """

    @abstractmethod
    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return what direction ``index`` of ``step`` is on each tensor; None where it is zero.

        Args:
            places: The tensors of one call, in order.
            seed: Seed of the run.
            step: Step of the run.
            index: Which direction of that step.

        Returns:
            One term per tensor.
        """

    def __call__(self, like: Mapping[str, Tensor], *, seed: int, step: int, index: int) -> dict[str, Tensor]:
        """Return one direction as tensors.

        Args:
            like: Tensors by name; each direction has their shapes, dtypes and devices.
            seed: Seed of the run, in [0, 2^63).
            step: Step of the run, in [0, 2^32).
            index: Which direction of that step, in [0, 2^32).

        Returns:
            The direction, by name.  Two names of the same memory (tied weights) get the same tensor.
        """
        places = place_all(like)
        # Terms come from the tensors given, not from the zeros they are added to: a family may look at the weights.
        terms = self.terms(places, seed=seed, step=check_count(step, "step"), index=check_count(index, "index"))
        result = {p.name: torch.zeros_like(p.tensor, memory_format=torch.contiguous_format) for p in places}
        targets = place_all(result)
        jobs = [Job(t, (term,), (1.0,)) for t, term in zip(targets, terms, strict=True) if term is not None]
        dispatch.sweep(jobs, self.backend)
        twins = {_identity(place.local): result[place.name] for place in places}
        return {name: result[name] if name in result else twins[_identity(t)] for name, t in like.items()}

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

        Sums are formed in float32 (float64 for float64 weights and for stochastic rounding) and rounded once.

        Args:
            tensors: Weights by name, changed in place.
            scale: One number per index; or a mapping from name to such numbers.
            seed: Seed of the run, in [0, 2^63).
            step: Step of the run, in [0, 2^32); or one step per index, to add directions of several steps.
            index: Which direction of that step; a list adds several in the same sweep.
            decay: Factor on the old weights, one for all or by name.
            stochastic: Round float32, bfloat16 and float16 weights stochastically instead of to nearest; float64
                weights always round to nearest.  The random bits depend on (seed, first step, first index, name), so
                they repeat in replay.

        Raises:
            UsageError: If names, numbers of scales, seeds or dtypes do not fit.
        """
        rule = Rule.STOCHASTIC if stochastic else Rule.NEAREST
        self.sweep_(tensors, scale, rule=rule, seed=seed, step=step, index=index, decay=decay)

    def sweep_(
        self,
        tensors: Mapping[str, Tensor],
        scale: Scale | Mapping[str, Scale],
        *,
        rule: Rule | Mapping[str, Rule],
        seed: int,
        step: int | Sequence[int],
        index: int | Sequence[int],
        decay: float | Mapping[str, float] = 1.0,
        old_scale: Scale | Mapping[str, Scale] | None = None,
        grid: Mapping[str, float] | None = None,
        rounding: tuple[int, int] | None = None,
    ) -> dict[str, float]:
        """Carry out one sweep by any rule of :class:`~zokernel.directions.terms.Rule`; :meth:`add_` is built on it.

        Args:
            tensors: Weights by name, changed in place.
            scale: As in :meth:`add_`.
            rule: How results are stored, for all or by name.
            seed: As in :meth:`add_`.
            step: As in :meth:`add_`.
            index: As in :meth:`add_`.
            decay: As in :meth:`add_`.
            old_scale: Scales of the offsets that the weights carry now (grid rules).
            grid: Grid step by name (grid rules).
            rounding: Step and index that key the random bits of stochastic rules; by default the first of the sweep.

        Returns:
            The largest magnitude that each tensor reached (grid rules; zeros otherwise).
        """
        draws = draws_of(step, index)
        rounding = rounding or (draws[0] if draws else (0, 0))
        sweep = Sweep(scale, rule, seed, draws, decay, old_scale, grid, rounding)
        if self._sweep_prepared(tensors, sweep):
            return dict.fromkeys(tensors, 0.0)
        return self._sweep_places(place_all(tensors), sweep)

    def _sweep_prepared(self, tensors: Mapping[str, Tensor], sweep: Sweep) -> bool:
        """Carry out a sweep by tables kept from an earlier one, if there are any; return whether it was done."""
        return False

    def _sweep_places(self, places: Sequence[Placement], sweep: Sweep) -> dict[str, float]:
        """Carry out a sweep over weights that have been found in memory; the same contract as :meth:`sweep_`."""
        scale, rule, seed, draws, decay, old_scale, grid, rounding = sweep
        by_index = [self.terms(places, seed=seed, step=s, index=i) for s, i in draws]
        # Settings that all tensors share are checked once: there may be hundreds of tensors, several times per step.
        shared = None if isinstance(scale, Mapping) else scales_of(scale, "", len(draws))
        no_offsets = [0.0] * len(draws)
        jobs = []
        for place, terms in zip(places, zip(*by_index) if by_index else [()] * len(places)):
            scales = scales_of(scale, place.name, len(draws)) if shared is None else shared
            old = no_offsets if old_scale is None else scales_of(old_scale, place.name, len(draws))
            live = [
                (term, now, before)
                for term, now, before in zip(terms, scales, old)
                if term is not None and (now != 0.0 or before != 0.0)
            ]
            job_rule = rule[place.name] if isinstance(rule, Mapping) else rule
            jobs.append(
                Job(
                    place,
                    tuple([term for term, _, _ in live]),
                    tuple([now for _, now, _ in live]),
                    job_rule,
                    decay if isinstance(decay, float) else by_name(decay, place.name, "decay"),
                    tuple([before for _, _, before in live]) if old_scale is not None else (),
                    1.0 if grid is None else grid[place.name],
                    (*stream_key(seed, place.name, "rounding"), *rounding) if job_rule else NO_ROUNDING,
                )
            )
        peaks: dict[str, float] = {}
        for place, peak in zip(places, dispatch.sweep(jobs, self.backend)):
            peaks[place.name] = max(peak, peaks.get(place.name, 0.0))
        return peaks


def _identity(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def check_count(value: int, what: str) -> int:
    """Return a step or an index if it fits one 32-bit word of Philox's counter.

    Args:
        value: A step or an index.
        what: Its name in the error message.

    Returns:
        The value as an int.

    Raises:
        UsageError: If it is negative, 2^32 or more, or not an integer.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= value.__index__() < MAX_COUNT:
        raise UsageError(f"The {what} {value!r} of a direction must be an integer from 0 to 2^32 - 1.")
    return value.__index__()


def draws_of(step: int | Sequence[int], index: int | Sequence[int]) -> list[tuple[int, int]]:
    """Return step and index of every direction, given one step for all or one per index."""
    indices = [index] if isinstance(index, int) else list(index)
    steps = [step] * len(indices) if isinstance(step, int) else list(step)
    if len(steps) != len(indices):
        raise UsageError(f"{len(steps)} steps do not fit {len(indices)} direction indices: give one step per index.")
    return [(check_count(s, "step"), check_count(i, "index")) for s, i in zip(steps, indices)]


def by_name(value: float | Mapping[str, float], name: str, what: str) -> float:
    """Return a tensor's number, given one for all or one by name; ``what`` names it in the error message."""
    if isinstance(value, (float, int)):
        return float(value)
    if name not in value:
        raise UsageError(f"There is no {what} for tensor {name!r}: give one for every name, or a single number.")
    return float(value[name])


def once_each(values: Mapping[str, V], make: Callable[[V], T]) -> dict[str, T]:
    """Return what ``make`` makes of every value, called once for values that are one object.

    Hundreds of tensors mostly share their coefficients, and there are several sweeps per step.
    """
    results = {key: make(value) for key, value in {id(value): value for value in values.values()}.items()}
    return {name: results[id(value)] for name, value in values.items()}


def scales_by_tensor(scale: Scale | Mapping[str, Scale], names: Sequence[str], count: int) -> list[list[float]]:
    """Return the scales of every tensor, ``count`` each; lists given for several tensors are looked at once."""
    if not isinstance(scale, Mapping):
        return [scales_of(scale, "", count)] * len(names)
    if any(name not in scale for name in names):
        return [scales_of(scale, name, count) for name in names]  # which raises the error that names the tensor
    scales = once_each({name: scale[name] for name in names}, lambda value: scales_of(value, "", count))
    return [scales[name] for name in names]


def scales_of(scale: Scale | Mapping[str, Scale], name: str, count: int) -> list[float]:
    """Return a tensor's scales, ``count`` of them, given those of all or those by name."""
    if isinstance(scale, Mapping):
        if name not in scale:
            raise UsageError(f"There is no scale for tensor {name!r}: give one for every name, or a single number.")
        scale = scale[name]
    scales = [float(s) for s in scale] if isinstance(scale, Sequence) else [float(scale)]
    if len(scales) != count:
        raise UsageError(f"{len(scales)} scales do not fit {count} direction indices: give one scale per index.")
    return scales
