r"""Plan a zeroth-order run from a handful of forward passes: how many directions, which eps, learning rate and batch.

No gradient is taken.  Probes (see :mod:`zokernel.kernels.probes`) are the directions that training with the same seed
uses, so a plan costs as much as a few training steps and sees the same numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zokernel import theory
from zokernel.directions import Dense
from zokernel.errors import RunError, UsageError
from zokernel.kernels.probes import (
    Estimate,
    Slopes,
    belief_moments,
    gradient_noise,
    jackknife,
    mean_estimate,
    single_draw_variance,
)
from zokernel.kernels.projections import Draw

logger = logging.getLogger(__name__)

NOISE_POINTS = 8
CURVATURE_PROBES = 12
ROUGH_PROBES = 3
GROUPS = 4


@dataclass(frozen=True)
class Task:
    """What is planned for: a model's scores on two sets of examples, as one batch.

    Attributes:
        params: The live trainable parameters by name (as ``named_parameters`` gives them); perturbed in place and put
            back exactly.
        score: Evaluates the model at its current weights: batch -> scores (B + O, C).
        batch: The batch: B examples to take a step on, then O to observe.
        labels: Classes of all of them, (B + O,).
        num_update: B.
        num_tokens: Tokens that one evaluation forwards (examples, for models without tokens).
    """

    params: dict[str, Tensor]
    score: Callable[[Any], Tensor]
    batch: Any
    labels: Tensor
    num_update: int
    num_tokens: int


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


def wide(scores: Tensor) -> Tensor:
    """Return scores in float32, or in float64 if they are."""
    return scores if scores.dtype == torch.float64 else scores.float()


class Prober:
    """Evaluates a task at perturbed weights, counts forwards, and always puts the weights back.

    Args:
        task: The task.
        distribution: Law of the directions.
        seed: Seed of the directions.
    """

    def __init__(self, task: Task, distribution: str = "rademacher", seed: int = 0):
        self.task = task
        self.draw = Draw(Dense(distribution), {n: p.detach() for n, p in task.params.items()}, seed)
        self.forwards = 0

    def __enter__(self) -> Prober:
        self._saved = {name: tensor.detach().clone() for name, tensor in self.task.params.items()}
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back exactly."""
        for name, tensor in self.task.params.items():
            tensor.copy_(self._saved[name])

    @torch.no_grad()
    def evaluate(self, scales: Sequence[float] = (), indices: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Return per-example losses (B,) and observed log-probabilities (Y,) at theta + sum of scaled directions."""
        if scales:
            self.draw.add_(self.draw.params, list(scales), list(indices))
        try:
            scores = wide(self.task.score(self.task.batch))
        finally:
            if scales:
                self.restore()
        self.forwards += 1
        if not bool(torch.isfinite(scores).all()):
            raise RunError("A score is NaN or infinite: lower eps, or load the model in float32.")
        count = self.task.num_update
        losses = F.cross_entropy(scores[:count], self.task.labels[:count], reduction="none")
        return losses.double(), scores[count:].log_softmax(-1).double().flatten()


def make_plan(
    task: Task,
    *,
    num_probes: int = 48,
    eps: float = 1e-3,
    distribution: str = "rademacher",
    seed: int = 0,
    counts: Sequence[int] = (1, 10, 100),
    tolerances: Sequence[float] = (0.1, 0.3, 1.0),
) -> Plan:
    """Probe a task and return the plan.

    Args:
        task: Model and examples.
        num_probes: Directions; about 50 give the relative error to 10%.
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
        raise UsageError(f"{num_probes} probes are too few: give at least {2 * GROUPS}; 48 is the default.")
    if task.num_update < 2 or len(task.labels) <= task.num_update:
        raise UsageError("A plan needs at least two examples to step on and one to observe.")
    with Prober(task, distribution, seed) as prober:
        center = prober.evaluate()[0].mean().item()
        slopes = probe(prober, range(num_probes), eps)
        noise = loss_noise(prober, eps)
        # Slopes bear a larger eps than curvatures do: a rough third derivative first says how close to look for those.
        rough = _rms_third(derivatives(prober, range(ROUGH_PROBES), eps, center)[1], noise, eps)
        close = min(eps, 3 * theory.optimal_eps(noise, rough)) if rough > 0 and noise > 0 else eps
        second, third = derivatives(prober, range(min(CURVATURE_PROBES, num_probes)), close, center)
        along = gradient_curvatures(prober, slopes, second.mean().item(), close, center)
    logger.info("Curvatures were measured at eps = %.2g.", close)
    measured = _Curvature(second, third, along, close)
    return _summarize(task, slopes, measured, noise, center, eps, prober.forwards, counts, tolerances)


def probe(prober: Prober, indices: Sequence[int], eps: float) -> Slopes:
    """Return slopes of losses and beliefs along directions, two forwards each."""
    losses, beliefs = [], []
    for index in indices:
        (above, belief_above), (below, belief_below) = (prober.evaluate([s * eps], [index]) for s in (1, -1))
        losses.append((above - below) / (2 * eps))
        beliefs.append((belief_above - belief_below) / (2 * eps))
    return Slopes(torch.stack(losses), torch.stack(beliefs))


def derivatives(prober: Prober, indices: Sequence[int], eps: float, center: float) -> tuple[Tensor, Tensor]:
    r"""Return :math:`u^T H u` and :math:`D^3L[u,u,u]` along directions, from four points each.

    The second derivative is extrapolated, :math:`(4 S(\epsilon) - S(2\epsilon))/3`: no fourth-order term is left.
    """
    seconds, thirds = [], []
    for index in indices:
        values = {k: prober.evaluate([k * eps], [index])[0].mean().item() for k in (1, -1, 2, -2)}
        near, far = ((values[k] + values[-k] - 2 * center) / (k * eps) ** 2 for k in (1, 2))
        seconds.append((4 * near - far) / 3)
        single, doubled = ((values[k] - values[-k]) / (2 * k * eps) for k in (1, 2))
        thirds.append(theory.third_derivative_from_differences(single, doubled, eps))
    return torch.tensor(seconds, dtype=torch.float64), torch.tensor(thirds, dtype=torch.float64)


def loss_noise(prober: Prober, eps: float) -> float:
    """Return the noise of one loss evaluation from a difference table of closely spaced weights."""
    spacing = eps / 300
    values = [prober.evaluate([k * spacing], [0])[0].mean().item() for k in range(1, NOISE_POINTS + 1)]
    return theory.noise_from_differences(values, order=3)


def gradient_curvatures(prober: Prober, slopes: Slopes, trace: float, eps: float, center: float) -> Tensor:
    r"""Return estimates of :math:`g^T H g`, one for each of a few groups of probes.

    The curvature along a group's gradient estimate :math:`\hat g = \frac1n\sum_p c_p u_p` is measured, and what its
    diagonal terms :math:`c_p^2\,u_p^T H u_p` average to is taken out; the rest averages to
    :math:`\frac{n-1}{n} g^T H g`.
    """
    found = []
    coefficients = slopes.losses_PB.mean(1)
    for group in torch.arange(slopes.count).chunk(GROUPS):
        size = len(group)
        weights = coefficients[group] / size
        scale = eps / weights.norm().item()  # the step is then as long as one direction times eps
        steps = (weights * scale).tolist()
        above, below = (
            prober.evaluate([sign * step for step in steps], group.tolist())[0].mean().item() for sign in (1, -1)
        )
        total = (above + below - 2 * center) / scale**2
        found.append((total - weights.square().sum().item() * trace) * size / (size - 1))
    return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class _Curvature:
    """Second and third derivatives along probes, g'Hg by groups, and the size they were measured at."""

    second: Tensor
    third: Tensor
    along: Tensor
    eps: float


def _rms_third(third: Tensor, noise: float, eps: float) -> float:
    """Return the rms third derivative with the variance of its rounding noise taken out."""
    return math.sqrt(max(third.square().mean().item() - 2.5 * (noise / eps**3) ** 2, 0.0))


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
    rms_third = _rms_third(measured.third, noise, measured.eps)
    third_error = rms_third / math.sqrt(2 * len(measured.third))
    if rms_third > 0 and noise > 0:
        best = theory.optimal_eps(noise, rms_third)
        eps_best = Estimate(best, best * third_error / rms_third / 3)
        miss = theory.error_at_optimum(noise, rms_third) / math.sqrt(gradient_sq)
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
        third_derivative=Estimate(rms_third, third_error),
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
