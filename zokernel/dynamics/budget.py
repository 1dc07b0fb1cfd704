"""How long until a loss is reached, and how many perturbations per step reach it with the fewest loss evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.dynamics.descent import resolve_moments
from zokernel.dynamics.evolution import Evolution
from zokernel.errors import UsageError
from zokernel.theory.stability import stability_limit_of_features
from zokernel.values import is_number

MAX_STEPS = 10**9
DIVERGED = 1e150  # a second moment that does not come back, well before it overflows
ROUNDING = 1e-12  # by which a loss may miss the wanted one, relative
MAX_DENSE_STEPS = 20_000  # distributions with a diagonal term have no closed form to jump ahead with
LR_FRACTIONS = tuple(0.02 * 1.18**k for k in range(24))  # 0.02 ... 0.9 of the stability limit


def steps_to_reach(
    evolution: Evolution, loss: float, *, max_steps: int = MAX_STEPS, of_mean: bool = False
) -> int | None:
    """Return the first step at which the expected loss is at or below ``loss``.

    Args:
        evolution: The run.
        loss: Wanted loss.
        max_steps: Last step looked at.
        of_mean: Look at the loss of the mean path instead (the curve of the published figures).

    Returns:
        The step, or None if it is not reached within ``max_steps``, or within 20,000 steps for distributions whose
        second moment has to be followed step by step.  Above the stability limit the loss diverges in the end, but slow
        unstable modes let it fall first.

    Raises:
        UsageError: If the loss is no finite number, or below what the model can fit at all.

    Example:
        >>> import torch
        >>> evolution = Evolution(torch.zeros(1), torch.ones(1), torch.ones(1, 1), lr=0.5)
        >>> steps_to_reach(evolution, 0.01)
        3
    """
    if not is_number(loss):
        raise UsageError(f"The loss to reach must be a finite number, not {loss!r}.")
    if loss <= evolution.floor:
        raise UsageError(
            f"A loss of {loss:.4g} cannot be reached: the kernel has rank {evolution.rank} for {len(evolution.f0)} "
            f"predictions, and the targets outside its range leave {evolution.floor:.4g}."
        )
    if evolution.moments.diagonal and not of_mean:
        target_trace = 2 * evolution.n * (loss - evolution.floor)
        states = evolution.dense_states(min(max_steps, MAX_DENSE_STEPS))
        traces = itertools.takewhile(lambda trace: trace < DIVERGED, (float(state.trace()) for state in states))
        return next((step for step, trace in enumerate(traces) if trace <= target_trace), None)
    coefficients, factors = evolution.loss_modes(of_mean=of_mean)
    excess = coefficients.new_tensor([(evolution.floor - loss) * (1 + ROUNDING)])
    return _first_crossing(torch.cat([coefficients, excess]), torch.cat([factors, torch.ones_like(excess)]), max_steps)


def _first_crossing(coefficients: Tensor, factors: Tensor, last: int) -> int | None:
    r"""Return the first t from 0 to ``last`` with :math:`\sum_k c_k b_k^t \le 0`, which may rise and fall; else None.

    On steps s to t the sum is at least :math:`\sum_{c_k > 0} c_k b_k^t + \sum_{c_k < 0} c_k b_k^s` if no factor is
    above one.  Stretches where that is positive are left out, and the others are halved.
    """
    present = coefficients != 0
    coefficients, factors = coefficients[present], factors[present]
    scaled = factors / factors.max().clamp_min(1.0)  # which changes no sign, and overflows nowhere
    stretches = [(0, last)]
    while stretches:
        first, end = stretches.pop()
        least = torch.where(coefficients > 0, coefficients * scaled**end, coefficients * scaled**first).sum()
        if not least <= 0:
            continue
        if first == end:
            return first
        middle = (first + end) // 2
        stretches += [(middle + 1, end), (first, middle)]
    return None


@dataclass(frozen=True)
class QueryRow:
    """What one number of perturbations costs to reach a loss.

    Attributes:
        num_perturbations: Directions P per step.
        lr: Learning rate used.
        limit: Largest stable learning rate.
        steps: Steps until the loss is reached; None if it is not.
        queries: Loss evaluations until then, 2 P per step; None if it is not.
    """

    num_perturbations: int
    lr: float
    limit: float
    steps: int | None
    queries: int | None


def query_budget(
    f0: Tensor,
    y: Tensor,
    kernel: Tensor,
    loss: float,
    *,
    num_perturbations: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    lr: float | None = None,
    distribution: str | Distribution = "gaussian",
    coupling: str = "zo_sgd",
    features: Tensor | None = None,
    dim: int | None = None,
) -> list[QueryRow]:
    """Return what every number of perturbations costs to reach a loss; the best has the fewest queries.

    Args:
        f0: Initial predictions, (n,).
        y: Targets, (n,).
        kernel: NTK, (n, n).
        loss: Wanted expected loss.
        num_perturbations: The numbers P to compare.
        lr: One learning rate for all; when not given, the best of 24 fractions of each P's stability limit.
        distribution: Distribution of the directions; Gaussian by default, the setting of the NZK paper.
        coupling: ``zo_sgd``, ``shared`` or ``independent``.
        features: Features, as for :func:`zokernel.dynamics.zo_descent`.
        dim: Number of parameters, as for :func:`zokernel.dynamics.zo_descent`.

    Returns:
        One row for each P.

    Raises:
        UsageError: If the loss cannot be reached by any number of steps, or the input is not usable.

    Example:
        >>> import torch
        >>> kernel = 2 * torch.eye(2, dtype=torch.float64)
        >>> rows = query_budget(torch.zeros(2), torch.ones(2), kernel, loss=0.01, num_perturbations=[1, 4])
        >>> min(rows, key=lambda row: row.queries).num_perturbations
        1
    """
    moments = resolve_moments(distribution, coupling, features, dim)
    start = Evolution(f0, y, kernel, 1.0, moments=moments, features=features if moments.diagonal else None)
    rows = []
    for count in num_perturbations:
        if moments.diagonal and features is not None:
            limit = stability_limit_of_features(features, count, coupling, distribution=distribution)
        else:
            limit = start.at(1.0, num_perturbations=count).stability_limit
        best: tuple[int | None, float] = (None, limit if lr is None else lr)
        for rate in [lr] if lr is not None else [fraction * limit for fraction in LR_FRACTIONS]:
            steps = steps_to_reach(start.at(rate, num_perturbations=count), loss)
            if steps is not None and (best[0] is None or steps < best[0]):
                best = (steps, rate)
        rows.append(QueryRow(count, best[1], limit, best[0], None if best[0] is None else 2 * count * best[0]))
    return rows
