"""Private APIs of trl: what its trainers count whenever they take a loss."""

from __future__ import annotations

import copy
from typing import Any

_COUNTERS = ("_metrics", "_total_train_tokens")


def trl_metrics(trainer: Any) -> dict[str, Any]:
    """Return a copy of what a trainer of trl has recorded of the losses it took; empty for any other trainer.

    Private: ``SFTTrainer._metrics`` and ``_total_train_tokens``, and those of other trainers of trl.  Every call of
    ``compute_loss`` adds to them, also for a loss that is only tried, and nothing public takes that back.
    """
    return copy.deepcopy({name: vars(trainer)[name] for name in _COUNTERS if name in vars(trainer)})


def set_trl_metrics(trainer: Any, metrics: dict[str, Any]) -> None:
    """Set what :func:`trl_metrics` returned.

    Private: the attributes named there.
    """
    vars(trainer).update(metrics)


def trl_token_count(trainer: Any) -> int:
    """Return how many tokens a trainer of trl has counted in training; 0 for any other trainer.

    Private: ``SFTTrainer._total_train_tokens``.  It is logged as ``num_tokens``, but not after every step.
    """
    return vars(trainer).get("_total_train_tokens", 0)


def count_tokens_once(trainer: Any, before: int, losses: int) -> None:
    """Count the tokens of a batch once, although a trainer of trl has counted them for each loss of the step.

    Private: ``SFTTrainer._total_train_tokens`` and ``_metrics``.  Every call of ``compute_loss`` counts, and a step
    calls it for the same batch again and again.

    Args:
        trainer: Any trainer; one that is not of trl counts no tokens.
        before: What :func:`trl_token_count` returned before the step.
        losses: How many losses of the batch were taken since.
    """
    attributes = vars(trainer)
    if "_total_train_tokens" in attributes and losses:
        attributes["_total_train_tokens"] = before + (attributes["_total_train_tokens"] - before) // losses
        attributes["_metrics"]["train"]["num_tokens"] = [attributes["_total_train_tokens"]]
