"""Many training runs at once: the library's estimators on arrays of losses, one entry a replica.

A sweep over learning rates and seeds is hundreds of runs of a tiny network.  One after the other they cost minutes of
Python; as one batch of matrix products they cost seconds.  The estimators are the ones that the optimizers use (plain
arithmetic on ``evaluate(offsets)``); only directions and updates are written again, and a test compares them to the
optimizers step by step.

Shapes: R replicas, d parameters, B examples per batch, N training examples, F features, H hidden units, V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zokernel.estimators.base import Estimator
from zokernel.optim.updates.averaging.iterate_weights import average_weight

FEATURES, HIDDEN, CLASSES = 64, 24, 10


@dataclass(frozen=True)
class Task:
    """A ten-class problem for a two-layer network of 1,810 parameters.

    Attributes:
        x: (N, F) inputs: class prototypes plus noise, which no network separates perfectly.
        y: (N,) labels.
        start: (d,) initial parameters.
        precision: ``fp32``, or ``fp16``: perturbed weights and logits are rounded to half precision, as when a model is
            stored in it.
    """

    x: Tensor
    y: Tensor
    start: Tensor
    precision: str = "fp32"

    @classmethod
    def make(cls, *, examples: int = 1000, seed: int = 0, precision: str = "fp32") -> Task:
        """Draw a task."""
        generator = torch.Generator().manual_seed(seed)
        prototypes = torch.randn(CLASSES, FEATURES, generator=generator)
        y = torch.randint(0, CLASSES, (examples,), generator=generator)
        x = 0.35 * prototypes[y] + torch.randn(examples, FEATURES, generator=generator)
        first = torch.randn(HIDDEN, FEATURES, generator=generator) / FEATURES**0.5
        second = torch.randn(CLASSES, HIDDEN, generator=generator) / HIDDEN**0.5
        zeros = torch.zeros(HIDDEN), torch.zeros(CLASSES)
        start = torch.cat([first.flatten(), zeros[0], second.flatten(), zeros[1]])
        return cls(x, y, start, precision)

    def losses(self, theta_Rd: Tensor, x_RBF: Tensor, y_RB: Tensor) -> Tensor:
        """Return each replica's mean cross entropy, (R,); inputs may have one replica for all."""
        if self.precision == "fp16":
            theta_Rd = theta_Rd.half().float()
        replicas = theta_Rd.shape[0]
        sizes = [HIDDEN * FEATURES, HIDDEN, CLASSES * HIDDEN, CLASSES]
        w1, b1, w2, b2 = theta_Rd.split(sizes, dim=1)
        w1, w2 = w1.view(replicas, HIDDEN, FEATURES), w2.view(replicas, CLASSES, HIDDEN)
        hidden = torch.tanh(torch.matmul(x_RBF, w1.transpose(1, 2)) + b1[:, None])
        logits = torch.matmul(hidden, w2.transpose(1, 2)) + b2[:, None]
        if self.precision == "fp16":
            logits = logits.half().float()
        labels = y_RB.expand(replicas, -1)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


@dataclass(frozen=True)
class Method:
    """One line of a comparison.

    Attributes:
        label: Its name in tables and figures.
        make: Estimator for a run of so many steps.
        steps_per_iteration: Optimizer steps that count as one iteration (3: three sequential MeZO steps).
        lr_factor: Factor on the learning rate of the sweep.
        averaged: Report KerZOO's averaged iterate instead of the iterate.
    """

    label: str
    make: Callable[[int], Estimator]
    steps_per_iteration: int = 1
    lr_factor: float = 1.0
    averaged: bool = False


@dataclass
class Curves:
    """What a sweep of one method found.

    Attributes:
        iterations: (T,) iterations at which the training loss was measured.
        losses: (L, S, T) training loss over all examples, for L learning rates and S seeds; inf once diverged.
        averaged: The same of the averaged iterate.
        forwards_per_iteration: Forward passes an iteration.
    """

    iterations: np.ndarray
    losses: np.ndarray
    averaged: np.ndarray
    forwards_per_iteration: float
    extra: dict[str, Any] = field(default_factory=dict)


Draw = Callable[[int, int], Tensor]


def train(
    task: Task,
    method: Method,
    *,
    lrs: list[float],
    seeds: int,
    iterations: int,
    every: int,
    seed: int = 0,
    batch_size: int = 64,
    draw: Draw | None = None,
) -> Curves:
    """Run one method at every learning rate and seed.

    Replicas of one seed see the same batches and directions at every learning rate, so that their comparison is paired;
    replicas of different seeds share nothing.

    Args:
        task: Problem and starting point.
        method: What to run.
        lrs: Learning rates, L of them.
        seeds: S.
        iterations: Iterations of every run.
        every: Iterations between measurements.
        seed: Seed of the sweep.
        batch_size: B.
        draw: Directions of (step, index) as (S, d); by default Rademacher ones from a generator of their own.

    Returns:
        The curves.
    """
    steps = iterations * method.steps_per_iteration
    estimator = method.make(steps)
    dim, count = task.start.numel(), len(lrs)
    batches = torch.Generator().manual_seed(7919 * seed + 1)
    run_seeds = np.arange(seeds) + 1000 * (seed + 1)
    rates = torch.tensor(lrs).repeat_interleave(seeds)[:, None] * method.lr_factor
    theta = task.start.repeat(count * seeds, 1)
    average = theta.clone()
    draw = draw or rademacher(seeds, dim, seed)
    records: list[tuple[int, np.ndarray, np.ndarray]] = []

    def full_losses(values: Tensor) -> np.ndarray:
        """Return the losses over all examples, (L, S)."""
        losses = task.losses(values, task.x[None], task.y[None]).reshape(count, seeds)
        return torch.where(losses.isfinite(), losses, torch.inf).numpy()

    records.append((0, full_losses(theta), full_losses(average)))
    forwards = 0
    for step in range(steps):
        rows = torch.randint(0, len(task.y), (seeds, batch_size), generator=batches)
        evaluate = _PerturbedLosses(task, theta, rows, partial(draw, step))
        estimate = estimator(evaluate, seed=run_seeds, step=step)  # type: ignore[arg-type]
        forwards += evaluate.forwards
        for index, coefficient in estimate.coefficients.items():
            c = torch.as_tensor(np.asarray(coefficient), dtype=torch.float32).reshape(-1, 1)
            theta = theta - rates * c * evaluate.directions[index]
        average = torch.lerp(average, theta, average_weight(step))
        if (step + 1) % (every * method.steps_per_iteration) == 0:
            iteration = (step + 1) // method.steps_per_iteration
            records.append((iteration, full_losses(theta), full_losses(average)))
    measured_at, losses, averaged = zip(*records)
    return Curves(np.array(measured_at), np.stack(losses, axis=-1), np.stack(averaged, axis=-1), forwards / iterations)


class _PerturbedLosses:
    """The losses of one step's batches at weights that are moved along its directions.

    Args:
        task: The problem.
        theta: (R, d) weights.
        rows: (S, B) examples of each seed's batch.
        draw: Directions (S, d) by index.

    Attributes:
        directions: (R, d) directions that were needed, by index.
        forwards: Forward passes so far.
    """

    def __init__(self, task: Task, theta: Tensor, rows: Tensor, draw: Callable[[int], Tensor]):
        self.task, self.theta, self.draw = task, theta, draw
        self.num_lrs, self.num_seeds = len(theta) // len(rows), len(rows)
        self.x, self.y = task.x[rows].repeat(self.num_lrs, 1, 1), task.y[rows].repeat(self.num_lrs, 1)
        self.directions: dict[int, Tensor] = {}
        self.forwards = 0

    def __call__(self, offsets: Mapping[int, Any]) -> np.ndarray:
        """Return the losses at the weights plus multiples of directions, (L, S)."""
        self.forwards += 1
        shifted = self.theta
        for index, offset in offsets.items():
            if index not in self.directions:
                self.directions[index] = self.draw(index).repeat(self.num_lrs, 1)
            scale = torch.as_tensor(np.asarray(offset), dtype=torch.float32).reshape(-1, 1)
            if scale.shape[0] > 1:
                scale = scale.repeat(self.num_lrs, 1)
            shifted = shifted + scale * self.directions[index]
        losses = self.task.losses(shifted, self.x, self.y).double().numpy()
        return losses.reshape(self.num_lrs, self.num_seeds)


def rademacher(seeds: int, dim: int, seed: int) -> Draw:
    """Return independent signs for every seed, a function of (step, index)."""

    def draw(step: int, index: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + index)
        return torch.randint(0, 2, (seeds, dim), generator=generator, dtype=torch.int8).float().mul_(2).sub_(1)

    return draw


def best_lr(curves: Curves, *, averaged: bool = False) -> int:
    """Return the index of the learning rate whose final loss is lowest on average over seeds."""
    final = (curves.averaged if averaged else curves.losses)[:, :, -1].mean(axis=1)
    return int(np.nanargmin(np.where(np.isfinite(final), final, np.nan)))


def iterations_to(curve: np.ndarray, iterations: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return when each seed's curve first reaches its target, interpolated; inf if it never does.

    Args:
        curve: (S, T) losses.
        iterations: (T,).
        target: (S,).

    Returns:
        (S,) iterations.

    Example:
        >>> iterations_to(np.array([[3.0, 2.0, 1.0]]), np.array([0, 10, 20]), np.array([1.5]))
        array([15.])
    """
    reached = np.full(len(curve), np.inf)
    for s, (values, goal) in enumerate(zip(curve, target)):
        below = np.nonzero(values <= goal)[0]
        if len(below) and below[0] > 0:
            k = below[0]
            share = (values[k - 1] - goal) / (values[k - 1] - values[k])
            reached[s] = iterations[k - 1] + share * (iterations[k] - iterations[k - 1])
        elif len(below):
            reached[s] = iterations[0]
    return reached
