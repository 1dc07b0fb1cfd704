r"""How far a real network's tangent kernel moves in training: whether the linear theory still describes it.

For a linear model the expected NZK is constant because features do not depend on the weights.  For a network they do;
:func:`kernel_drift` trains it and reports :math:`|K_t - K_0|_F / |K_0|_F` beside the real and the predicted loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from zokernel.dynamics.checks import check_learning_rate
from zokernel.dynamics.evolution import Evolution
from zokernel.dynamics.parametric import zo_sgd_run
from zokernel.errors import UsageError
from zokernel.kernels.features import Linearization, jacobian_features
from zokernel.theory.nzk_moments import ProcessMoments, process_moments


@dataclass(frozen=True)
class DriftRow:
    """The tangent kernel of a network after some steps of training.

    Attributes:
        step: Steps taken.
        relative_change: Frobenius norm of the kernel's change over that of the initial kernel.
        alignment: Cosine between the kernel and the initial kernel.
        loss: Loss of the trained network.
        predicted_loss: Expected loss of the model linearised at the start.
    """

    step: int
    relative_change: float
    alignment: float
    loss: float
    predicted_loss: float


def kernel_drift(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    lr: float,
    steps: Sequence[int],
    *,
    num_perturbations: int | None = None,
    distribution: str = "gaussian",
    eps: float = 1e-3,
    seed: int = 0,
) -> list[DriftRow]:
    """Train a copy of a network on the squared loss and follow its tangent kernel.

    Args:
        model: A module with one output; its own weights are left alone.
        x: Inputs, (n, ...).
        y: Targets, (n,).
        lr: Learning rate.
        steps: Step numbers to report, increasing.
        num_perturbations: Directions per zeroth-order step; gradient descent when not given.
        distribution: Distribution of the directions; Gaussian by default, the setting of the NZK paper.
        eps: Length of the finite difference.
        seed: Seed of the directions.

    Returns:
        One row for every reported step.

    Raises:
        UsageError: If the model has several outputs or steps do not increase.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> rows = kernel_drift(layer, torch.eye(2), torch.ones(2), lr=0.1, steps=[0, 10])
        >>> rows[1].relative_change  # a linear model's kernel does not move
        0.0
    """
    check_learning_rate(lr)
    if list(steps) != sorted(set(steps)):
        raise UsageError("Steps to report must increase.")
    start = jacobian_features(model, x)
    if start.features.ndim != 2:
        raise UsageError(f"The kernel of one output is followed, but the model has {start.features.shape[1]} outputs.")
    target = y.reshape(-1).to(start.outputs)

    loss = _loss_of_weights(model, x, target, start)
    gradient = torch.func.grad(loss)

    def train(theta: Tensor, first: int, last: int) -> Tensor:
        """Return the weights after step ``last``, from those after step ``first``."""
        if num_perturbations is None:
            for _ in range(last - first):
                theta = theta - lr * gradient(theta)
            return theta
        if last == first:
            return theta
        run = zo_sgd_run(
            vmap(loss),
            theta,
            lr,
            [last - first],
            num_perturbations=num_perturbations,
            distribution=distribution,
            eps=eps,
            seed=seed + first,
        )
        return run.theta[0]

    kernel0 = start.features @ start.features.T
    evolution = _linear_evolution(
        start, target, kernel0, lr, num_perturbations=num_perturbations, distribution=distribution
    )
    theta, rows = start.theta.clone(), []
    for previous, step, expected in zip([0, *steps], steps, evolution.expected_loss(steps).tolist(), strict=False):
        theta = train(theta, previous, step)
        kernel = _kernel_at(model, x, start.names, theta)
        change = float((kernel - kernel0).norm() / kernel0.norm())
        cosine = float((kernel * kernel0).sum() / (kernel.norm() * kernel0.norm()))
        with torch.no_grad():
            rows.append(DriftRow(step, change, cosine, float(loss(theta)), expected))
    return rows


def _loss_of_weights(model: nn.Module, x: Tensor, target: Tensor, start: Linearization) -> Callable[[Tensor], Tensor]:
    """Return the squared loss of a network as a function of its flattened weights (d,)."""

    def loss(theta: Tensor) -> Tensor:
        weights, offset = {}, 0
        for name, shape in start.names:
            size = math.prod(shape)
            weights[name] = theta[offset : offset + size].reshape(shape)
            offset += size
        predictions = functional_call(model, weights, (x,)).reshape(-1)
        return (predictions - target).square().mean() / 2

    return loss


def _linear_evolution(
    start: Linearization,
    target: Tensor,
    kernel: Tensor,
    lr: float,
    *,
    num_perturbations: int | None,
    distribution: str,
) -> Evolution:
    """Return how the model linearised at the start evolves in the same training."""
    moments = ProcessMoments.deterministic()
    if num_perturbations is not None:
        moments = process_moments(distribution, len(start.theta), "zo_sgd")
    return Evolution(
        start.outputs,
        target,
        kernel,
        lr,
        moments=moments,
        num_perturbations=num_perturbations or 1,
        features=start.features if moments.diagonal else None,
    )


def _kernel_at(model: nn.Module, x: Tensor, names: tuple[tuple[str, tuple[int, ...]], ...], theta: Tensor) -> Tensor:
    pieces = theta.split([math.prod(shape) for _, shape in names])
    params = {name: piece.reshape(shape) for (name, shape), piece in zip(names, pieces, strict=True)}
    rows = jacobian_features(model, x, params=params, check=False).features
    return rows @ rows.T
