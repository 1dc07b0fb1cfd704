r"""Plan a zeroth-order run from a handful of forward passes: how many directions, which eps, learning rate and batch.

No gradient is taken.  Probes (see :mod:`zokernel.kernels.probes`) are the directions that training with the same seed
uses, so a plan costs as much as a few training steps and sees the same numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from zokernel import theory
from zokernel.errors import UsageError
from zokernel.kernels.plan_record import Plan
from zokernel.kernels.plan_walk import (
    Growth,
    measure_growth,
    measured_reach,
    rms_slope,
    start_slopes,
    walk_forwards,
    walk_rate,
)
from zokernel.kernels.prober import (
    NOISE_POINTS,
    ProbedTask,
    Prober,
    Progress,
    derivatives,
    loss_noise,
    probe,
    rms_third,
)
from zokernel.kernels.probes import (
    Measurement,
    Slopes,
    belief_moments,
    fisher_moments,
    fisher_ratio,
    gradient_noise,
    jackknife,
    least_noise_scale,
    mean_estimate,
    single_draw_variance,
)

logger = logging.getLogger(__name__)

CURVATURE_PROBES = 8
FEWEST_PROBES = 8
ROUGH_PROBES = 3


def make_plan(
    task: ProbedTask,
    *,
    num_probes: int = 64,
    eps: float = 1e-3,
    distribution: str = "rademacher",
    seed: int = 0,
    counts: Sequence[int] = (1, 10, 100),
    tolerances: Sequence[float] = (0.1, 0.3, 1.0),
    num_steps: int = 1000,
    curvature_probes: int = CURVATURE_PROBES,
) -> Plan:
    r"""Probe a task and return the plan.

    The rate of a run is the least of two.  One is the step that decreases the loss fastest, with the larger of the
    traces of Hessian and Fisher matrix, times :math:`1/(1 + \nu/B)`; where the noise scale is not known, with the least
    that the probes allow.  The other is four fifths of the rate at which slopes grow without bound along the random
    walk of all steps (see :mod:`zokernel.kernels.plan_walk`): most of a step is noise, and models of the loss at the
    start know nothing of what it meets.

    Args:
        task: Model and examples.
        num_probes: Directions; about 60 give the relative error to 10%.
        eps: Perturbation size of the probes.
        distribution: Distribution of the directions.
        seed: Seed of the directions.
        counts: Values of P to predict for.
        tolerances: Relative errors to reach.
        num_steps: Steps of the run that the rate is for.
        curvature_probes: Directions for second and third derivatives.

    Returns:
        The plan.

    Raises:
        UsageError: If there are too few probes or examples, or a value of P or a relative error is not positive.
        RunError: If a score is not finite.
    """
    if num_probes < FEWEST_PROBES:
        raise UsageError(f"{num_probes} probes are too few: give at least {FEWEST_PROBES}; 64 is the default.")
    if min(counts) < 1 or not min(tolerances) > 0:
        raise UsageError("A plan is made for numbers of perturbations from 1 on, and for relative errors above 0.")
    if task.num_update < 2 or len(task.labels) <= task.num_update:
        raise UsageError("A plan needs at least two examples to step on and one to observe.")
    fixed = 1 + 2 * num_probes + NOISE_POINTS + 4 * (ROUGH_PROBES + curvature_probes)
    fewest, most = (fixed + forwards for forwards in walk_forwards(len(task.steps) or num_probes))
    examples = len(task.labels)
    logger.info("The plan takes %d to %d forward passes of %d examples each.", fewest, most, examples)
    with Prober(task, distribution, seed, progress=Progress(fewest, most)) as prober:
        probes = _run_probes(prober, num_probes, curvature_probes, eps)
    logger.info("Second and third derivatives were measured at eps = %.2g.", probes.eps_derivatives)
    return _summarize(task, probes, counts, tolerances, num_steps)


@dataclass(frozen=True)
class _Probes:
    """What the forward passes of a plan measured.

    Attributes:
        slopes: Slopes along the probes.
        second: Second derivatives of the loss along the first probes.
        third: Third derivatives along the same probes.
        growth: Slopes at the start and far from it, in other batches.
        noise: Standard deviation of one loss evaluation.
        loss: Loss at the current weights.
        eps: Size at which the slopes were measured.
        eps_derivatives: Size at which the second and third derivatives were measured.
        forwards: Forward passes used.
        tokens: Tokens forwarded.
    """

    slopes: Slopes
    second: Tensor
    third: Tensor
    growth: Growth
    noise: float
    loss: float
    eps: float
    eps_derivatives: float
    forwards: int
    tokens: int


def _run_probes(prober: Prober, num_probes: int, curvature_probes: int, eps: float) -> _Probes:
    center = prober.evaluate()
    slopes = probe(prober, range(num_probes), eps, center)
    noise = loss_noise(prober, eps)
    # Slopes bear a larger eps than higher derivatives do: a rough third derivative first says which eps those need.
    rough = rms_third(derivatives(prober, range(ROUGH_PROBES), eps)[1], noise, eps).value
    eps_derivatives = min(eps, 3 * theory.optimal_eps(noise, rough)) if rough > 0 and noise > 0 else eps
    second, third = derivatives(prober, range(curvature_probes), eps_derivatives)
    start = start_slopes(prober, eps, len(prober.task.steps) or num_probes)
    if not (slopes.losses_PB.any() and start.any()):
        raise UsageError(
            f"The loss changes along none of {slopes.count} directions, so there is nothing to plan: raise eps, or "
            "check that the loss depends on the trained parameters."
        )
    growth = measure_growth(prober, start, eps)
    loss = center.losses_B.mean().item()
    return _Probes(slopes, second, third, growth, noise, loss, eps, eps_derivatives, prober.forwards, prober.tokens)


def _summarize(
    task: ProbedTask, probes: _Probes, counts: Sequence[int], tolerances: Sequence[float], num_steps: int
) -> Plan:
    slopes = probes.slopes
    variance = jackknife(slopes, single_draw_variance)
    error_one = jackknife(slopes, lambda part: math.sqrt(single_draw_variance(part)))
    gradient_norm = jackknife(slopes, lambda part: math.sqrt(belief_moments(part).gradient_sq))
    noise_scale = jackknife(slopes, _noise_scale)
    third = rms_third(probes.third, probes.noise, probes.eps_derivatives)
    eps, difference_error = _best_eps(probes, third)
    ratio = jackknife(slopes, fisher_ratio)
    hessian, fisher = mean_estimate(probes.second), jackknife(slopes, lambda part: fisher_moments(part).rows_sq)
    reach = measured_reach(probes.growth)
    slope = rms_slope(probes.growth.start_W)
    # Two standard errors above the estimate: too little curvature is what wrecks a run.
    hessian_bound = hessian.value + 2 * hessian.error if hessian.known else 0.0
    # Nor may a mean gradient that is lost in noise count as one without noise.
    noise = max(0.0, noise_scale.value) if noise_scale.known else least_noise_scale(slopes)
    damping = 1 + noise / task.num_update

    def run_rate(count: int) -> Measurement:
        one_step = jackknife(slopes, partial(_rate, count=count, hessian_trace=hessian_bound, damping=damping))
        return _smaller_rate(one_step, walk_rate(reach, slope, num_perturbations=count, num_steps=num_steps))

    return Plan(
        relative_error_one=error_one,
        rho=jackknife(slopes, _similarity),
        gradient_norm=gradient_norm,
        slope=slope,
        noise_scale=noise_scale,
        trace_hessian=hessian,
        trace_fisher=fisher,
        curvature_ratio=ratio,
        loss_noise=probes.noise,
        third_derivative=third,
        eps=eps,
        eps_probed=probes.eps,
        eps_derivatives=probes.eps_derivatives,
        finite_difference_error=difference_error,
        required={t: math.ceil(variance.value / t**2) if variance.known else None for t in tolerances},
        predicted_error={
            p: Measurement(error_one.value / math.sqrt(p), error_one.error / math.sqrt(p)) for p in counts
        },
        learning_rate_ratio={p: _rate_ratio(p, ratio) for p in counts},
        learning_rate={p: jackknife(slopes, partial(_rate, count=p)) for p in counts},
        reach=reach,
        run_rate={p: run_rate(p) for p in counts},
        num_steps=num_steps,
        loss=probes.loss,
        forwards=probes.forwards,
        tokens=probes.tokens,
        num_probes=slopes.count,
        num_curvature_probes=len(probes.second),
        num_parameters=sum(tensor.numel() for tensor in task.params.values()),
        notes=_notes(noise_scale, eps, hessian, fisher, reach),
    )


def _best_eps(probes: _Probes, third: Measurement) -> tuple[Measurement, float]:
    """Return the best perturbation size, and the relative error of a projected gradient there.

    Where the probes do not tell, it is their own size, with an infinite error.
    """
    gradient_norm = math.sqrt(belief_moments(probes.slopes).gradient_sq)
    if not (third.known and probes.noise > 0):
        return Measurement(probes.eps, math.inf), probes.noise / (math.sqrt(2) * probes.eps) / gradient_norm
    best = theory.optimal_eps(probes.noise, third.value)
    error = theory.error_at_optimum(probes.noise, third.value) / gradient_norm
    return Measurement(best, best * third.error / third.value / 3), error


def _notes(
    noise_scale: Measurement, eps: Measurement, hessian: Measurement, fisher: Measurement, reach: Measurement
) -> list[str]:
    """Return the caveats that the measurements call for."""
    notes = []
    if not noise_scale.known:
        notes.append("The batch's mean gradient is lost in the spread of its examples: use a larger batch, if you can.")
    if math.isinf(eps.error):
        notes.append("Bias or rounding noise of the loss is below what the probes resolve: keep the probed eps.")
    if abs(hessian.value - fisher.value) > 2 * math.hypot(hessian.error, fisher.error):
        notes.append(
            "The Hessian's trace is not the Fisher matrix's: curvature of the network itself matters, so take the "
            "rates for one step as upper limits."
        )
    if math.isinf(reach.value):
        notes.append("Slopes do not grow far from the start: the rate of a run is the best for one step.")
    return notes


def _similarity(slopes: Slopes) -> float:
    variance = single_draw_variance(slopes)
    return (variance - 1) ** -0.5 if math.isfinite(variance) else math.nan  # not zero: it is lost in the noise


def _noise_scale(slopes: Slopes) -> float:
    spread, signal = gradient_noise(slopes)
    return spread / signal if signal > 0 else math.inf


def _rate_ratio(count: int, ratio: Measurement) -> Measurement:
    """Return eta_zo / eta_fo with its standard error to first order."""
    if not math.isfinite(ratio.value):
        return Measurement(math.nan, math.inf)
    value = theory.learning_rate_ratio(count, ratio.value)
    return Measurement(value, value * ratio.error / (count + 1 + ratio.value))


def _rate(slopes: Slopes, count: int, hessian_trace: float = 0.0, damping: float = 1.0) -> float:
    """Return the step size that decreases the Gauss-Newton model of the loss fastest."""
    moments = fisher_moments(slopes)
    if moments.product_sq <= 0:
        return math.inf
    step = theory.optimal_learning_rate(
        count,
        gradient_sq=moments.gradient_sq,
        trace_hessian=max(moments.rows_sq, hessian_trace),
        gradient_curvature=moments.product_sq,
    )
    return step / damping


def _smaller_rate(one_step: Measurement, of_walk: Measurement) -> Measurement:
    """Return the smaller of two rates; one that nothing bounds does not count, one that is not known does."""
    if math.isinf(of_walk.value):
        return one_step
    return of_walk if not of_walk.known or not one_step.known or of_walk.value < one_step.value else one_step
