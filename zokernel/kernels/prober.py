r"""Evaluate a task at perturbed weights, and what finite differences of the evaluations say.

The weights are perturbed in place along the directions of training and always put back exactly.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zokernel import theory
from zokernel.directions import Dense
from zokernel.errors import RunError
from zokernel.kernels.probes import Measurement, Slopes
from zokernel.kernels.projections import SeededDirections
from zokernel.readable import readable_seconds

logger = logging.getLogger(__name__)

NOISE_POINTS = 8
FIRST_LINE, NEXT_LINES = 5.0, 30.0  # seconds until a plan first says how far it is, and between two such lines


@dataclass(frozen=True)
class StepBatch:
    """A batch of training examples, as a step takes it.

    Attributes:
        inputs: The batch.
        labels: Classes of its examples, (B,).
        num_tokens: Tokens that one evaluation forwards (examples, for models without tokens).
    """

    inputs: Any
    labels: Tensor
    num_tokens: int


@dataclass(frozen=True)
class ProbedTask:
    """What is planned for: a model's scores on two sets of examples, as one batch.

    Attributes:
        params: The live trainable parameters by name (as ``named_parameters`` gives them); perturbed in place and put
            back exactly.
        score: Evaluates the model at its current weights: batch -> scores (B + O, C).
        batch: The batch: B examples to take a step on, then O to observe.
        labels: Classes of all of them, (B + O,).
        num_update: B.
        num_tokens: Tokens that one evaluation forwards (examples, for models without tokens).
        steps: Other batches of B examples, in which the slopes that steps meet are measured; if there are none, those
            of the batch are taken.
    """

    params: dict[str, Tensor]
    score: Callable[[Any], Tensor]
    batch: Any
    labels: Tensor
    num_update: int
    num_tokens: int
    steps: Sequence[StepBatch] = ()


def wide(scores: Tensor) -> Tensor:
    """Return scores in float32, or in float64 if they are."""
    return scores if scores.dtype == torch.float64 else scores.float()


class Progress:
    """Logs how far a plan, or a part of its verification, is: after five seconds, then every half a minute.

    Args:
        fewest: The least number of parts.
        most: The largest number of parts; the same if not given.
        what: What the parts are, in the plural.
    """

    def __init__(self, fewest: int, most: int | None = None, what: str = "forward passes"):
        self._fewest, self._most = fewest, fewest if most is None else most
        self._unit, self._num_done = what, 0
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE

    def step(self) -> None:
        """Note that one more part is done."""
        self._num_done += 1
        done, now = self._num_done, time.monotonic()
        if now < self._next or done >= self._most:
            return
        self._next = now + NEXT_LINES
        least, most = ((now - self._start) / done * (count - done) for count in (self._fewest, self._most))
        if self._fewest == self._most:
            total, remaining = f"{self._most}", readable_seconds(most)
        else:
            total = f"{self._fewest} to {self._most}"
            remaining = f"{readable_seconds(least)} to {readable_seconds(most)}"
            remaining = remaining if least > 0 else f"at most {readable_seconds(most)}"
        logger.info("%d of %s %s are done, %s left.", done, total, self._unit, remaining)


class Prober:
    """Evaluates a task at perturbed weights, counts forwards, and always puts the weights back.

    Args:
        task: The task.
        distribution: Distribution of the directions.
        seed: Seed of the directions.
        progress: Counts every forward pass.
    """

    def __init__(
        self,
        task: ProbedTask,
        distribution: str = "rademacher",
        seed: int = 0,
        *,
        progress: Progress | None = None,
    ):
        self.task = task
        self.draw = SeededDirections(Dense(distribution), {n: p.detach() for n, p in task.params.items()}, seed)
        self.forwards = self.tokens = 0
        self._progress = progress

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
    def evaluate(self, scales: Sequence[float] = (), indices: Sequence[int] = ()) -> Evaluation:
        """Return losses and log-probabilities at theta + the sum of scaled directions."""
        scores = self._scores(self.task.batch, self.task.num_tokens, scales, indices)
        count = self.task.num_update
        losses = F.cross_entropy(scores[:count], self.task.labels[:count], reduction="none")
        logp = scores.log_softmax(-1).double()
        return Evaluation(losses.double(), logp[:count], logp[count:])

    def loss(self, scales: Sequence[float] = (), indices: Sequence[int] = ()) -> float:
        """Return the mean loss of the update batch."""
        return self.evaluate(scales, indices).losses_B.mean().item()

    @torch.no_grad()
    def step_loss(self, n: int, scales: Sequence[float] = (), indices: Sequence[int] = ()) -> float:
        """Return the mean loss of another batch; of the update batch, if the task has no others."""
        if not self.task.steps:
            return self.loss(scales, indices)
        batch = self.task.steps[n]
        scores = self._scores(batch.inputs, batch.num_tokens, scales, indices)
        return F.cross_entropy(scores, batch.labels).item()

    def _scores(self, inputs: Any, num_tokens: int, scales: Sequence[float], indices: Sequence[int]) -> Tensor:
        """Return the scores of a batch at theta + the sum of scaled directions, and count the forward pass."""
        if scales:
            self.draw.add_(self.draw.params, list(scales), list(indices))
        try:
            scores = wide(self.task.score(inputs))
        finally:
            if scales:
                self.restore()
        self.forwards += 1
        self.tokens += num_tokens
        if self._progress is not None:
            self._progress.step()
        if not bool(torch.isfinite(scores).all()):
            raise RunError("A score is NaN or infinite: lower eps, or load the model in float32.")
        return scores


@dataclass(frozen=True)
class Evaluation:
    """One forward pass.

    Attributes:
        losses_B: Loss of each update example.
        update_BC: Log-probabilities of the update examples.
        observed_OC: Log-probabilities of the observed examples.
    """

    losses_B: Tensor
    update_BC: Tensor
    observed_OC: Tensor


def probe(prober: Prober, indices: Sequence[int], eps: float, center: Evaluation) -> Slopes:
    """Return slopes along directions, two forwards each; ``center`` is the evaluation at the current weights."""
    losses, beliefs, fisher = [], [], []
    weights = (center.update_BC.exp() / len(center.update_BC)).sqrt()
    for index in indices:
        above, below = (prober.evaluate([sign * eps], [index]) for sign in (1, -1))
        losses.append((above.losses_B - below.losses_B) / (2 * eps))
        beliefs.append(((above.observed_OC - below.observed_OC) / (2 * eps)).flatten())
        fisher.append((weights * (above.update_BC - below.update_BC) / (2 * eps)).flatten())
    return Slopes(torch.stack(losses), torch.stack(beliefs), torch.stack(fisher))


def derivatives(prober: Prober, indices: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    r"""Return :math:`u^T H u` and :math:`D^3L[u,u,u]` along directions, from four points each.

    Curvature is :math:`[V(2\epsilon) - V(\epsilon)] / 3\epsilon^2`, :math:`V(t) = L(\theta+tu) + L(\theta-tu)`: the
    loss at the centre, whose rounding error would be common to all directions, does not enter.
    """
    seconds, thirds = [], []
    for index in indices:
        values = {k: prober.loss([k * eps], [index]) for k in (1, -1, 2, -2)}
        seconds.append((values[2] + values[-2] - values[1] - values[-1]) / (3 * eps**2))
        single, doubled = ((values[k] - values[-k]) / (2 * k * eps) for k in (1, 2))
        thirds.append(theory.third_derivative_from_differences(single, doubled, eps))
    return torch.tensor(seconds, dtype=torch.float64), torch.tensor(thirds, dtype=torch.float64)


def loss_noise(prober: Prober, eps: float) -> float:
    """Return the noise of one loss evaluation from a difference table of closely spaced weights."""
    spacing = eps / 300
    values = [prober.loss([k * spacing], [0]) for k in range(1, NOISE_POINTS + 1)]
    return theory.noise_from_differences(values, order=3)


def rms_third(third: Tensor, noise: float, eps: float) -> Measurement:
    """Return the rms third derivative with the variance of its rounding noise taken out.

    Its error is that of the mean square with the noise in it; where nothing is left, the error is infinite.
    """
    square, rounding = third.square().mean().item(), 2.5 * (noise / eps**3) ** 2
    value = math.sqrt(max(square - rounding, 0.0))
    return Measurement(value, square / (value * math.sqrt(2 * len(third))) if value > 0 else math.inf)
