r"""The weighted iterate average of KerZOO's Algorithm 1, with or without storing it.

.. math:: \theta^{ag}_{t+1} = \tfrac{1}{\beta_t}\theta_{t+1} + (1 - \tfrac{1}{\beta_t})\,\theta^{ag}_t, \qquad
    \beta_t = 1 + t/6

An iterate's weight grows as the fifth power of its age, so the average sits at 6/7 of the run: it lags the iterate by a
seventh of the steps taken (theory C.2.5).

Stored averages keep the *offset* :math:`D = \theta^{ag} - \theta`.  It is a hundred times smaller than the weights, so
eight bits resolve it where they could not resolve the average itself, and moving the weights to
:math:`\theta^{md} = \theta + (1 - 1/\beta) D` and back loses nothing to cancellation.  A step
:math:`\theta' = d\,\theta + u + k\,\theta_0` gives

.. math:: D' = (1 - \tfrac{1}{\beta}) \left(D + \theta - \theta'\right), \qquad \theta = (\theta' - u - k\theta_0) / d,

where :math:`u = \sum_i scale_i z_i` is regenerated.  The journal stores no tensor at all: every iterate is an affine
function of the last one and of the seeded directions, so the average is too.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zokernel.directions import engine
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Job
from zokernel.errors import RunError
from zokernel.optim.base import Move

if TYPE_CHECKING:
    from zokernel.optim.base import ZerothOrderOptimizer

BLOCK = 256
CHUNK = 1 << 17
TERMS_A_SWEEP = 48
LARGEST_FACTOR = 1e3


def average_weight(step: int) -> float:
    r"""Return :math:`1/\beta_t = 6/(6 + t)`, the weight that the average gives to the iterate after ``step``.

    Example:
        >>> average_weight(0), average_weight(6)
        (1.0, 0.5)
    """
    return 6.0 / (6.0 + step)


@dataclass(frozen=True)
class AffineMove:
    r"""One step of one parameter group: :math:`\theta' = decay\,\theta + \sum_i scale_i z_i + anchor\,\theta_0`."""

    step: int
    scales: dict[int, float]
    decay: float
    anchor: float = 0.0


def split_move(move: Move, anchor: float = 0.0) -> list[AffineMove]:
    """Return a step's move of every parameter group; ``anchor`` is the weight of the initial parameters in it."""
    return [AffineMove(move.step, scales, decay, anchor) for scales, decay in zip(move.scales, move.decays)]


class Average(ABC):
    """Something that knows the averaged iterate of an optimizer's run."""

    @abstractmethod
    def update(self, optimizer: ZerothOrderOptimizer, moves: Sequence[AffineMove]) -> None:
        """Take a step into account, after the weights have moved; one move a parameter group."""

    @abstractmethod
    def offset(self, optimizer: ZerothOrderOptimizer, names: Sequence[str]) -> dict[str, Tensor]:
        r"""Return :math:`\theta^{ag} - \theta` for some parameters."""

    def extra_state(self) -> Any:
        """Return what cannot be kept a tensor a parameter."""
        return None

    def load_extra_state(self, state: Any) -> None:
        """Take over what :meth:`extra_state` returned."""
        del state


class StoredAverage(Average):
    """The offset in fp32: one more copy of the parameters."""

    def update(self, optimizer: ZerothOrderOptimizer, moves: Sequence[AffineMove]) -> None:
        """Advance every offset by one step."""
        by_name = {name: move for move, (_, names) in zip(moves, optimizer.groups()) for name in names}
        for batch in optimizer.batches(list(by_name)):
            offsets = self.offset(optimizer, batch)
            self._advance(optimizer, offsets, by_name)
            self._store(optimizer, offsets, moves[0].step)

    def offset(self, optimizer: ZerothOrderOptimizer, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the stored offsets themselves."""
        return optimizer.buffers("average_offset", names)

    def _advance(
        self, optimizer: ZerothOrderOptimizer, offsets: dict[str, Tensor], by_name: dict[str, AffineMove]
    ) -> None:
        step = next(iter(by_name.values())).step
        keep = 1.0 - average_weight(step)
        if keep == 0.0:
            for offset in offsets.values():
                offset.zero_()
            return
        scales = {name: [-keep * s / by_name[name].decay for s in by_name[name].scales.values()] for name in offsets}
        indices = list(next(iter(by_name.values())).scales)
        optimizer.directions.add_(offsets, scales, seed=optimizer.seed, step=step, index=indices, decay=keep)
        for name, offset in offsets.items():
            weight, move = optimizer.named_params[name], by_name[name]
            if move.decay != 1.0:
                offset.add_(weight, alpha=keep * (1.0 / move.decay - 1.0))
            if move.anchor:
                offset.add_(optimizer.state[weight]["initial"], alpha=-keep * move.anchor / move.decay)

    def _store(self, optimizer: ZerothOrderOptimizer, offsets: dict[str, Tensor], step: int) -> None:
        """Keep advanced offsets; fp32 ones were advanced in place."""


class Int8Average(StoredAverage):
    """The offset in eight bits, in blocks of 256 with an fp32 scale each, rounded stochastically: about 1/4 fp32 copy.

    Offsets are unpacked a hundred thousand at a time.  Rounding is unbiased, so errors of different steps average out
    instead of freezing small changes.
    """

    def update(self, optimizer: ZerothOrderOptimizer, moves: Sequence[AffineMove]) -> None:
        """Advance every offset by one step, some rows of a tensor at a time."""
        by_name = {name: move for move, (_, names) in zip(moves, optimizer.groups()) for name in names}
        for batch in optimizer.batches(list(by_name)):
            if len(batch) > 1 or optimizer.named_params[batch[0]].ndim == 0:
                offsets = self.offset(optimizer, batch)
                self._advance(optimizer, offsets, by_name)
                self._store(optimizer, offsets, moves[0].step)
            else:
                self._advance_rows(optimizer, batch[0], by_name[batch[0]])

    def _advance_rows(self, optimizer: ZerothOrderOptimizer, name: str, move: AffineMove) -> None:
        weight = optimizer.named_params[name]
        codes, scales = self._storage(optimizer, name)
        shape, width = tuple(weight.shape), math.prod(weight.shape[1:])
        # Pieces start at a quantization block: whole rows, their elements a multiple of 256.
        unit = BLOCK // math.gcd(BLOCK, width) if width else 1
        height = max(unit, CHUNK // max(1, width) // unit * unit)
        keep = 1.0 - average_weight(move.step)
        generator = torch.Generator(weight.device)
        generator.manual_seed(_rounding_seed(optimizer.seed, move.step, name))
        for row in range(0, shape[0], height):
            piece = torch.zeros((min(height, shape[0] - row), *shape[1:]), device=weight.device)
            begin, end = row * width, row * width + piece.numel()
            blocks = scales[begin // BLOCK : math.ceil(end / BLOCK)]
            if keep > 0.0:
                dequantize(codes[begin:end], blocks, out=piece.view(-1))
                place = Placement(name, piece, piece, shape, (row, *(0 for _ in shape[1:])))
                draw = {"seed": optimizer.seed, "step": move.step}
                terms = [optimizer.directions.terms([place], index=i, **draw)[0] for i in move.scales]  # type: ignore[attr-defined]
                factors = tuple(-keep * scale / move.decay for scale in move.scales.values())
                engine.sweep([Job(place, tuple(terms), factors, decay=keep)])
                rows = slice(row, row + height)
                if move.decay != 1.0:
                    piece.add_(weight[rows], alpha=keep * (1.0 / move.decay - 1.0))
                if move.anchor:
                    piece.add_(optimizer.state[weight]["initial"][rows], alpha=-keep * move.anchor / move.decay)
            quantize_(codes[begin:end], blocks, piece.view(-1), generator)

    def _storage(self, optimizer: ZerothOrderOptimizer, name: str) -> tuple[Tensor, Tensor]:
        weight = optimizer.named_params[name]
        state = optimizer.state[weight]
        if "average_int8" not in state:
            blocks = math.ceil(weight.numel() / BLOCK)
            state["average_int8"] = torch.zeros(weight.numel(), dtype=torch.int8, device=weight.device)
            state["average_scale"] = torch.zeros(blocks, dtype=torch.float32, device=weight.device)
        return state["average_int8"], state["average_scale"]

    def offset(self, optimizer: ZerothOrderOptimizer, names: Sequence[str]) -> dict[str, Tensor]:
        """Unpack the stored offsets."""
        found = {}
        for name in names:
            weight = optimizer.named_params[name]
            state = optimizer.state[weight]
            found[name] = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
            if "average_int8" in state:
                dequantize(state["average_int8"], state["average_scale"], out=found[name].view(-1))
        return found

    def _store(self, optimizer: ZerothOrderOptimizer, offsets: dict[str, Tensor], step: int) -> None:
        for name, offset in offsets.items():
            codes, scales = self._storage(optimizer, name)
            generator = torch.Generator(offset.device)
            generator.manual_seed(_rounding_seed(optimizer.seed, step, name))
            quantize_(codes, scales, offset.view(-1), generator)


class JournalAverage(Average):
    """Scalars only: the average is rebuilt by regenerating the directions of the whole run, when it is asked for."""

    def __init__(self) -> None:
        self.moves: list[list[AffineMove]] = []
        # Coefficients by parameter group, for a journal of the length they were computed at.
        self._known: tuple[int, dict[int, tuple[float, list[float]]]] = (0, {})

    def update(self, optimizer: ZerothOrderOptimizer, moves: Sequence[AffineMove]) -> None:
        """Write the step down."""
        self.moves.append(list(moves))

    def offset(self, optimizer: ZerothOrderOptimizer, names: Sequence[str]) -> dict[str, Tensor]:
        """Rebuild the offsets by regenerating every direction of the run."""
        offsets: dict[str, Tensor] = {}
        scales: dict[str, list[float]] = {}
        for number, (_, group_names) in enumerate(optimizer.groups()):
            for name in set(group_names) & set(names):
                weight = optimizer.named_params[name]
                initial = optimizer.state[weight].get("initial")
                end, scales[name] = self._coefficients(number, from_first=initial is not None)
                if initial is None:
                    offsets[name] = weight.detach().to(_wide(weight), copy=True).mul_(end - 1.0)
                else:
                    offsets[name] = initial.to(_wide(weight), copy=True).mul_(end).sub_(weight)
        terms = [(move.step, index) for move, *_ in self.moves for index in move.scales]
        for begin in range(0, len(terms), TERMS_A_SWEEP):
            part = slice(begin, begin + TERMS_A_SWEEP)
            steps, indices = map(list, zip(*terms[part]))
            some = {name: values[part] for name, values in scales.items()}
            optimizer.directions.add_(offsets, some, seed=optimizer.seed, step=steps, index=indices)
        return offsets

    def _coefficients(self, group: int, *, from_first: bool) -> tuple[float, list[float]]:
        """Factor on the last or the initial weights, and one on every direction of the run, for a parameter group."""
        if self._known[0] != len(self.moves):
            self._known = len(self.moves), {}
        if group not in self._known[1]:
            run = [moves[group] for moves in self.moves]
            end, updates = coefficients_from_first(run) if from_first else coefficients_from_last(run)
            flat = [factor * scale for move, factor in zip(run, updates) for scale in move.scales.values()]
            self._known[1][group] = end, flat
        return self._known[1][group]

    def extra_state(self) -> Any:
        """Return the journal as plain numbers."""
        return [[(m.step, dict(m.scales), m.decay, m.anchor) for m in moves] for moves in self.moves]

    def load_extra_state(self, state: Any) -> None:
        """Take a saved journal over."""
        self.moves = [[AffineMove(*fields) for fields in moves] for moves in state]


AVERAGES: dict[str, type[Average]] = {"fp32": StoredAverage, "int8": Int8Average, "journal": JournalAverage}


def iterate_weights(steps: Sequence[int]) -> list[float]:
    r"""Return the weight :math:`w_{t+1}` of the iterate after each step in the average after the last.

    Example:
        >>> [round(w, 4) for w in iterate_weights(range(3))]
        [0.0357, 0.2143, 0.75]
    """
    weights, remaining = [average_weight(step) for step in steps], 1.0
    for t in reversed(range(len(weights))):
        weights[t], remaining = weights[t] * remaining, remaining * (1.0 - weights[t])
    return weights


def coefficients_from_last(moves: Sequence[AffineMove]) -> tuple[float, list[float]]:
    r"""Express the averaged iterate by the last one and the run's updates, going backwards.

    With :math:`\theta_{s+1} = d_s\theta_s + u_s` and weights :math:`w_t` of the average,

    .. math:: \theta^{ag} = A\,\theta_T - \sum_s c_s u_s, \quad c_s = (c_{s-1} + w_s)/d_s,\; c_0 = 0,\;
        A = c_{T-1} + w_T.

    Args:
        moves: The run's moves of one parameter group, from its first step on.

    Returns:
        The factor on the last iterate, and one on each move's update.

    Raises:
        RunError: If decay has shrunk the weights so much that going back would magnify their rounding errors.

    Example:
        >>> last, updates = coefficients_from_last([AffineMove(t, {0: 1.0}, 1.0) for t in range(3)])
        >>> round(last, 12), [round(c, 4) for c in updates]
        (1.0, [-0.0, -0.0357, -0.25])
    """
    weights = iterate_weights([move.step for move in moves])
    factors, carried = [], 0.0
    for s, move in enumerate(moves):
        # weights[s - 1] is the weight of the iterate before step s; the initial one has none, because beta_0 is one.
        carried = (carried + (weights[s - 1] if s else 0.0)) / move.decay
        factors.append(-carried)
    last = carried + weights[-1] if moves else 1.0
    if abs(last) > LARGEST_FACTOR:
        raise RunError(
            f"Decay or projection shrank the weights so much that rebuilding their average from the journal would "
            f"magnify rounding errors {last:.3g} times: use averaging='fp32' or 'int8'."
        )
    return last, factors


def coefficients_from_first(moves: Sequence[AffineMove]) -> tuple[float, list[float]]:
    r"""Express the averaged iterate by the initial weights and the run's updates, going forwards.

    With :math:`\theta_{s+1} = d_s\theta_s + u_s + k_s\theta_0`,

    .. math:: \theta^{ag} = \Big(d_0\lambda_1 + \sum_s k_s \lambda_{s+1}\Big)\theta_0 + \sum_s \lambda_{s+1} u_s, \qquad
        \lambda_t = w_t + d_t \lambda_{t+1}.

    Args:
        moves: The run's moves of one parameter group, from its first step on.

    Returns:
        The factor on the initial weights, and one on each move's update.

    Example:
        >>> first, updates = coefficients_from_first([AffineMove(t, {0: 1.0}, 1.0) for t in range(3)])
        >>> round(first, 12), [round(c, 4) for c in updates]
        (1.0, [1.0, 0.9643, 0.75])
    """
    weights = iterate_weights([move.step for move in moves])
    factors, carried, first = [0.0] * len(moves), 0.0, 0.0
    for s in reversed(range(len(moves))):
        carried = weights[s] + (moves[s + 1].decay * carried if s + 1 < len(moves) else 0.0)
        factors[s] = carried
        first += moves[s].anchor * carried
    return (first + moves[0].decay * carried if moves else 1.0), factors


def quantize_(codes: Tensor, scales: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Round ``values`` stochastically to eight bits with one scale a block of 256, into ``codes`` and ``scales``.

    Args:
        codes: (n,) int8, overwritten.
        scales: (ceil(n / 256),) float32, overwritten: the blocks' largest magnitudes over 127.
        values: (n,) float32.
        generator: Source of the rounding.

    Example:
        >>> codes, scales = torch.zeros(3, dtype=torch.int8), torch.zeros(1)
        >>> quantize_(codes, scales, torch.tensor([0.0, 1.27, -0.5]), torch.Generator().manual_seed(0))
        >>> codes.tolist()[:2], round(float(scales[0]), 6)
        ([0, 127], 0.01)
    """
    for begin, end in _chunks(values.numel()):
        blocks, length = _blocks(values[begin:end])
        scale = blocks.abs().amax(dim=1) / 127.0
        first = begin // BLOCK
        scales[first : first + len(scale)] = scale
        noise = torch.rand(blocks.shape, generator=generator, device=values.device)
        steps = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
        # The largest magnitude sits on +-127 up to rounding, so the clamp never changes a value by more than an ulp.
        codes[begin:end] = torch.floor(steps + noise).clamp_(-127, 127).view(-1)[:length].to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor, *, out: Tensor) -> None:
    """Write what ``codes`` and ``scales`` of :func:`quantize_` stand for to ``out``, (n,) float32."""
    for begin, end in _chunks(codes.numel()):
        first, last = begin // BLOCK, math.ceil(end / BLOCK)
        per_value = scales[first:last].repeat_interleave(BLOCK)[: end - begin]
        torch.mul(codes[begin:end], per_value, out=out[begin:end])


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, CHUNK):
        yield begin, min(begin + CHUNK, count)


def _blocks(values: Tensor) -> tuple[Tensor, int]:
    length = values.numel()
    padded = torch.nn.functional.pad(values, (0, -length % BLOCK))
    return padded.view(-1, BLOCK), length


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rounding_seed(seed: int, step: int, name: str) -> int:
    """Seed of one tensor's rounding at one step; a pure function, so that resumed runs round alike."""
    digest = hashlib.blake2b(f"average/{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def total_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm over all tensors, accumulated in fp32 or wider."""
    return math.sqrt(math.fsum(float(torch.linalg.vector_norm(t, dtype=_wide(t))) ** 2 for t in tensors.values()))
