"""What single directions, and the gradient, do to the beliefs of a language model in observed sentences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernel.experiments.entk.sentences import LanguageTask
from zokernel.optim import MeZO

LOSS_CHANGE = 0.01  # of the step along the gradient by which J g is measured

Gradients = Callable[[int], tuple[float, Tensor]]
"""By number of a batch, the squared norm of its gradient and the change of beliefs per unit along it."""


@dataclass(frozen=True)
class Changes:
    r"""What single directions do to beliefs, and what the gradient does; B batches, D directions.

    Attributes:
        slopes: Slopes of each batch's loss along each direction, (B, D).
        gram: Inner products of the changes of beliefs :math:`J z_p`, (D, D).
        along_gradient: Inner products of :math:`J g_b` with :math:`J z_p`, (B, D).
        gradient_sq: :math:`\|g_b\|^2`, (B,).
        change_sq: :math:`\|J g_b\|^2`, (B,).
    """

    slopes: np.ndarray
    gram: np.ndarray
    along_gradient: np.ndarray
    gradient_sq: np.ndarray
    change_sq: np.ndarray

    def variance(self, jacobian_sq: float) -> np.ndarray:
        r"""Return v of each batch by the law, from :math:`\|J\|_F^2`."""
        return 1 + self.gradient_sq * jacobian_sq / self.change_sq

    def errors(self, count: int) -> np.ndarray:
        """Return the squared relative errors of disjoint groups of ``count`` directions, (B, groups)."""
        groups = len(self.gram) // count
        errors = np.empty((len(self.slopes), groups))
        for batch, group in itertools.product(range(len(self.slopes)), range(groups)):
            part = slice(group * count, (group + 1) * count)
            slopes = self.slopes[batch, part]
            change = slopes @ self.gram[part, part] @ slopes / count**2
            shared = slopes @ self.along_gradient[batch, part] / count
            errors[batch, group] = 1 + (change - 2 * shared) / self.change_sq[batch]
        return errors


def along_gradient(task: LanguageTask, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Return the squared norm of a batch's gradient, and the change of beliefs per unit along it."""
    parameters = list(task.model.parameters())
    loss = F.cross_entropy(last_logits(task.model, batch), batch["targets"])
    gradients = torch.autograd.grad(loss, parameters)
    size = sum(g.square().sum(dtype=torch.float64).item() for g in gradients)
    return size, difference(task, parameters, gradients, LOSS_CHANGE / size)


def gradients_of(task: LanguageTask) -> Gradients:
    """Return :func:`along_gradient` of a task's batches by number, each taken when it is first asked for."""
    return cache(lambda number: along_gradient(task, task.batches[number]))


def measure_gradients(task: LanguageTask, gradient: Gradients) -> dict[str, np.ndarray]:
    """Return the squares of every batch's gradient and of the change of beliefs along it."""
    sizes, changes = zip(*map(gradient, range(len(task.batches))), strict=True)
    return {
        "gradient_sq": np.array(sizes),
        "change_sq": np.array([change.square().sum(dtype=torch.float64).item() for change in changes]),
    }


def measure(
    task: LanguageTask,
    gradient: Gradients,
    num_batches: int,
    directions: int,
    *,
    distribution: str,
    eps: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Measure what the gradients of batches and single directions do to the beliefs in the observed sentences.

    Args:
        task: Model and observed sentences; all weights move.
        gradient: What :func:`gradients_of` returns for the task.
        num_batches: B; the task's first training batches, of equal size.
        directions: D.
        distribution: That of the directions.
        eps: Half of the distance between the two points of a direction.
        seed: Seed of the directions.

    Returns:
        The fields of :class:`Changes`.
    """
    model, batches = task.model, task.batches[:num_batches]
    gradient_sq, along = zip(*map(gradient, range(num_batches)), strict=True)
    widths = [batch["input_ids"].shape[1] for batch in batches]
    padded = {
        key: torch.cat([F.pad(b[key], (0, max(widths) - width)) for b, width in zip(batches, widths, strict=True)])
        for key in ("input_ids", "attention_mask")
    }
    targets = torch.cat([batch["targets"] for batch in batches])
    evaluations: list[tuple[Tensor, Tensor]] = []

    def closure() -> float:
        losses = F.cross_entropy(last_logits(model, padded), targets, reduction="none")
        evaluations.append((losses.double().view(len(batches), -1).mean(1), beliefs(task)))
        return losses.mean().item()

    optimizer = MeZO(model, lr=0.0, eps=eps, distribution=distribution, seed=seed)  # step p evaluates direction p
    slopes, changes = [], []
    for _ in range(directions):
        evaluations.clear()
        optimizer.step(closure)
        (plus, plus_beliefs), (minus, minus_beliefs) = evaluations[:2]  # the first step takes its last loss twice
        slopes.append((plus - minus).numpy() / (2 * eps))
        changes.append((plus_beliefs - minus_beliefs).flatten() / (2 * eps))
    stacked, gradient_changes = torch.stack(changes), torch.stack(along).flatten(1)
    return {
        "slopes": np.array(slopes).T,
        "gram": inner(stacked, stacked),
        "along_gradient": inner(gradient_changes, stacked),
        "gradient_sq": np.array(gradient_sq),
        "change_sq": np.diagonal(inner(gradient_changes, gradient_changes)).copy(),
    }


def inner(left: Tensor, right: Tensor) -> np.ndarray:
    """Return all inner products of two sets of vectors, summed in float64 a block at a time."""
    parts = zip(left.split(1 << 16, dim=1), right.split(1 << 16, dim=1), strict=True)
    return cast(Tensor, sum(a.double() @ b.double().T for a, b in parts)).numpy()


@torch.no_grad()
def difference(task: LanguageTask, parameters: list[nn.Parameter], vector: Sequence[Tensor], step: float) -> Tensor:
    """Return the change of beliefs per unit along a vector, by a central difference; the weights are restored."""
    at_points = []
    for move in (step, -2 * step, step):
        for parameter, direction in zip(parameters, vector, strict=True):
            parameter.add_(direction, alpha=move)
        at_points.append(beliefs(task))
    return (at_points[0] - at_points[1]) / (2 * step)


@torch.no_grad()
def beliefs(task: LanguageTask) -> Tensor:
    """Return the probabilities of the next token of each observed sentence, (N, V)."""
    return last_logits(task.model, task.observed).softmax(-1)


def last_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits at the last token of every row, (N, V)."""
    mask = batch["attention_mask"]
    hidden = model.get_decoder()(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)[0]
    return model.get_output_embeddings()(hidden[torch.arange(len(mask)), mask.sum(1) - 1])
