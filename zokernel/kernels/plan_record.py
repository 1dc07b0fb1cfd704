"""What a plan holds: every number that the probes give, with its standard error."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from zokernel import theory
from zokernel.kernels.probes import Measurement

FROM_CURVATURE_PROBES = ("trace_hessian", "third_derivative", "eps")
STEP_BATCHES = (4, 16)  # batch sizes whose best step is reported


@dataclass(frozen=True)
class Plan:
    r"""What the probes say, each number with its standard error.

    Attributes:
        relative_error_one: Predicted relative error of :math:`\Delta\log\pi` at P = 1; divide by :math:`\sqrt P`.
        rho: :math:`\|Mg\| / (\|M\|_F\|g\|)`: how much of a belief's gradients points along the loss gradient.
        gradient_norm: :math:`\|g\|` of the update batch.
        slope: rms slope that steps meet, over other batches of as many examples, each along a direction of its own;
            over the update batch if there are none.
        noise_scale: Gradient noise scale :math:`tr\Sigma/\|\bar g\|^2`: the batch size where noise equals signal.
        trace_hessian: :math:`tr H` of the loss, from second differences; it may be negative.
        trace_fisher: :math:`tr F` of the Fisher (Gauss-Newton) matrix, from slopes of the scores.
        curvature_ratio: :math:`r = tr F \|g\|^2 / g^T F g`, which decides the learning-rate ratio.
        loss_noise: Standard deviation of one loss evaluation (rounding).
        third_derivative: rms of :math:`D^3L[u,u,u]`.
        eps: Best perturbation size.
        eps_probed: The size the probes used.
        eps_derivatives: The size at which second and third derivatives were measured.
        finite_difference_error: Relative rms error of a projected gradient at ``eps``.
        required: P needed for each target error; nothing where the probes do not tell.
        predicted_error: Relative error for each P.
        learning_rate_ratio: :math:`\eta_{zo}/\eta_{fo}` for each P.
        reach: How far noise takes every weight before the slopes that it meets have doubled; infinite if they do not
            grow.
        learning_rate: Step size that decreases the Gauss-Newton model of the loss fastest in one step, for each P.
        run_rate: Learning rate of a run of ``num_steps`` steps, for each P: see
            :func:`zokernel.kernels.plan.make_plan`.
        num_steps: Steps of the run.
        loss: Loss at the current weights.
        forwards: Forward passes used.
        tokens: Tokens forwarded.
        num_probes: Probes used.
        num_curvature_probes: Probes used for second and third derivatives.
        num_parameters: d.
        notes: Caveats, one sentence each.
    """

    relative_error_one: Measurement
    rho: Measurement
    gradient_norm: Measurement
    slope: Measurement
    noise_scale: Measurement
    trace_hessian: Measurement
    trace_fisher: Measurement
    curvature_ratio: Measurement
    loss_noise: float
    third_derivative: Measurement
    eps: Measurement
    eps_probed: float
    eps_derivatives: float
    finite_difference_error: float
    required: dict[float, int | None]
    predicted_error: dict[int, Measurement]
    learning_rate_ratio: dict[int, Measurement]
    reach: Measurement
    learning_rate: dict[int, Measurement]
    run_rate: dict[int, Measurement]
    num_steps: int
    loss: float
    forwards: int
    tokens: int
    num_probes: int
    num_curvature_probes: int
    num_parameters: int
    notes: list[str]

    def probes_used(self, name: str) -> int:
        """Return how many probes are behind a quantity."""
        return self.num_curvature_probes if name in FROM_CURVATURE_PROBES else self.num_probes

    def probes_needed(self) -> dict[str, int]:
        """Return about how many probes each quantity would need that the probes do not carry."""
        return {
            name: value.probes_needed(self.probes_used(name))
            for name, value in vars(self).items()
            if isinstance(value, Measurement) and not value.known and not (name == "reach" and math.isinf(value.value))
        }

    def best_step(self, batch_size: int) -> theory.StepChoice | None:
        r"""Return the directions of a step with the most decrease per forward at a batch size, by :math:`\nu` and r.

        Args:
            batch_size: Examples per batch.

        Returns:
            The choice, with its predicted gain over MeZO's step at that batch; None if the probes do not carry
            :math:`\nu` and r.
        """
        if not (self.noise_scale.known and self.curvature_ratio.known) or self.curvature_ratio.value <= 0:
            return None
        noise = max(0.0, self.noise_scale.value)
        options: Any = {"per": "forward", "batches": [batch_size], "reference_batch": batch_size}
        return theory.best_step(noise, self.curvature_ratio.value, **options)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for a JSON file; what the probes do not carry is null."""
        steps = {size: self.best_step(size) for size in STEP_BATCHES}
        return {name: plain(value) for name, value in vars(self).items()} | {
            "probes_needed": self.probes_needed(),
            "best_step": {size: None if step is None else asdict(step) for size, step in steps.items()},
        }


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: null for what the probes do not carry, and for what is no finite number."""
    if isinstance(value, Measurement):
        return asdict(value) if value.known else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
