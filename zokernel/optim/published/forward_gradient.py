"""Forward-gradient descent: exact directional derivatives by forward-mode differentiation instead of differences."""

from __future__ import annotations

from typing import cast

import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from zokernel.directions import Dense
from zokernel.errors import RunError, UsageError
from zokernel.estimators.base import Estimate
from zokernel.estimators.two_point import TwoPoint
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register
from zokernel.optim.zeroth_order import Closure, ZerothOrderOptimizer
from zokernel.perturb.recorded import Recalled


@register("forward_gradient")
class ForwardGradient(ZerothOrderOptimizer):
    r"""Zeroth-order SGD in the limit :math:`\epsilon \to 0`.

    .. math:: \theta \leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^P \langle \nabla L(\theta), z_p\rangle\, z_p

    Each derivative is one forward pass that carries tangents along: no bias and no round-off from differences, but one
    copy of the parameters for the direction and about twice the activations.  The closure must return the loss as a
    tensor, computed from the parameters by operations that have a forward derivative (fused attention has none: load
    transformers with ``attn_implementation="eager"``).

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        num_perturbations: Directions a step; each costs one forward pass with tangents.
        distribution: Law of the directions: ``rademacher``, ``gaussian``, ``uniform`` or ``sphere``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        restore: ``fold``, ``grid`` or ``copy``; nothing is perturbed, so they differ in rounding only.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ForwardGradient([weight], lr=0.05)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 < losses[0]
        True
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        num_perturbations: int = 1,
        distribution: str = "rademacher",
        seed: int = 0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        restore: str = "fold",
    ):
        super().__init__(
            params,
            estimator=TwoPoint(num_perturbations=num_perturbations),
            directions=Dense(distribution),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            seed=seed,
            restore=restore,
        )

    @property
    def visits_points(self) -> bool:
        """Never: derivatives are taken at the weights themselves."""
        return False

    @property
    def forwards_per_step(self) -> int:
        """One for each direction."""
        return self.estimator.num_perturbations

    def estimate(self, closure: Closure) -> Estimate:
        """Differentiate the loss along every direction."""
        if isinstance(self.evaluator, Recalled):
            numbers, count = self.evaluator.record, self.estimator.num_perturbations
            if len(numbers) != 2 * count:
                raise RunError(f"Step {self.step_count + 1} needs {2 * count} numbers, not {len(numbers)}.")
            return Estimate(dict(enumerate(numbers[count:])), [self.checked(loss) for loss in numbers[:count]])
        coefficients, losses = {}, []
        for index in range(self.estimator.num_perturbations):
            tangents = self.directions(self.named_params, seed=self.seed, step=self.step_count, index=index)
            loss, slope = self._differentiate(closure, tangents)
            coefficients[index] = slope / self.estimator.num_perturbations
            losses.append(self.checked(loss))
        return Estimate(coefficients, losses)

    def record(self) -> list[float]:
        """Return the losses and then the coefficients, which here do not follow from them."""
        losses = super().record()
        assert self.last_estimate is not None
        return [*losses, *self.last_estimate.coefficients.values()]

    def _differentiate(self, closure: Closure, tangents: dict[str, Tensor]) -> tuple[float, float]:
        with forward_ad.dual_level():
            for name, tensor in self.named_params.items():
                # The closure knows these very tensors, so the tangents are attached in place; they go with the level.
                tensor.copy_(forward_ad.make_dual(tensor.detach().clone(), tangents[name]))
            try:
                loss = closure()
            except NotImplementedError as error:
                raise UsageError(
                    "The model uses an operation without a forward derivative: load it with "
                    "attn_implementation='eager', or use a method that only takes differences, such as mezo."
                ) from error
            if not isinstance(loss, Tensor):
                raise UsageError("forward_gradient needs a closure that returns the loss as a tensor, not a number.")
            primal, tangent = forward_ad.unpack_dual(loss)
            if tangent is None:
                raise RunError(
                    "The loss does not depend on the parameters in a way that forward differentiation sees: compute it "
                    "in PyTorch from the very tensors given to the optimizer, without detach() or item()."
                )
            return float(primal), float(cast(Tensor, tangent))
