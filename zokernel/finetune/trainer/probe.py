"""What a trainer measures once, at the weights that a run ended with, if the loss did not fall."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.estimators import OneSided, Richardson, TwoPoint, TwoPointCurvature
from zokernel.finetune.data.collate import EncodedDataset
from zokernel.finetune.monitor.findings import FARTHER, PROBED, Options, Surroundings
from zokernel.finetune.scoring.objective import Objective
from zokernel.finetune.scoring.options import option_scores
from zokernel.finetune.tasks.encoded import Encoded
from zokernel.finetune.trainer.trial_losses import log_refusal
from zokernel.optim.updates.coefficients import Normalized, PolyakBound
from zokernel.optim.updates.rules import SGD
from zokernel.perturb import InForward
from zokernel.perturb.base import Closure

logger = logging.getLogger(__name__)

SCORED = 64  # examples
SLOPES = (TwoPoint, OneSided, Richardson, TwoPointCurvature)  # whose coefficients are slopes, up to a gain
PLAIN = (SGD, Normalized, PolyakBound)


def slope_and_rate(optimizer: Any, projected_gradient: float, rate: float) -> tuple[float | None, float | None]:
    """Return the root mean square of the last step's slopes, and the rate at which they were followed.

    Args:
        optimizer: A zeroth-order optimizer after a step.
        projected_gradient: Root mean square of the step's projected gradients.
        rate: Learning rate of the step: a schedule may have set the optimizer's to that of the next one.

    Returns:
        The slope without the estimator's gain, and the rate of plain descent; None where they are unknown.
    """
    estimator = optimizer.estimator
    if type(estimator) not in SLOPES:
        return None, None
    gain = estimator.gain_at(optimizer.step_count - 1, optimizer.last_estimate)
    slope = projected_gradient / gain if gain else 0.0
    if any(type(part) not in PLAIN for part in optimizer.updates):
        return slope, None
    group = optimizer.param_groups[0]
    return slope, rate * optimizer.last_factor * gain / (1 - group.get("momentum", 0.0))


@torch.no_grad()
def probe_surroundings(optimizer: Any, loss: Closure, *, dtype: torch.dtype) -> Surroundings | None:
    """Take the losses of one batch around the weights, which stay where they are: 17 forward passes.

    Args:
        optimizer: The optimizer of the run, whose directions and eps are used.
        loss: Returns the loss of a fixed batch.
        dtype: The type with the largest rounding that a forward uses.

    Returns:
        The losses; None if they cannot be taken without moving the weights.
    """
    eps = optimizer.estimator.eps
    if eps is None or optimizer.estimator.numbers_per_point != 1:
        return None
    offsets = [sign * times * eps for times in (1.0, FARTHER) for sign in (1.0, -1.0)]
    points = [{}, *({index: offset} for index in range(PROBED) for offset in offsets)]
    perturb = optimizer.perturb
    losses: list[float] = []
    with log_refusal(logger, "The losses around the weights were not taken"):
        if not isinstance(perturb, InForward):  # which may take all of them in one pass over streamed weights
            perturb = InForward()
            perturb.attach(optimizer.active, optimizer.directions, seed=optimizer.seed)
        losses = perturb.losses(loss, points, step=optimizer.step_count)
    if not losses or not all(map(torch.isfinite, map(torch.tensor, losses))):
        return None
    centre, *losses = losses
    near = list(zip(losses[0::4], losses[1::4]))
    far = list(zip(losses[2::4], losses[3::4]))
    return Surroundings(eps, centre, near, far, torch.finfo(dtype).eps)


def coarsest_dtype(model: nn.Module, autocast: torch.dtype | None = None) -> torch.dtype:
    """Return the type with the largest rounding that a forward uses: of any weight, trained or not, or of autocast.

    Example:
        >>> coarsest_dtype(nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2)))
        torch.bfloat16
    """
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()] + ([autocast] if autocast else [])
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


@torch.no_grad()
def inspect_options(
    model: nn.Module,
    dataset: Any,
    objective: Any,
    collate: Callable[[list[Any]], Any],
    *,
    batch: int,
) -> Options | None:
    """Return what is known of options that all examples share; None for any other task.

    Args:
        model: The model, in evaluation mode.
        dataset: The training examples.
        objective: What the run minimises.
        collate: Makes a batch of examples, on the model's device.
        batch: Examples per forward pass; 0 to score none.
    """
    is_classification = isinstance(objective, Objective) and objective.kind == "classification"
    if not is_classification or not isinstance(dataset, EncodedDataset) or not len(dataset):
        return None
    options = _count_options(dataset.examples)
    if options is None or not batch:
        return options
    indices = range(0, len(dataset), -(-len(dataset) // SCORED))
    starts = range(0, len(indices), batch)
    try:
        scores_NC = torch.cat(
            [option_scores(model, collate([dataset[n] for n in indices[s : s + batch]])).cpu() for s in starts]
        )
    except (UsageError, RuntimeError) as error:
        logger.debug("No example was scored: %s", error)
        return options
    labels_N = torch.tensor([dataset.examples[n].label for n in indices])
    return _add_scores(options, scores_NC, labels_N, forwards=len(starts))


def _count_options(examples: Sequence[Encoded]) -> Options | None:
    """Return the options, and how often the examples have each; None if they do not share them."""
    words = examples[0].option_ids
    if any(example.option_ids != words for example in examples):
        return None
    counts = Counter(example.label for example in examples)
    return Options(
        words=[tuple(word) for word in words],
        labels=[counts[choice] for choice in range(len(words))],
        num_prompts=len({(tuple(e.prompt_ids), e.suffix_ids) for e in examples}),
        num_cut=sum(example.lost > 0 for example in examples),
    )


def _add_scores(options: Options, scores_NC: Tensor, labels_N: Tensor, *, forwards: int) -> Options:
    """Return options with how the model answered some examples.

    Args:
        options: The options.
        scores_NC: Score of each option for each example.
        labels_N: The right options.
        forwards: Forward passes that the scores took.
    """
    answers_N = scores_NC.argmax(1)
    return replace(
        options,
        num_scored=len(labels_N),
        num_right=int((answers_N == labels_N).sum()),
        spread=_spread(scores_NC - scores_NC.mean(1, keepdim=True)),
        answers=torch.bincount(answers_N, minlength=len(options.words)).tolist(),
        forwards=forwards,
    )


def _spread(differences_NC: Tensor) -> float:
    """Return the standard deviation over examples of a difference between two options' scores."""
    if len(differences_NC) < 2:
        return 0.0
    # Two scores that vary on their own differ by sqrt(2) times as much as each from their mean, for many options.
    count = differences_NC.shape[1]
    variance = differences_NC.double().var(0).sum() * 2 / max(count - 1, 1)
    return float(variance.sqrt())


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Keep all layers in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
