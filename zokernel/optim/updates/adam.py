"""Adam and AMSGrad as the rule of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel.estimators.base import Estimate
from zokernel.optim.trained import Trained
from zokernel.optim.updates.base import Rule, Step
from zokernel.values import check_positive, check_shares, check_switches, plain_fields


@dataclass
class Adam(Rule):
    r"""Adam on the estimate, with :math:`\bar v = v`, or its running maximum for AMSGrad.

    .. math:: m \leftarrow \beta_1 m + (1-\beta_1)\hat g,\quad v \leftarrow \beta_2 v + (1-\beta_2)\hat g^2,\quad
        \theta \leftarrow \theta - \eta\, \frac{m/(1-\beta_1^t)}{\sqrt{\bar v/(1-\beta_2^t)} + \delta}

    Args:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        delta: Added to the root of the second moment (Adam's own epsilon).
        amsgrad: Divide by the running maximum of the second moment; one more copy of the parameters.
        of_momentum: Take the second moment of :math:`m/(1-\beta_1^t)` instead of :math:`\hat g`, as R-AdaZO does.

    References:
        Kingma and Ba (2015), arXiv:1412.6980; Chen et al. (2019), ZO-AdaMM, arXiv:1910.06513; Shu et al. (2025),
        Refining Adaptive Zeroth-Order Optimization at Ease, arXiv:2502.01014, for ``of_momentum``.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    delta: float = 1e-8
    amsgrad: bool = False
    of_momentum: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        check_shares(beta1=self.beta1, beta2=self.beta2)
        check_positive(delta=self.delta)
        check_switches(amsgrad=self.amsgrad, of_momentum=self.of_momentum)

    def step(self, trained: Trained, names: Sequence[str], estimate: Estimate) -> tuple[Step, dict[str, float]]:
        """Advance the moments, which are fp32, and return their ratio."""
        steps_of = {name: self._count(trained, name) for name in names}
        first_bias: dict[str, float] = {}
        gradients = trained.dense_estimate(names, estimate)
        firsts, seconds = trained.buffers("exp_avg", names), trained.buffers("exp_avg_sq", names)
        maxima = trained.buffers("max_exp_avg_sq", names) if self.amsgrad else seconds
        for name, gradient in gradients.items():
            first_bias[name] = self.advance(gradient, firsts[name], seconds[name], maxima[name], steps=steps_of[name])
        return gradients, first_bias

    def advance(self, gradient: Tensor, first: Tensor, second: Tensor, maximum: Tensor, *, steps: int) -> float:
        """Advance the moments of one tensor, put their ratio in place of the gradient, and return what divides it.

        Args:
            gradient: The estimate, which is overwritten.
            first: First moment.
            second: Second moment.
            maximum: Running maximum of the second moment; ``second`` itself without ``amsgrad``.
            steps: Steps of these moments, this one included.
        """
        first_bias = 1 - self.beta1**steps
        second_bias = 1 - self.beta2**steps
        first.lerp_(gradient.to(first.dtype), 1 - self.beta1)
        if self.of_momentum:
            torch.div(first, first_bias, out=gradient)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        if self.amsgrad:
            torch.maximum(maximum, second, out=maximum)
        root = torch.div(maximum, second_bias, out=gradient).sqrt_().add_(self.delta)
        torch.div(first, root, out=gradient)
        return first_bias

    def _count(self, trained: Trained, name: str) -> int:
        """Count and return the steps of one parameter, which may have been added later or rested."""
        state = trained.state[trained.named_params[name]]
        state["steps"] = state.get("steps", trained.step_count if "exp_avg" in state else 0) + 1
        return state["steps"]
