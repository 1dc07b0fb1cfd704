"""ES and EGGROLL: evolution strategies, with dense Gaussian or fresh rank-one directions."""

from __future__ import annotations

from typing import Unpack

from zokernel.directions import Dense, LowRank
from zokernel.estimators import Population
from zokernel.optim.options import ZerothOrderOptions
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.updates.rules import SGD
from zokernel.optim.zeroth_order import ZerothOrder


@register("es")
class ES(ZerothOrder):
    r"""An evolution strategy: members of a population, weighted by their losses relative to the others'.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{2P} \sum_{p=1}^P (s_{p+} - s_{p-})\, z_p

    with z-scores :math:`s` of the losses at :math:`\theta \pm \epsilon z_p`, or one-sided,
    :math:`\frac{\eta}{P} \sum_p s_p z_p`, as published.  The learning rate is a distance: the scale of the losses does
    not matter.  When all losses are equal, the weights stay.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step; each costs two forward passes, or one if not antithetic.
        shaping: ``z_score``, ``centred_ranks``, or ``leave_one_out``, whose learning rate is one for gradients.
        antithetic: Whether each direction is taken both ways.
        distribution: Distribution of the directions; the published method uses ``gaussian``.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ES([weight], lr=0.02)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-2 < losses[0]
        True

    References:
        Qiu et al. (2025), Evolution Strategies at Scale: LLM Fine-Tuning Beyond Reinforcement Learning,
        arXiv:2509.24372; Salimans et al. (2017), Evolution Strategies as a Scalable Alternative to Reinforcement
        Learning, arXiv:1703.03864, for antithetic pairs and centred ranks.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 5e-4,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 15,
        shaping: str = "z_score",
        antithetic: bool = True,
        distribution: str = "gaussian",
        momentum: float = 0.0,
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=Dense(distribution),
            estimator=Population(eps, num_perturbations, shaping, antithetic),
            update=SGD(momentum),
            **options,
        )


@register("eggroll")
class EGGROLL(ZerothOrder):
    r"""An evolution strategy whose members differ from the mean by matrices of rank one.

    It is :class:`ES` with directions :math:`z = A B^T / \sqrt r`, whose factors are both new for every member.  A layer
    costs one extra thin product, so all members of a population answer in one batch.  Their weighted sum has a high
    rank all the same.  Directions of vectors are dense.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions per step; each costs two forward passes, or one if not antithetic.
        rank: r.
        shaping: ``z_score``, ``centred_ranks`` or ``leave_one_out``; see :class:`ES`.
        antithetic: Whether each direction is taken both ways.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        **options: See :class:`~zokernel.optim.options.ZerothOrderOptions`.

    Example:
        >>> import torch
        >>> layer, inputs = torch.nn.Linear(4, 3), torch.eye(4)
        >>> optimizer = EGGROLL(layer, lr=0.02)
        >>> losses = [optimizer.step(lambda: layer(inputs).square().mean()) for _ in range(200)]
        >>> losses[-1] < 1e-2 < losses[0]
        True

    References:
        Sarkar et al. (2025), Evolution Strategies at the Hyperscale, arXiv:2511.16652.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 5e-4,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 15,
        rank: int = 1,
        shaping: str = "z_score",
        antithetic: bool = True,
        momentum: float = 0.0,
        **options: Unpack[ZerothOrderOptions],
    ):
        super().__init__(
            params,
            lr,
            directions=LowRank(rank, refresh=0),
            estimator=Population(eps, num_perturbations, shaping, antithetic),
            update=SGD(momentum),
            **options,
        )
