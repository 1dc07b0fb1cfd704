"""MeZO as a textbook writes it: the same training as :class:`~zokernel.optim.MeZO`, slow and short.

Nothing here is fused, restored in the update, journalled or parallel.  It is what to read first, and what the tests
compare the optimizer with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zokernel.directions import Dense, Directions


@torch.no_grad()
def textbook_step(
    weights: Mapping[str, Tensor],
    loss: Callable[[], Tensor | float],
    *,
    step: int,
    lr: float,
    eps: float = 1e-3,
    num_perturbations: int = 1,
    seed: int = 0,
    directions: Directions | None = None,
) -> float:
    r"""Take one step of zeroth-order SGD and return the mean of the losses.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P
        \frac{L(\theta + \epsilon z_p) - L(\theta - \epsilon z_p)}{2\epsilon}\, z_p

    Args:
        weights: Trained parameters by name, changed in place.
        loss: Returns the loss of a fixed batch at the weights as they are.
        step: Step of the run, from zero.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step, P.
        seed: Seed of all directions of the run.
        directions: Family of random directions; dense Rademacher directions when not given.

    Returns:
        The mean of the 2 P losses.

    Example:
        >>> weight = torch.ones(3)
        >>> losses = [textbook_step({"w": weight}, lambda: weight.square().sum(), step=t, lr=0.05) for t in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True

    References:
        Malladi et al. (2023), arXiv:2305.17333, Algorithm 1.
    """
    directions = directions or Dense("rademacher")
    theta = {name: weight.clone() for name, weight in weights.items()}
    gradient = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    losses = []
    for index in range(num_perturbations):
        z = directions(weights, seed=seed, step=step, index=index)
        for sign in (1.0, -1.0):
            for name, weight in weights.items():
                weight.copy_(theta[name] + sign * eps * z[name])
            losses.append(float(loss()))
        slope = (losses[-2] - losses[-1]) / (2 * eps)
        for name in gradient:
            gradient[name] += slope / num_perturbations * z[name]
    for name, weight in weights.items():
        weight.copy_(theta[name] - lr * gradient[name])
    return sum(losses) / len(losses)
