"""Why the loss of a run did not fall: at most two reasons, each with the numbers it rests on and what to do.

Reasons that make others meaningless come first: examples that cannot teach, then slopes that are none, then rates.
What a run does not measure is not named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zokernel.finetune.monitor.course import FELL, Change, HeldOut
from zokernel.finetune.monitor.findings import Options, Surroundings
from zokernel.finetune.monitor.reasons import eps_reasons, example_reasons, label_word_reasons, rate_reasons
from zokernel.finetune.monitor.verdict import FAILED, NOT_LEARNED, judge_run

logger = logging.getLogger(__name__)

MOST = 2  # reasons


@dataclass(frozen=True)
class Diagnosis:
    """What a run says about itself at its end.

    Attributes:
        verdict: ``learned``, ``learned its training rows only``, ``did not learn`` or ``too short to tell``.
        outcome: One sentence with the losses; empty for a run that learned.
        reasons: At most two sentences, the most certain first.
        forwards: Forward passes that the reasons took.
    """

    verdict: str
    outcome: str = ""
    reasons: tuple[str, ...] = ()
    forwards: int = 0


def diagnose(
    change: Change | None,
    held_out: HeldOut | None,
    *,
    directions: int = 1,
    options: Options | None = None,
    surroundings: Surroundings | None = None,
    divergence: str | None = None,
    known_reason: str = "",
) -> Diagnosis:
    """Return whether a run learned and, if not, why.

    Args:
        change: The losses of its batches.
        held_out: Its evaluations.
        directions: Directions per step.
        options: What is known of the label words and of the answers.
        surroundings: Losses around the weights that the run ended with.
        divergence: As for :func:`judge_run`.
        known_reason: What was wrong before training, which makes every other reason meaningless; empty if nothing was.

    Returns:
        The diagnosis; silent about a run that learned.
    """
    verdict, outcome = judge_run(change, held_out, divergence)
    reasons = list(example_reasons(options)) if options is not None and verdict in FAILED else []
    if outcome == divergence:
        reasons.insert(0, "The learning_rate is too large: training diverged; lower learning_rate about 10 times.")
        return Diagnosis(verdict, outcome, tuple(reasons[:MOST]), options.forwards if options else 0)
    if verdict != NOT_LEARNED or change is None:
        return Diagnosis(verdict, outcome, tuple(reasons))
    if known_reason:
        return Diagnosis(verdict, outcome, (known_reason,))
    slopes = list(eps_reasons(change, surroundings))
    reasons += slopes or rate_reasons(change, held_out, directions, surroundings)
    if options is not None:
        reasons += label_word_reasons(options)
    if not reasons:
        reasons = ["No reason stands out from what was measured: try a learning_rate 3 times higher and 3 times lower."]
    forwards = (options.forwards if options else 0) + (surroundings.forwards if surroundings else 0)
    return Diagnosis(verdict, outcome, tuple(reasons[:MOST]), forwards)


def worse_than_start(
    before: Mapping[str, float], after: Mapping[str, float], *, keeps_best: bool, streamed: bool = False
) -> str:
    """Return that the last weights are worse than those before training; empty if not.

    Args:
        before: Loss before training.
        after: Loss after it.
        keeps_best: Whether the best weights were to be kept, so that these are the best by the validation examples.
        streamed: Whether weights were trained in their files, where a run keeps its last ones.

    Example:
        >>> worse_than_start({"loss": 0.7}, {"loss": 0.9}, keeps_best=False)
        'The held-out loss is higher than before training (0.7 -> 0.9), and the last weights were kept:
        load_best_model_at_end keeps the best ones.'
        >>> worse_than_start({"loss": 0.7}, {"loss": 0.6}, keeps_best=False)
        ''
    """
    first, last = before["loss"], after["loss"]
    if keeps_best or not last - first > FELL * abs(first):
        return ""
    advice = "'zokernel replay' makes those of any step" if streamed else "load_best_model_at_end keeps the best ones"
    return (
        f"The held-out loss is higher than before training ({first:.4g} -> {last:.4g}), and the last weights were "
        f"kept: {advice}."
    )


def diagnosis_metrics(
    diagnosis: Diagnosis | None,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    keeps_best: bool,
    streamed: bool = False,
) -> dict[str, Any]:
    """Return a diagnosis for ``metrics.json``, and log if the last weights are worse than those before training.

    Args:
        diagnosis: The diagnosis; None if nothing was trained.
        before: Loss on the reported examples before training.
        after: Loss after it.
        keeps_best: Whether the best weights were to be kept.
        streamed: Whether weights were trained in their files.
    """
    if diagnosis is None:
        return {}
    worse = worse_than_start(before, after, keeps_best=keeps_best, streamed=streamed)
    if worse:
        logger.warning("%s", worse)
    return {**vars(diagnosis), "reasons": list(diagnosis.reasons), "worse": worse}
