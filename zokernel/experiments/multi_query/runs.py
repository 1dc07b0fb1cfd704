"""Problems and training runs for comparing numbers of directions at a fixed number of forward passes.

Many runs are one batch of arrays.  The estimators are the library's, on arrays of losses; only directions and updates
are written again.

Shapes: L learning rates, S seeds, P directions, d parameters, N examples, B of them per batch, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zokernel.estimators import Estimator

EPS = 1e-4


@dataclass(frozen=True)
class Quadratic:
    """The loss sum_i h_i theta_i^2 / 2 from theta = 1.

    Attributes:
        name: Its name in tables.
        curvature: (d,) h.
    """

    name: str
    curvature: np.ndarray

    @property
    def start(self) -> np.ndarray:
        """Ones."""
        return np.ones_like(self.curvature)

    @property
    def trace(self) -> float:
        """The sum of h."""
        return float(self.curvature.sum())

    def batch(self, generator: np.random.Generator, seeds: int) -> None:
        """Return nothing: there is no noise but that of the directions."""

    def losses(self, theta: np.ndarray, batch: Any) -> np.ndarray:
        """Return the losses (L, S) of parameters (L, S, d)."""
        return 0.5 * np.einsum("lsd,lsd,d->ls", theta, theta, self.curvature, optimize=True)

    def full_loss(self, theta: np.ndarray) -> np.ndarray:
        """Return the same losses."""
        return self.losses(theta, None)


@dataclass(frozen=True)
class Softmax:
    """Multinomial logistic regression from theta = 0, on fresh batches.

    Attributes:
        name: Its name in tables.
        x: (N, F) inputs.
        y: (N,) labels.
        classes: C; d = F C.
        batch_size: B.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    classes: int
    batch_size: int

    @classmethod
    def make(cls, name: str, *, features: int, classes: int = 10, examples: int = 512, batch_size: int = 64) -> Softmax:
        """Draw class prototypes plus noise, which no model separates easily."""
        generator = np.random.default_rng(0)
        prototypes = generator.normal(size=(classes, features))
        y = generator.integers(0, classes, examples)
        x = 0.35 * prototypes[y] + generator.normal(size=(examples, features))
        return cls(name, x, y, classes, batch_size)

    @property
    def start(self) -> np.ndarray:
        """Zeros."""
        return np.zeros(self.x.shape[1] * self.classes)

    @property
    def trace(self) -> float:
        """At equal probabilities: (1 - 1/C) E|x|^2."""
        return (1 - 1 / self.classes) * float((self.x**2).sum(1).mean())

    def batch(self, generator: np.random.Generator, seeds: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs (S, B, F) and labels (S, B)."""
        rows = generator.integers(0, len(self.y), (seeds, self.batch_size))
        return self.x[rows], self.y[rows]

    def losses(self, theta: np.ndarray, batch: Any) -> np.ndarray:
        """Return the mean cross entropies (L, S) of parameters (L, S, d) on a batch."""
        x, y = batch
        logits = np.matmul(x, theta.reshape(*theta.shape[:2], self.x.shape[1], self.classes))
        logits -= logits.max(-1, keepdims=True)
        own = np.take_along_axis(logits, np.broadcast_to(y, logits.shape[:-1])[..., None], -1)[..., 0]
        return (np.log(np.exp(logits).sum(-1)) - own).mean(-1)

    def full_loss(self, theta: np.ndarray) -> np.ndarray:
        """Return the losses (L, S) over all examples."""
        return self.losses(theta, (self.x[None], self.y[None]))


Problem = Quadratic | Softmax


def train(
    problem: Problem,
    estimator: Estimator,
    rates: Sequence[float],
    *,
    forwards: int,
    seeds: int,
    seed: int,
    align: bool = False,
    draw: Callable[[int], np.ndarray] | None = None,
) -> np.ndarray:
    """Train with Rademacher directions and return what the loss has fallen by.

    Runs of one seed share batches and directions at every rate.

    Args:
        problem: What to minimise.
        estimator: The library's; its directions decide how many steps the budget buys.
        rates: (L,) learning rates.
        forwards: Forward passes that a run may spend.
        seeds: S.
        seed: Seed of all of them.
        align: Follow the projection of the gradient on the span of the directions instead of the average.
        draw: Directions (P, S, d) of a step; Rademacher ones from the seed when not given.

    Returns:
        (L, S) natural logarithms of the first over the last loss; minus infinity where a run diverged.
    """
    generator = np.random.default_rng([seed, estimator.num_perturbations])
    eta = np.asarray(rates, dtype=float)[:, None, None]
    dim = len(problem.start)
    theta = np.broadcast_to(problem.start, (len(rates), seeds, dim)).copy()
    first = problem.full_loss(theta)
    shape = estimator.num_perturbations, seeds, dim
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(forwards // estimator.forwards_at(0)):
            batch = problem.batch(generator, seeds)
            z = draw(step) if draw else generator.integers(0, 2, shape, dtype=np.int8) * 2.0 - 1.0

            def evaluate(offsets: Mapping[int, float], theta=theta, batch=batch, z=z) -> Any:
                shifted = theta
                for index, offset in offsets.items():
                    shifted = shifted + offset * z[index]
                return problem.losses(shifted, batch)

            coefficients = np.stack(list(estimator(evaluate, seed=seed, step=step).coefficients.values()), axis=-1)
            if align:
                coefficients = aligned_coefficients(coefficients, z)
            theta = theta - eta * np.einsum("lsp,psd->lsd", coefficients, z, optimize=True)
        decrease = np.log(first / problem.full_loss(theta))
    return np.where(np.isfinite(decrease), decrease, -np.inf)


def aligned_coefficients(coefficients: np.ndarray, z: np.ndarray) -> np.ndarray:
    r"""Return the coefficients of :math:`Z (Z^T Z)^{-1} y` from those of the average :math:`Z y / P`.

    Args:
        coefficients: (L, S, P), or (S, P), slopes over P.
        z: (P, S, d) directions.

    Example:
        >>> aligned_coefficients(np.array([[1.5, 0.5]]), np.array([[[2.0, 0.0]], [[0.0, 1.0]]])).tolist()
        [[0.75, 1.0]]
    """
    gram = np.einsum("psd,qsd->spq", z, z, optimize=True)
    slopes = coefficients * coefficients.shape[-1]
    return np.linalg.solve(np.broadcast_to(gram, (*slopes.shape[:-1], *gram.shape[1:])), slopes[..., None])[..., 0]
