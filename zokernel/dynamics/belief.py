r"""What one step does to the model's beliefs: :math:`\Delta\log\pi(\cdot|x_o) \approx -\eta\,A K G`.

(Li et al. (2026), arXiv:2605.03373, eq. 3, after Ren and Sutherland (2025), arXiv:2407.10490.)
:math:`A = I - 1\pi(x_o)^T` depends on the observed example only, :math:`G = \partial L/\partial z = \pi(x_u) - e_{y_u}`
on the updated one, and the kernel K is :math:`J_oJ_u^T` for a gradient step or :math:`J_o\frac{UU^T}{P}J_u^T` for a
zeroth-order one.  No kernel is formed: first order is one vjp at u and one jvp at o; zeroth order adds P inner products
with the seeded directions and one more jvp.  Predictions come next to what really happens when the step is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zokernel.directions import Dense
from zokernel.distributions import Distribution
from zokernel.errors import UsageError
from zokernel.kernels import checks
from zokernel.kernels.batches import Batch, examples, num_examples
from zokernel.kernels.jacobians import dot, example_jacobian, jacobian_vector_product, vector_jacobian_product
from zokernel.kernels.model import FunctionalModel, Model, Outputs, Params, wrap
from zokernel.kernels.projections import SeededDirections
from zokernel.theory.kernel_error import BeliefMoments, expected_belief_error

# Shape suffixes: R rows of logits (N examples, or N L tokens of sequences), V outputs.

IGNORED = -100
DENSE_LIMIT = 4096


@dataclass(frozen=True)
class BeliefChange:
    r"""One step, decomposed, predicted and taken.

    Attributes:
        probabilities_RV: :math:`\pi(\cdot|x_o)` before the step.
        G: :math:`\partial L/\partial z(x_u)`, (R_u, V): of the mean over examples of :math:`-\log\pi(y|x)`.
        first_order: Predicted :math:`-\eta A K G` of the gradient step, (R_o, V).
        zeroth_order: Predicted :math:`-\eta A \hat K G` of the zeroth-order step; ``None`` without directions.
        actual_first_order: :math:`\Delta\log\pi` of the gradient step, taken.
        actual_zeroth_order: :math:`\Delta\log\pi` of the zeroth-order step, taken with finite differences of the loss.
        expected_gap: Exact rms of ``|zeroth_order - first_order| / |first_order|`` (docs/theory.md,
            "The error of the learning dynamics"); infinite where ``first_order`` is zero, and ``None`` when the
            Jacobian at x_o was too large to form.
        num_perturbations: P.
        lr: :math:`\eta`.
    """

    probabilities_RV: Tensor
    G: Tensor
    first_order: Tensor
    zeroth_order: Tensor | None
    actual_first_order: Tensor
    actual_zeroth_order: Tensor | None
    expected_gap: float | None
    num_perturbations: int
    lr: float

    @property
    def A(self) -> Tensor:
        r""":math:`A = I - 1\pi^T` of every row, (R_o, V, V)."""
        num_outputs = self.probabilities_RV.shape[-1]
        if num_outputs > DENSE_LIMIT:
            raise UsageError(f"A has {num_outputs:,} rows and columns: use apply_A, which needs no matrix.")
        identity = torch.eye(num_outputs, dtype=self.probabilities_RV.dtype, device=self.probabilities_RV.device)
        return identity - self.probabilities_RV[:, None, :]

    def apply_A(self, values_RV: Tensor) -> Tensor:
        """Return A times logits' changes, without the matrix."""
        return center(values_RV, self.probabilities_RV)

    @property
    def gap(self) -> float | None:
        """Measured relative gap between the predicted zeroth-order and first-order changes."""
        return None if self.zeroth_order is None else _relative(self.zeroth_order, self.first_order)

    @property
    def actual_gap(self) -> float | None:
        """Measured relative gap between the two steps, taken."""
        return (
            None if self.actual_zeroth_order is None else _relative(self.actual_zeroth_order, self.actual_first_order)
        )

    @property
    def remainder(self) -> float:
        """Second-order remainder of the gradient step, relative: what the linear prediction misses."""
        return _relative(self.actual_first_order, self.first_order)

    @property
    def zeroth_order_remainder(self) -> float | None:
        """The same for the zeroth-order step; it grows with d / P, which the kernel alone does not show."""
        return (
            None if self.zeroth_order is None else _relative(self.actual_zeroth_order, self.zeroth_order)  # type: ignore[arg-type]
        )

    def of(self, labels: Tensor | Sequence[int]) -> dict[str, Tensor]:
        r"""Return the change of :math:`\log\pi(y_o|x_o)` of chosen answers: classes (N,), or sequences (N, L).

        Args:
            labels: Class or token of each example, or token sequences padded with -100 (summed over tokens).

        Returns:
            Changes (N,) by name: ``first_order``, ``actual_first_order`` and, with directions, the zeroth-order two.
        """
        labels = torch.as_tensor(labels)
        flat = labels.reshape(-1)
        named = {
            "first_order": self.first_order,
            "zeroth_order": self.zeroth_order,
            "actual_first_order": self.actual_first_order,
            "actual_zeroth_order": self.actual_zeroth_order,
        }
        return {
            name: _pick(change, flat).reshape(len(labels), -1).sum(1)
            for name, change in named.items()
            if change is not None
        }


def belief_change(
    model: Model,
    x_o: Batch,
    x_u: Batch,
    y_u: Tensor | Sequence[int],
    lr: float,
    *,
    num_perturbations: int | None = 1,
    distribution: str | Distribution = "rademacher",
    seed: int = 0,
    eps: float = 1e-3,
    outputs: Outputs | None = None,
    params: Mapping[str, Tensor] | None = None,
    check: bool = True,
) -> BeliefChange:
    r"""Decompose, predict and take one step on ``(x_u, y_u)``, first-order and zeroth-order, and look at ``x_o``.

    Args:
        model: A module, ``f(params, x)`` with ``params``, or a :class:`zokernel.kernels.FunctionalModel`.
        x_o: Observed input.
        x_u: Updated input.
        y_u: Its labels: classes or next tokens (N,), or whole sequences (N, L) scored by teacher forcing (see
            :func:`zokernel.kernels.teacher_forcing`), -100 where there is no token.  With ``outputs``, labels are
            positions among the candidates.
        lr: Step size :math:`\eta`.
        num_perturbations: P of the zeroth-order step; ``None`` for first order only.
        distribution: Distribution of the directions.
        seed: Seed of the directions.
        eps: Perturbation size of the step that is taken.
        outputs: Candidate outputs: beliefs are the softmax over them.
        params: Parameters of a bare function.
        check: Probe the model for pitfalls first.

    Returns:
        The decomposition with predicted and actual changes; the model's weights are left alone.

    Raises:
        UsageError: If labels do not fit the rows, or the model does not allow it.

    Example:
        >>> net, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
        >>> change = belief_change(net, x, x, [1], lr=1e-3, num_perturbations=100)
        >>> bool(change.first_order[0, 1] > 0), change.remainder < 1e-2
        (True, True)
    """
    model = wrap(model, params=params, outputs=outputs)
    if check:
        checks.validate(model, x_u, x_o, forward=True, reverse=True)
    labels = torch.as_tensor(y_u).reshape(-1)
    count = num_examples(x_u)
    residual = loss_residual(model, x_u, labels, count)
    logits_o = model.logits(x_o)
    beliefs = logits_o.softmax(-1)
    gradient = vector_jacobian_product(model, x_u, residual)
    before = logits_o.log_softmax(-1)

    def predict(estimate: Params) -> Tensor:
        """Return the change by a step along an estimate of the gradient, to first order."""
        return -lr * center(jacobian_vector_product(model, x_o, estimate), beliefs)

    def take(estimate: Params) -> Tensor:
        """Return the change when the step is taken."""
        weights = {name: tensor - lr * estimate[name] for name, tensor in model.params.items()}
        return model.logits_at(weights, x_o).log_softmax(-1) - before

    first = predict(gradient)
    zeroth = actual_zeroth = gap = None
    if num_perturbations is not None:
        draw = SeededDirections(Dense(distribution), model.params, seed)
        zeroth = predict(_average(draw, [_slope(draw, gradient, p) for p in range(num_perturbations)]))
        actual_zeroth = take(_average(draw, loss_differences(model, x_u, labels, draw, range(num_perturbations), eps)))
        moments = _moments(model, x_o, beliefs, gradient)
        if moments is not None:
            is_still = not moments.product_sq > 0
            gap = math.inf if is_still else expected_belief_error(moments, num_perturbations, distribution)
    return BeliefChange(
        probabilities_RV=beliefs,
        G=residual,
        first_order=first,
        zeroth_order=zeroth,
        actual_first_order=take(gradient),
        actual_zeroth_order=actual_zeroth,
        expected_gap=gap,
        num_perturbations=num_perturbations or 0,
        lr=lr,
    )


def center(values_RV: Tensor, probabilities_RV: Tensor) -> Tensor:
    r"""Return :math:`A v = v - 1\,\pi^T v` row by row: what a change of logits does to log-probabilities."""
    return values_RV - (probabilities_RV * values_RV).sum(-1, keepdim=True)


def loss_residual(model: FunctionalModel, x_u: Batch, labels: Tensor, count: int) -> Tensor:
    r"""Return :math:`G = \partial L/\partial z`, (R, V), of the loss that :func:`answer_loss` returns."""
    logits = model.logits(x_u)
    if len(labels) != len(logits):
        raise UsageError(f"{len(labels)} labels do not fit {len(logits)} rows of logits: give one label for each row.")
    scored = labels != IGNORED
    residual = logits.softmax(-1)
    residual[torch.arange(len(labels))[scored], labels[scored]] -= 1
    return residual * scored[:, None] / count


def answer_loss(logits_RV: Tensor, labels: Tensor, count: int) -> Tensor:
    r"""Return the mean over examples of :math:`-\log\pi(y|x)`, summed over the tokens of each answer."""
    wide = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    return F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum") / count


def loss_differences(
    model: FunctionalModel, x_u: Batch, labels: Tensor, draw: SeededDirections, indices: Sequence[int], eps: float
) -> list[float]:
    r"""Return :math:`[L(\theta+\epsilon u_p) - L(\theta-\epsilon u_p)]/2\epsilon`, as training computes them.

    Args:
        model: The model; its weights are left alone.
        x_u: Updated input.
        labels: One label per row.
        draw: The directions.
        indices: Which directions.
        eps: Perturbation size.

    Returns:
        One projected gradient for each direction.
    """
    weights = {name: tensor.clone() for name, tensor in model.params.items()}
    count = num_examples(x_u)

    def loss_at(index: int, scale: float) -> float:
        for name, tensor in weights.items():
            tensor.copy_(model.params[name])
        draw.add_(weights, scale, index)
        return answer_loss(model.logits_at(weights, x_u), labels, count).item()

    return [(loss_at(index, eps) - loss_at(index, -eps)) / (2 * eps) for index in indices]


def _slope(draw: SeededDirections, gradient: Params, index: int) -> float:
    return dot(gradient, draw.directions(draw.params, seed=draw.seed, step=0, index=index))


def _average(draw: SeededDirections, slopes: list[float]) -> Params:
    """Return the mean over directions of slope times direction."""
    total = {name: torch.zeros_like(tensor) for name, tensor in draw.params.items()}
    draw.add_(total, [slope / len(slopes) for slope in slopes], list(range(len(slopes))))
    return total


def _moments(model: FunctionalModel, x_o: Batch, beliefs_RV: Tensor, gradient: Params) -> BeliefMoments | None:
    """Return the exact moments of M and g when the Jacobian at x_o is small enough to form."""
    if beliefs_RV.numel() * model.dim * model.itemsize > min(2 * 2**30, checks.available_bytes() // 4):
        return None
    rows = [example_jacobian(model, example) for example in examples(x_o)]
    rows_sq = gradient_sq = overlap = 0.0
    product: Tensor | float = 0.0
    for name, grad in gradient.items():
        jac = torch.cat([part[name].flatten(1) for part in rows]).double().reshape(*beliefs_RV.shape, -1)
        centered = jac - torch.einsum("rv,rvd->rd", beliefs_RV.double(), jac)[:, None, :]
        flat, g = centered.flatten(0, 1), grad.double().flatten()
        rows_sq += flat.square().sum().item()
        gradient_sq += g.square().sum().item()
        overlap += (flat.square().sum(0) @ g.square()).item()
        product = product + flat @ g
    assert isinstance(product, Tensor)
    return BeliefMoments(rows_sq, gradient_sq, product.square().sum().item(), overlap, model.dim)


def _pick(change_RV: Tensor, labels: Tensor) -> Tensor:
    scored = labels != IGNORED
    return torch.where(scored, change_RV.gather(1, labels.clamp_min(0)[:, None])[:, 0], 0.0)


def _relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()
