"""Exact directional derivatives by forward-mode differentiation, in place of losses at perturbed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from zokernel.errors import RunError, UsageError
from zokernel.estimators.base import Offsets
from zokernel.perturb.base import Closure, Perturb
from zokernel.perturb.in_place import loss_value


class Tangents(Perturb):
    r"""Differentiate the loss along each point's direction, at the weights themselves.

    :meth:`losses` returns one loss per direction, then the derivatives :math:`\langle \nabla L, z_p \rangle / P`.

    Raises:
        UsageError: When losses are taken, if an operation has no forward derivative.
        RunError: When losses are taken, if the loss does not depend on the parameters.

    References:
        Baydin et al. (2022), Gradients without Backpropagation, arXiv:2202.08587.
    """

    name = "tangents"

    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Return the losses, then the derivatives over their number."""
        losses, slopes = [], []
        for offsets in points:
            (index,) = offsets
            tangents = self.weights.directions(self.weights.tensors, seed=self.weights.seed, step=step, index=index)
            loss, slope = _differentiate(closure, self.weights.tensors, tangents)
            losses.append(loss)
            slopes.append(slope / len(points))
        return losses + slopes


def _differentiate(
    closure: Closure, parameters: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> tuple[float, float]:
    with forward_ad.dual_level():
        for name, tensor in parameters.items():
            # The closure knows these very tensors, so the tangents are attached in place; they go with the level.
            tensor.copy_(forward_ad.make_dual(tensor.detach().clone(), tangents[name]))
        try:
            loss = closure()
        except NotImplementedError as error:
            raise UsageError(
                "The model uses an operation without a forward derivative: load it with "
                "attn_implementation='eager', or use a method that only takes differences, such as mezo."
            ) from error
        loss_value(loss)
        if not isinstance(loss, Tensor):
            raise UsageError("forward_gradient needs a closure that returns the loss as a tensor, not a number.")
        primal, tangent = forward_ad.unpack_dual(loss.squeeze() if loss.ndim else loss)
        if tangent is None:
            raise RunError(
                "The loss does not depend on the parameters in a way that forward differentiation sees: compute it "
                "in PyTorch from the very tensors given to the optimizer, without detach() or item()."
            )
        return float(primal), float(cast(Tensor, tangent))
