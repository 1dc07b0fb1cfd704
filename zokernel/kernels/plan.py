r"""Plan a zeroth-order run from a handful of forward passes: how many directions, which eps, learning rate and batch.

No gradient is taken.  Probes (see :mod:`zokernel.kernels.probes`) are the directions that training with the same seed
uses, so a plan costs as much as a few training steps and sees the same numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from zokernel import theory
from zokernel.errors import UsageError
from zokernel.kernels.prober import (
    GROUPS,
    Prober,
    Task,
    derivatives,
    gradient_curvatures,
    loss_noise,
    probe,
    rms_third,
)
from zokernel.kernels.probes import (
    Estimate,
    Slopes,
    belief_moments,
    gradient_noise,
    jackknife,
    mean_estimate,
    single_draw_variance,
)

logger = logging.getLogger(__name__)

CURVATURE_PROBES = 12
ROUGH_PROBES = 3


@dataclass(frozen=True)
class Plan:
    r"""What the probes say, each number with its standard error.

    Attributes:
        relative_error_one: Predicted relative error of :math:`\Delta\log\pi` at P = 1; divide by :math:`\sqrt P`.
        rho: :math:`\|Mg\| / (\|M\|_F\|g\|)`: how much of a belief's gradients points along the loss gradient.
        gradient_norm: :math:`\|g\|` of the update batch.
        noise_scale: Gradient noise scale :math:`tr\Sigma/\|\bar g\|^2`: the batch size where noise equals signal.
        trace_hessian: :math:`tr H` of the loss.
        curvature_ratio: :math:`r = tr H \|g\|^2 / g^THg`.
        loss_noise: Standard deviation of one loss evaluation (rounding).
        third_derivative: rms of :math:`D^3L[u,u,u]`.
        eps: Best perturbation size.
        eps_probed: The size the probes used.
        finite_difference_error: Relative rms error of a projected gradient at ``eps``.
        required: P needed for each target error.
        predicted_error: Relative error for each P.
        learning_rate_ratio: :math:`\eta_{zo}/\eta_{fo}` for each P.
        learning_rate: Step size that decreases the loss fastest to second order, for each P.
        loss: Loss at the current weights.
        forwards: Forward passes used.
        tokens: Tokens forwarded.
        num_probes: Probes used.
        num_parameters: d.
        notes: Caveats in plain words.
    """

    relative_error_one: Estimate
    rho: Estimate
    gradient_norm: Estimate
    noise_scale: Estimate
    trace_hessian: Estimate
    curvature_ratio: Estimate
    loss_noise: float
    third_derivative: Estimate
    eps: Estimate
    eps_probed: float
    finite_difference_error: float
    required: dict[float, int]
    predicted_error: dict[int, Estimate]
    learning_rate_ratio: dict[int, Estimate]
    learning_rate: dict[int, float]
    loss: float
    forwards: int
    tokens: int
    num_probes: int
    num_parameters: int
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for a JSON file."""
        return asdict(self)


def make_plan(
    task: Task,
    *,
    num_probes: int = 64,
    eps: float = 1e-3,
    distribution: str = "rademacher",
    seed: int = 0,
    counts: Sequence[int] = (1, 10, 100),
    tolerances: Sequence[float] = (0.1, 0.3, 1.0),
) -> Plan:
    """Probe a task and return the plan.

    Args:
        task: Model and examples.
        num_probes: Directions; about 60 give the relative error to 10%.
        eps: Perturbation size of the probes.
        distribution: Law of the directions.
        seed: Seed of the directions.
        counts: Values of P to predict for.
        tolerances: Relative errors to reach.

    Returns:
        The plan.

    Raises:
        UsageError: If there are too few probes or examples.
        RunError: If a score is not finite.
    """
    if num_probes < 2 * GROUPS:
        raise UsageError(f"{num_probes} probes are too few: give at least {2 * GROUPS}; 64 is the default.")
    if task.num_update < 2 or len(task.labels) <= task.num_update:
        raise UsageError("A plan needs at least two examples to step on and one to observe.")
    with Prober(task, distribution, seed) as prober:
        center = prober.evaluate()[0].mean().item()
        slopes = probe(prober, range(num_probes), eps)
        noise = loss_noise(prober, eps)
        # Slopes bear a larger eps than curvatures do: a rough third derivative first says how close to look for those.
        rough = rms_third(derivatives(prober, range(ROUGH_PROBES), eps)[1], noise, eps)
        close = min(eps, 3 * theory.optimal_eps(noise, rough)) if rough > 0 and noise > 0 else eps
        second, third = derivatives(prober, range(min(CURVATURE_PROBES, num_probes)), close)
        along = gradient_curvatures(prober, slopes, second.mean().item(), close)
    logger.info("Curvatures were measured at eps = %.2g.", close)
    measured = _Curvature(second, third, along, close)
    return _summarize(task, slopes, measured, noise, center, eps, prober.forwards, counts, tolerances)


@dataclass(frozen=True)
class _Curvature:
    """Second and third derivatives along probes, g'Hg by groups, and the size they were measured at."""

    second: Tensor
    third: Tensor
    along: Tensor
    eps: float


def _summarize(
    task: Task,
    slopes: Slopes,
    measured: _Curvature,
    noise: float,
    center: float,
    eps: float,
    forwards: int,
    counts: Sequence[int],
    tolerances: Sequence[float],
) -> Plan:
    notes = []
    variance = jackknife(slopes, single_draw_variance)
    if not math.isfinite(variance.error):
        notes.append("The probes do not resolve the error: use more of them (--num_probes).")
    one = jackknife(slopes, lambda part: math.sqrt(single_draw_variance(part)))
    rho = jackknife(slopes, lambda part: (single_draw_variance(part) - 1) ** -0.5)
    gradient_sq = belief_moments(slopes).gradient_sq
    norm = jackknife(slopes, lambda part: math.sqrt(belief_moments(part).gradient_sq))
    noise_scale = jackknife(slopes, _noise_scale)
    if not math.isfinite(noise_scale.error):
        notes.append(
            "The batch's mean gradient is lost in the spread of its examples: the noise scale is a lower bound."
        )
    trace, curvature = mean_estimate(measured.second), mean_estimate(measured.along)
    rms_third_value = rms_third(measured.third, noise, measured.eps)
    third_error = rms_third_value / math.sqrt(2 * len(measured.third))
    if rms_third_value > 0 and noise > 0:
        best = theory.optimal_eps(noise, rms_third_value)
        eps_best = Estimate(best, best * third_error / rms_third_value / 3)
        miss = theory.error_at_optimum(noise, rms_third_value) / math.sqrt(gradient_sq)
    else:
        notes.append("Bias or rounding noise of the loss is below what the probes resolve: keep the probed eps.")
        eps_best, miss = Estimate(eps, math.inf), noise / (math.sqrt(2) * eps) / math.sqrt(gradient_sq)
    ratio, ratios, rates = _step_sizes(trace, curvature, gradient_sq, counts, notes)
    return Plan(
        relative_error_one=one,
        rho=rho,
        gradient_norm=norm,
        noise_scale=noise_scale,
        trace_hessian=trace,
        curvature_ratio=ratio,
        loss_noise=noise,
        third_derivative=Estimate(rms_third_value, third_error),
        eps=eps_best,
        eps_probed=eps,
        finite_difference_error=miss,
        required={t: math.ceil(variance.value / t**2) if math.isfinite(variance.value) else -1 for t in tolerances},
        predicted_error={p: Estimate(one.value / math.sqrt(p), one.error / math.sqrt(p)) for p in counts},
        learning_rate_ratio=ratios,
        learning_rate=rates,
        loss=center,
        forwards=forwards,
        tokens=forwards * task.num_tokens,
        num_probes=slopes.count,
        num_parameters=sum(tensor.numel() for tensor in task.params.values()),
        notes=notes,
    )


def _noise_scale(slopes: Slopes) -> float:
    spread, signal = gradient_noise(slopes)
    return spread / signal if signal > 0 else math.inf


def _step_sizes(
    trace: Estimate, curvature: Estimate, gradient_sq: float, counts: Sequence[int], notes: list[str]
) -> tuple[Estimate, dict[int, Estimate], dict[int, float]]:
    """Return r, the learning-rate ratio and the best learning rate for each P, with errors to first order."""
    if curvature.value <= 2 * curvature.error or trace.value <= 2 * trace.error:
        notes.append(
            "The curvature along the gradient is not resolved (or negative): take the learning-rate ratio as an order "
            "of magnitude at most."
        )
    if curvature.value <= 0 or trace.value <= 0:
        unresolved = Estimate(math.nan, math.inf)
        return unresolved, dict.fromkeys(counts, unresolved), dict.fromkeys(counts, math.nan)
    value = theory.curvature_ratio(trace.value, gradient_sq, curvature.value)
    relative = math.hypot(trace.error / trace.value, curvature.error / curvature.value)
    ratio = Estimate(value, value * relative)
    ratios, rates = {}, {}
    for count in counts:
        part = theory.learning_rate_ratio(count, value)
        ratios[count] = Estimate(part, part * relative * value / (count + 1 + value))
        rates[count] = theory.optimal_learning_rate(
            count, gradient_sq=gradient_sq, trace_hessian=trace.value, gradient_curvature=curvature.value
        )
    return ratio, ratios, rates
