"""Rules without moments: a plain step, one with momentum, and the sign of the estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zokernel.estimators.base import Estimate
from zokernel.optim.trained import Trained
from zokernel.optim.updates.base import Rule, Step
from zokernel.values import check_shares, plain_fields


@dataclass
class SGD(Rule):
    r"""A plain step, or one with heavy-ball momentum.

    .. math:: m \leftarrow \beta m + \hat g, \qquad \theta \leftarrow \theta - \eta m

    Args:
        momentum: :math:`\beta`, in [0, 1).  When not zero, one fp32 copy of the parameters is kept.

    References:
        Polyak (1964), Some methods of speeding up the convergence of iteration methods.
    """

    dense_where = "momentum"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        check_shares(momentum=self.momentum)

    def group_defaults(self) -> dict[str, Any]:
        """Return the momentum."""
        return {"momentum": self.momentum}

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, float]:
        """Advance the momentum buffers and return them."""
        momenta = {name: group["momentum"] for group, members in trained.groups() for name in members}
        buffers = trained.buffers("momentum_buffer", names)
        trained.add_estimate(buffers, estimate, decay={name: momenta[name] for name in names})
        return buffers, 1.0

    def effective_lr(self, group: Mapping[str, Any], gain: float) -> float:
        r"""Return :math:`\eta\, C / (1 - \beta)`."""
        return group["lr"] * gain / (1.0 - group["momentum"])


@dataclass
class Sign(Rule):
    r"""Move every weight by the learning rate: :math:`\theta \leftarrow \theta - \eta\, \mathrm{sign}(\hat g)`.

    References:
        Liu et al. (2019), signSGD via Zeroth-Order Oracle, ICLR.
    """

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, float]:
        """Return the sign of the estimate."""
        gradients = trained.dense_estimate(names, estimate)
        return {name: gradient.sign_() for name, gradient in gradients.items()}, 1.0
