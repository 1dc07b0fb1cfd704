r"""What one zeroth-order step on a quadratic loss is worth, and which batch and directions are worth most.

With curvature H (in networks: Gauss-Newton) and the gradient g of the whole loss, a step of rate :math:`\eta` along an
unbiased :math:`\hat g` changes the loss by :math:`-\eta \|g\|^2 + \frac{\eta^2}{2} E[\hat g^T H \hat g]` on average.
With :math:`Q = E[\hat g^T H \hat g] / g^T H g` the best rate and the best decrease are both :math:`1/Q` of those of a
step along g itself.  Three numbers decide Q (docs/theory.md, "E.4 What a step is worth"):

.. math:: r = \frac{tr H\, \|g\|^2}{g^T H g}, \qquad \nu = \frac{tr \Sigma}{\|g\|^2}, \qquad
          r_{noise} = \frac{tr H\, tr \Sigma}{tr(H \Sigma)} .

What this leaves out: the best rate of one step is not the best rate of a run (curvature changes, and rates are bounded
by :mod:`~zokernel.theory.batch_stability`); a one-sided difference adds :math:`\frac{\epsilon}{2} z^T H z` to each
slope; rounding; and the terms :math:`\sum_k H_{kk} g_k^2` of distributions other than the Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zokernel.errors import UsageError
from zokernel.theory.checks import check_noise_ratio, check_num_perturbations
from zokernel.theory.per_example import sampling_share

BATCHES = (1, 2, 4, 8, 16, 32, 64)
DRAWS = (1, 2, 4, 8, 16, 32)


def curvature_factor(
    noise_ratio: float,
    ratio: float,
    batch_size: int,
    num_perturbations: int = 1,
    scheme: str = "per_example",
    *,
    noise_rank: float | None = None,
    population: int | None = None,
) -> float:
    r"""Return :math:`Q = E[\hat g^T H \hat g] / g^T H g` for Gaussian directions, exactly for a quadratic loss.

    With :math:`\nu_H = tr(H \Sigma) / g^T H g = \nu\, r / r_{noise}` and s of
    :func:`~zokernel.theory.per_example.sampling_share`:

    .. math:: Q_{shared} &= (1 + \tfrac1P)(1 + s \nu_H) + \tfrac{r}{P} (1 + s \nu) \\
              Q_{per\ example} &= 1 + s \nu_H + \tfrac{1}{B P} \left[ 1 + \nu_H + r\, (1 + \nu) \right]

    Args:
        noise_ratio: :math:`\nu`, noise of the examples' gradients.
        ratio: r, effective rank of the curvature as the gradient sees it
            (:func:`~zokernel.theory.perturbation_budget.curvature_ratio`).
        batch_size: Examples B per batch.
        num_perturbations: Directions P of the batch, or of each example.
        scheme: ``shared``, ``per_example`` or ``first_order`` (:math:`1 + s \nu_H`).
        noise_rank: :math:`r_{noise}`, the effective rank as the noise sees it; r when not given, which says that noise
            lies in the curvature as the gradient does.  Noise equal in all directions has d.
        population: N for batches without replacement.

    Returns:
        Q, at least 1.

    Raises:
        UsageError: If an argument is out of range.

    Example:
        >>> curvature_factor(0.0, 89.0, batch_size=1, num_perturbations=10, scheme="shared")  # (P + 1 + r) / P
        10.0
        >>> curvature_factor(0.0, 89.0, batch_size=10)  # without noise, B directions
        10.0
    """
    check_noise_ratio(noise_ratio)
    for name, value in (("r", ratio), ("r_noise", noise_rank)):
        if value is not None and not 0.0 < value < math.inf:
            raise UsageError(f"The effective rank {name} must be positive and finite, not {value}.")
    count = check_num_perturbations(num_perturbations)
    share = sampling_share(batch_size, population)
    curved = noise_ratio if noise_rank is None else noise_ratio * ratio / noise_rank
    if scheme == "first_order":
        return 1 + share * curved
    if scheme == "shared":
        return (1 + 1 / count) * (1 + share * curved) + ratio / count * (1 + share * noise_ratio)
    if scheme == "per_example":
        return 1 + share * curved + (1 + curved + ratio * (1 + noise_ratio)) / (batch_size * count)
    raise UsageError(f"There is no scheme {scheme!r} here: choose shared, per_example or first_order.")


@dataclass(frozen=True)
class StepChoice:
    r"""One way to spend forwards on a step, and what it is worth.

    Attributes:
        scheme: ``shared`` or ``per_example``.
        batch_size: Examples B per batch.
        num_perturbations: Directions P of the batch, or of each example.
        one_sided: Whether slopes are differences from one forward without perturbation, or two-sided.
        forwards: Forwards of the batch per step: :math:`1 + P`, or :math:`2 P` two-sided.
        rate_ratio: Best learning rate over that of a step along the gradient of the whole loss, :math:`1/Q`; also the
            expected decrease over the decrease of that step.
        cost: Cost per step, in forwards or in rows.
        gain: Decrease per cost over that of the reference.
    """

    scheme: str
    batch_size: int
    num_perturbations: int
    one_sided: bool
    forwards: int
    rate_ratio: float
    cost: float
    gain: float


def step_choices(
    noise_ratio: float,
    ratio: float,
    *,
    per: str = "token",
    batches: Sequence[int] = BATCHES,
    draws: Sequence[int] = DRAWS,
    schemes: Sequence[str] = ("shared", "per_example"),
    noise_rank: float | None = None,
    population: int | None = None,
    per_example_cost: float = 1.0,
    forward_rows: float = 0.0,
    reference_batch: int = 16,
) -> list[StepChoice]:
    r"""Return every choice of a grid, the most worth per cost first; ties go to shared, two-sided, fewer directions.

    Per token the smallest batch is always best and per forward the largest, so those ends of ``batches`` should be the
    ones that make sense; ``forward_rows`` puts the best batch between them.

    Args:
        noise_ratio: :math:`\nu`.
        ratio: r.
        per: ``token`` (rows of the batch times forwards) or ``forward``.
        batches: Batch sizes B to try.
        draws: Directions P to try.
        schemes: ``shared``, ``per_example`` or both.
        noise_rank: :math:`r_{noise}`, as for :func:`curvature_factor`.
        population: N for batches without replacement; larger batches are left out.
        per_example_cost: Time of a forward with one direction per example over that of a plain one.
        forward_rows: Cost of a forward that does not depend on the batch, in rows (``token`` only).
        reference_batch: B of the reference, MeZO: one shared direction, two-sided.

    Returns:
        The choices.

    Raises:
        UsageError: If an argument is out of range.

    Example:
        >>> choices = step_choices(5.5, 50.0, batches=[4], draws=[1, 4])
        >>> [(choice.scheme, choice.num_perturbations, round(choice.gain, 2)) for choice in choices[:2]]
        [('per_example', 4, 4.84), ('shared', 4, 3.42)]
    """
    if per not in ("token", "forward"):
        raise UsageError(f"Steps are compared per 'token' or per 'forward', not per {per!r}.")
    if not (per_example_cost > 0 and 0 <= forward_rows < math.inf):
        raise UsageError("The cost of a forward must be positive, and its part without rows at least 0.")
    sizes = [size for size in batches if population is None or size <= population]
    if not sizes or not draws or not schemes:
        raise UsageError("There is no batch size, number of directions or scheme to choose from.")

    def choice(scheme: str, size: int, count: int, one_sided: bool) -> StepChoice:
        factor = curvature_factor(noise_ratio, ratio, size, count, scheme, noise_rank=noise_rank, population=population)
        forwards = 1 + count if one_sided else 2 * count
        cost = forwards * (1.0 if per == "forward" else size + forward_rows)
        cost *= per_example_cost if scheme == "per_example" else 1.0
        return StepChoice(scheme, size, count, one_sided, forwards, 1 / factor, cost, 1 / (factor * cost))

    reference_size = reference_batch if population is None else min(reference_batch, population)
    reference = choice("shared", reference_size, 1, one_sided=False).gain
    choices = [
        choice(scheme, size, count, one_sided)
        for scheme in schemes
        for one_sided in (False, True)
        for count in sorted(draws)
        for size in sizes
    ]
    scaled = [StepChoice(**{**vars(one), "gain": one.gain / reference}) for one in choices]
    return sorted(scaled, key=lambda one: -round(one.gain, 9))


def best_step(noise_ratio: float, ratio: float, **grid: Any) -> StepChoice:
    r"""Return the batch, the number of directions and the scheme with the largest decrease per token or per forward.

    Args:
        noise_ratio: :math:`\nu`.
        ratio: r.
        **grid: What to choose from, as for :func:`step_choices`.

    Returns:
        The first of :func:`step_choices`, with its predicted gain over MeZO.

    Raises:
        UsageError: If an argument is out of range.

    Example:
        >>> best = best_step(5.5, 50.0, per="forward", batches=[16])
        >>> best.scheme, best.num_perturbations, best.one_sided, round(best.gain, 2)
        ('per_example', 4, True, 4.28)
    """
    return step_choices(noise_ratio, ratio, **grid)[0]
