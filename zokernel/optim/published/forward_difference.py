"""Forward differences: all directions of a step share one loss at the unperturbed weights."""

from __future__ import annotations

import math
from typing import Unpack

from zokernel.directions import Dense, LowRank
from zokernel.errors import UsageError
from zokernel.estimators import Estimator, OneSided, PerExample
from zokernel.optim.options import ZerothOrderOptions, requested_perturb
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.base import Update
from zokernel.optim.updates.coefficients import Normalized, PolyakBound
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.perturb.per_example import per_example_perturb
from zokernel.values import check_shares, check_switches, is_whole, plain_number


@register("forward_difference")
class ForwardDifference(ZerothOrder):
    r"""Zeroth-order SGD from one-sided differences: P + 1 forward passes for P directions.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P
        \frac{L(\theta + \epsilon z_p) - L(\theta)}{\epsilon}\, z_p

    MeZO needs 2P forwards for as many directions.  A direction's slope is off by
    :math:`\frac{\epsilon}{2} z_p^T H z_p`, which adds noise but no bias under a symmetric distribution:
    :math:`E[(z^T H z)\, z] = 0`.

    With ``normalize`` every slope is divided by the root of a running mean of squared slopes,

    .. math:: s_t^2 = \frac{1 - \beta}{1 - \beta^t} \sum_{k \le t} \beta^{t-k}\,
        \frac1P \sum_p \Big( \frac{L(\theta_k + \epsilon z_p) - L(\theta_k)}{\epsilon} \Big)^2

    so that a step has the length :math:`\eta \sqrt{d/P}` on average, whatever the scale of the loss, and one learning
    rate suits several tasks.  FZOO divides by the spread of one step's losses, which takes about eight directions;
    here two are enough.  Where the loss is low, such a step can be longer than the distance to its minimum.
    ``polyak_share`` c bounds it by a share of Polyak's step (1969) for a loss whose least value is zero, from a running
    mean of the losses at the centre:

    .. math:: \eta_t = \min\big(\eta / s_t,\; c\, \bar L_t / s_t^2\big), \qquad E[s_t^2] \approx \|\nabla L\|^2,

    both of which a schedule lowers.  Along P directions the step that descends fastest is a share
    :math:`P / (P + 1 + r)` of gradient descent's, with r an effective rank of the curvature.

    With ``per_example`` every example of the batch has its own directions
    (see :class:`~zokernel.estimators.PerExample`), and the closure returns the loss of every example, (B,).

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step, or per example; each costs one forward pass, and one more is shared by
            all.
        per_example: Give every example its own directions.
        rank: Rank of the directions of matrices; 0 for dense ones.
        distribution: Distribution of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        normalize: Divide slopes by their running root mean square.
        polyak_share: With ``normalize``, the longest step as a share of Polyak's; infinite for no bound.
        beta: Weight of the past in the running means, in [0, 1).
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Raises:
        UsageError: If a setting is out of range, ``polyak_share`` is given without ``normalize``, or a loss is
            negative although Polyak's step bounds the step.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ForwardDifference([weight], lr=0.05, num_perturbations=4)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-2 < losses[0]
        True

    References:
        Polyak (1969), Minimization of unsmooth functionals, for the bound.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 2,
        per_example: bool = False,
        rank: int = 0,
        distribution: str = "rademacher",
        momentum: float = 0.0,
        normalize: bool = False,
        polyak_share: float = math.inf,
        beta: float = 0.9,
        **options: Unpack[ZerothOrderOptions],
    ):
        check_shares(beta=beta)
        check_switches(per_example=per_example, normalize=normalize)
        update: list[Update] = [Normalized(beta)] if normalize else []
        bound = PolyakBound(plain_number("polyak_share", polyak_share), beta)
        if math.isfinite(polyak_share):
            if not normalize:
                raise UsageError("polyak_share bounds a normalised step: set normalize to true, or leave it out.")
            update.append(bound)
        estimator: Estimator = OneSided(eps, num_perturbations)
        if per_example:
            estimator = PerExample(estimator)
            requested = requested_perturb(options, stacklevel=3)
            options["perturb"] = per_example_perturb(requested, "forward_difference")
        is_dense = is_whole(rank, 0) and rank == 0
        super().__init__(
            params,
            lr,
            directions=Dense(distribution) if is_dense else LowRank(rank, distribution=distribution, refresh=0),
            estimator=estimator,
            update=[*update, SGD(momentum)],
            **options,
        )
