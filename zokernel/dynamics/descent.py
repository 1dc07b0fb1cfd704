"""The two functions most users need: predictions under gradient descent, and under zeroth-order descent."""

from __future__ import annotations

import logging
from typing import NamedTuple

from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.dynamics.checks import Steps
from zokernel.dynamics.evolution import Evolution
from zokernel.errors import UsageError
from zokernel.theory.nzk_moments import ProcessMoments, process_moments

logger = logging.getLogger(__name__)


class ZoDescent(NamedTuple):
    """What a zeroth-order run does, step by step.

    Attributes:
        mean: Mean prediction, (T, *shape of f0).
        second_moment: Expected squared residual of every prediction, (T, *shape of f0); subtract the squared residual
            of ``mean`` for its variance.
        expected_loss: Expected loss, (T,).
    """

    mean: Tensor
    second_moment: Tensor
    expected_loss: Tensor


def gradient_descent(f0: Tensor, y: Tensor, kernel: Tensor, lr: float, steps: Steps) -> Tensor:
    r"""Return predictions after any number of gradient-descent steps on :math:`|f - y|^2 / 2n`, in closed form.

    .. math:: f_t = y + (I - \tfrac{\eta}{n} K)^t (f_0 - y)

    Args:
        f0: Initial predictions, (n,) or (n, V).
        y: Targets, the same shape.
        kernel: Kernel :math:`K = X X^T`, (n, n); or (n, V, n, V) as from :func:`zokernel.kernels.entk`.  An expected
            NZK gives the path of the mean under zeroth-order training.
        lr: Learning rate.
        steps: One number of steps, or several.

    Returns:
        Predictions in float64, shaped like ``f0`` for one number of steps, with a leading axis for several.

    Raises:
        UsageError: If shapes do not match, values are not finite, the kernel is not one, or lr is not positive.

    Example:
        >>> import torch
        >>> gradient_descent(torch.zeros(2), torch.ones(2), torch.eye(2), lr=1.0, steps=2)
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    evolution = Evolution(f0, y, kernel, lr, num_examples=f0.shape[0] if f0.ndim else 1)
    path = evolution.mean(steps).reshape(-1, *f0.shape)
    return path[0] if isinstance(steps, int) else path


def zo_descent(
    f0: Tensor,
    y: Tensor,
    kernel: Tensor,
    lr: float,
    steps: Steps,
    num_perturbations: int = 1,
    distribution: str | Distribution = "gaussian",
    *,
    coupling: str = "zo_sgd",
    features: Tensor | None = None,
    dim: int | None = None,
    zeta_distribution: str | Distribution | None = None,
) -> ZoDescent:
    r"""Return the mean, the second moment and the expected loss of zeroth-order descent, exactly.

    The default is the Gaussian of the NZK paper, whose second moment needs no features; optimizers draw Rademacher
    directions.  The formulas are in docs/theory.md, "Second moment".

    Args:
        f0: Initial predictions, (n,) or (n, V).
        y: Targets, the same shape.
        kernel: NTK :math:`K = X X^T`, (n, n) or (n, V, n, V), not multiplied by any NZK factor.
        lr: Learning rate.
        steps: A number T for every step 0, 1, ..., T; or a list of step numbers (far cheaper for the second moment).
        num_perturbations: Directions P averaged per step.
        distribution: Distribution of the directions.  Distributions other than the Gaussian and the sphere have noise
            that depends on coordinates and need ``features``; without them, Rademacher and uniform give an upper bound
            on the second moment (the mean is exact), which is logged.
        coupling: ``zo_sgd`` (what zeroth-order SGD does), or the ``shared`` or
            ``independent`` vectors of the NZK paper.
        features: Features X, (n, d).
        dim: Number of parameters d; taken from ``features`` when given.  Needed by ``shared``, ``independent`` and
            the sphere.
        zeta_distribution: Distribution of the second vector (``independent`` only).

    Returns:
        Mean, second moment and expected loss, in float64.

    Raises:
        UsageError: If the input is not usable (see :class:`Evolution`) or a moment does not exist.

    Example:
        >>> import torch
        >>> run = zo_descent(torch.zeros(2), torch.ones(2), torch.eye(2), lr=0.5, steps=2, num_perturbations=1)
        >>> [round(loss, 4) for loss in run.expected_loss.tolist()]
        [0.5, 0.375, 0.2812]
    """
    moments = resolve_moments(distribution, coupling, features, dim, zeta_distribution)
    evolution = Evolution(
        f0,
        y,
        kernel,
        lr,
        moments=moments,
        num_perturbations=num_perturbations,
        features=features,
        num_examples=f0.shape[0] if f0.ndim else 1,
    )
    requested = range(steps + 1) if isinstance(steps, int) else steps
    mean = evolution.mean(requested).reshape(-1, *f0.shape)
    second = evolution.second_moment(requested).reshape(-1, *f0.shape)
    return ZoDescent(mean, second, evolution.expected_loss(requested))


def resolve_moments(
    distribution: str | Distribution,
    coupling: str,
    features: Tensor | None,
    dim: int | None,
    zeta_distribution: str | Distribution | None = None,
) -> ProcessMoments:
    """Return the moments of a step from what the caller knows of the features.

    Args:
        distribution: Distribution of the directions.
        coupling: ``zo_sgd``, ``shared`` or ``independent``.
        features: Features X, (n, d), or None.
        dim: Number of parameters, or None.
        zeta_distribution: Distribution of the second vector (``independent`` only).

    Returns:
        The moments; without features the negative diagonal term of a distribution with kurtosis below 3 is left out
        (logged).

    Raises:
        UsageError: If the number of parameters or the features are needed and missing, or a moment does not exist.
    """
    distribution = Distribution.parse(distribution)
    size = features.shape[1] if features is not None else dim
    if size is None:
        if coupling != "zo_sgd" or distribution.is_sphere:
            raise UsageError(
                f"Coupling {coupling!r} with {distribution.name} directions needs the number of parameters: pass dim=."
            )
        size = 2  # zo_sgd with independent coordinates: the moments are the same in every dimension from 2 on
    moments = process_moments(distribution, size, coupling, zeta_distribution=zeta_distribution)
    if moments.diagonal == 0 or features is not None:
        return moments
    if moments.diagonal > 0:
        raise UsageError(f"The noise of {distribution.name} directions depends on the features: pass features=.")
    logger.info("No features given: the second moment of %s directions is an upper bound.", distribution.name)
    return ProcessMoments(moments.mean, moments.outer, moments.trace)
