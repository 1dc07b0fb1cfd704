"""GRZO: a direction for every example, and advantages within the batch."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import LowRank
from zokernel.estimators import OneSided, PerExample, TwoPoint
from zokernel.optim.options import ZerothOrderOptions, requested_perturb
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder
from zokernel.perturb.per_example import per_example_perturb
from zokernel.values import check_switches


@register("grzo")
class GRZO(ZerothOrder):
    r"""Zeroth-order SGD in which every example of the batch has its own directions.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{B} \sum_{i=1}^B a_i z_i, \qquad
        a_i = \frac{s_i}{2\, (\mathrm{std}_j(\epsilon s_j) + 10^{-8})}, \qquad
        s_i = \frac{l_i(\theta + \epsilon z_i) - l_i(\theta - \epsilon z_i)}{2\epsilon}

    for losses :math:`l_i` of B examples.  Without ``whiten``, :math:`a_i = s_i`.  All losses of a point are taken in
    one forward of the batch, in which each row sees its own weights.  So the closure returns the loss of every
    example, (B,).

    Directions of matrices have a low rank, and both factors are new for every example, so a layer costs one extra thin
    product.  The published method flips the signs of rows and columns of one dense direction instead.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per example; each costs two forward passes of the batch, or one if ``one_sided``,
            which takes one more for all.
        rank: Rank of the directions.
        whiten: Divide the slopes by their standard deviation over the batch, as published.
        one_sided: Take differences from the losses at the unperturbed weights.
        distribution: Distribution of the factors' entries, and of vectors.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`; ``perturb`` cannot be chosen, since
            every example sees its own weights.

    Raises:
        UsageError: If a setting is out of range, or another way of perturbing is requested.

    Example:
        >>> import torch
        >>> layer, inputs = torch.nn.Linear(3, 1), torch.eye(3)
        >>> optimizer = GRZO(layer, lr=0.05, whiten=False)
        >>> losses = [optimizer.step(lambda: layer(inputs).square().mean(1)) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True

    References:
        GRZO (2026), arXiv:2606.02857.
    """

    by_example = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        rank: int = 1,
        whiten: bool = True,
        one_sided: bool = False,
        distribution: str = "rademacher",
        momentum: float = 0.0,
        **options: Unpack[ZerothOrderOptions],
    ):
        check_switches(one_sided=one_sided)
        options["perturb"] = per_example_perturb(requested_perturb(options, stacklevel=3), "grzo")
        inner = OneSided(eps, num_perturbations) if one_sided else TwoPoint(eps, num_perturbations)
        super().__init__(
            params,
            lr,
            directions=LowRank(rank, distribution=distribution, refresh=0),
            estimator=PerExample(inner, whiten=whiten),
            update=SGD(momentum),
            **options,
        )
