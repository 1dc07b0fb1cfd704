"""Why the loss of a run did not fall: at most two reasons, each with the numbers it rests on and what to do.

Reasons that make others meaningless come first: examples that cannot teach, then slopes that are none, then rates.
What a run does not measure is not named.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zokernel.finetune.monitor.course import FELL, FEW_STEPS, NOTICED, Change, HeldOut
from zokernel.finetune.monitor.divergence import RISE
from zokernel.finetune.monitor.findings import Options, Surroundings

logger = logging.getLogger(__name__)

LEARNED, NOT_LEARNED, TOO_SHORT = "learned", "did not learn", "too short to tell"
ONLY_TRAINING = "learned its training rows only"
FAILED = (NOT_LEARNED, ONLY_TRAINING)
MOST = 2  # reasons
NEARLY_ALL = 0.95  # of the examples
UNUSED = 0.05  # nats by which scores differ between examples if the model hardly reads them
ROUNDED = 0.5  # relative difference of slopes at eps and 4 eps
COSTLY = 0.25  # share of the loss that a perturbation may add
SMALL = 0.02  # share of the loss that the steps could lower it by at most
UNSEEN = 0.03  # share of the loss that it may have fallen by, unnoticed
NOISE = 0.2  # share of the mean squared slope that is common to batches, at most
OVERSHOT = 0.5  # share of its gain that a step loses to curvature
STILL = 0.5  # share of steps whose losses are all equal
UNMOVED = 1e-3  # relative change of the held-out loss


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


def verdict(change: Change | None, evaluated: HeldOut | None, diverged: str | None = None) -> tuple[str, str]:
    """Return whether a run learned, and one sentence if it did not.

    Args:
        change: The losses of its batches; None if it had too few steps.
        evaluated: The evaluations; None if there were not two.
        diverged: That the run diverged, in a sentence, if it ended with the weights after that or those of the start.
            Its last losses and its scores do not count then: a model that gives every answer one score has the loss of
            guessing, far below that on the way, and its one answer can be right more often than before.

    Example:
        >>> verdict(None, None)
        ('too short to tell', 'Fewer than 20 steps are too few to tell whether the loss falls.')
    """
    said, told = _seen(change, evaluated)
    dead = change is not None and change.still >= STILL and change.highest > RISE * abs(change.last)
    return (NOT_LEARNED, diverged) if diverged and (said != NOT_LEARNED or dead) else (said, told)


def _seen(change: Change | None, evaluated: HeldOut | None) -> tuple[str, str]:
    """Return the verdict by the losses that were seen, and one sentence if the run did not learn."""
    if evaluated is not None and (evaluated.improved or (evaluated.change is not None and evaluated.fell)):
        return LEARNED, ""
    if change is None:
        return TOO_SHORT, f"Fewer than {FEW_STEPS} steps are too few to tell whether the loss falls."
    if evaluated is None:
        return _seen_in_batches(change)
    known = evaluated.from_start and not evaluated.fell
    # Few held-out examples may hide a fall that is worth having.
    hidden = not evaluated.rose and evaluated.may_have_fallen > UNSEEN * abs(evaluated.start)
    if change.fell and (hidden or not known):
        return LEARNED, ""
    if change.fell:
        return ONLY_TRAINING, (
            f"The loss of training batches fell from {change.first:.4g} to {change.last:.4g}, but the held-out loss "
            f"was {evaluated.start:.4g} at the start and {evaluated.best:.4g} at best afterwards"
            f"{_difference(evaluated)}."
        )
    if hidden and _undecided(change):
        return TOO_SHORT, (
            f"The losses vary too much to tell whether they fell: {_thirds(change)}; held out {evaluated.start:.4g} at "
            f"the start and {evaluated.last:.4g} at the end{_difference(evaluated)}."
        )
    if not known and _undecided(change):
        return TOO_SHORT, f"The losses of batches vary too much to tell whether they fell: {_thirds(change)}."
    when = "at the start" if evaluated.from_start else "at the first evaluation"
    return NOT_LEARNED, (
        f"{_no_fall(evaluated)}: {_thirds(change)}; held out {evaluated.start:.4g} {when} and {evaluated.best:.4g} at "
        f"best afterwards{_difference(evaluated)}."
    )


def _seen_in_batches(change: Change) -> tuple[str, str]:
    """Return the verdict of a run without evaluations."""
    if change.fell:
        return LEARNED, ""
    if _undecided(change):
        return TOO_SHORT, f"The losses of batches vary too much to tell whether they fell: {_thirds(change)}."
    return NOT_LEARNED, f"The loss did not fall: {_thirds(change)}."


def _undecided(change: Change) -> bool:
    """Return whether the loss of batches may have fallen unnoticed, in a run whose steps could lower it."""
    may_have_fallen = 2 * change.error - change.change > UNSEEN * abs(change.first)
    could_not = change.still >= STILL or (change.total is not None and change.total < SMALL * abs(change.first))
    return may_have_fallen and not (change.rose or could_not)


def _thirds(change: Change) -> str:
    """Return the losses of the first and the last third of the steps in words."""
    return (
        f"{change.first:.4g} in the first third of {change.steps:,} steps and {change.last:.4g} in the last "
        f"(± {change.error:.2g})"
    )


def _no_fall(evaluated: HeldOut) -> str:
    """Return that the loss did not fall, or by how little, where the held-out examples leave room for a little."""
    if evaluated.rose or evaluated.may_have_fallen <= NOTICED * abs(evaluated.start):
        return "The loss did not fall"
    return f"The held-out loss fell by {100 * evaluated.may_have_fallen / abs(evaluated.start):.2g} % at most"


def _difference(evaluated: HeldOut) -> str:
    """Return the paired difference of the held-out examples' losses in words; empty where it is not known."""
    if evaluated.change is None:
        return ""
    return f" (the same examples, at the end: {evaluated.change:+.2g} ± {evaluated.error:.2g})"


def diagnose(
    change: Change | None,
    evaluated: HeldOut | None,
    *,
    directions: int = 1,
    options: Options | None = None,
    around: Surroundings | None = None,
    diverged: str | None = None,
    known: str = "",
) -> Diagnosis:
    """Return whether a run learned and, if not, why.

    Args:
        change: The losses of its batches.
        evaluated: Its evaluations.
        directions: Directions per step.
        options: What is known of the label words and of the answers.
        around: Losses around the weights that the run ended with.
        diverged: As for :func:`verdict`.
        known: What was wrong before training, which makes every other reason meaningless; empty if nothing was.

    Returns:
        The diagnosis; silent about a run that learned.
    """
    said, outcome = verdict(change, evaluated, diverged)
    reasons = list(_of_examples(options)) if options is not None and said in FAILED else []
    if outcome == diverged:
        reasons.insert(0, "The learning_rate is too large: training diverged; lower learning_rate about 10 times.")
        return Diagnosis(said, outcome, tuple(reasons[:MOST]), options.forwards if options else 0)
    if said != NOT_LEARNED or change is None:
        return Diagnosis(said, outcome, tuple(reasons))
    if known:
        return Diagnosis(said, outcome, (known,))
    slopes = list(_of_eps(change, around))
    reasons += slopes or _of_rate(change, evaluated, directions, around)
    if options is not None:
        reasons += _of_words(options)
    if not reasons:
        reasons = ["No reason stands out from what was measured: try a learning_rate 3 times higher and 3 times lower."]
    forwards = (options.forwards if options else 0) + (around.forwards if around else 0)
    return Diagnosis(said, outcome, tuple(reasons[:MOST]), forwards)


def _of_examples(options: Options) -> Iterator[str]:
    """Yield why the training examples cannot teach anything."""
    most, count = max(options.labels), options.examples
    if most >= NEARLY_ALL * count:
        yield (
            f"{most:,} of {count:,} training examples have the same label, so there is almost nothing to learn: "
            "train on rows of all classes."
        )
    if options.prompts < 2 <= count:
        cut = f" ({options.cut:,} were cut to the longest input)" if options.cut else ""
        yield (
            f"All {count:,} training prompts are the same{cut}, so the answer cannot depend on them: let the template "
            "name the text's column, or raise max_length."
        )


def _of_eps(change: Change, around: Surroundings | None) -> Iterator[str]:
    """Yield why the slopes are none: eps is below the loss's rounding, or so large that it leaves the neighbourhood."""
    if change.still >= STILL and not change.rose:
        yield (
            f"In {100 * change.still:.0f} % of the steps all losses were equal, so eps is below the rounding of the "
            "loss: raise eps 10 times or more (and the batch, if the loss counts answers)."
        )
        return
    if around is None or not around.centre:
        return
    rise = around.rise()
    if rise > COSTLY * abs(around.centre):
        yield (
            f"eps {around.eps:.2g} is too large: the perturbed weights have a loss of {around.centre + rise:.3g} where "
            f"the weights themselves have {around.centre:.3g}, so the slopes are not those at the weights; lower eps "
            "10 times."
        )
        return
    near, far, apart = _rms(around.slopes()), _rms(around.slopes(far=True)), around.apart()
    if apart >= ROUNDED * near > 0 and far < near and around.may_be_rounding():
        yield (
            f"eps {around.eps:.2g} is within the rounding of the loss: slopes of one batch at eps and at 4 eps differ "
            f"by {apart:.2g}, and they are {near:.2g} and {far:.2g}; raise eps 10 times, or train in fp32."
        )


def _of_rate(change: Change, evaluated: HeldOut | None, directions: int, around: Surroundings | None) -> Iterator[str]:
    """Yield what the rate, or the noise of the slopes, does to a run whose slopes are sound."""
    curvature, error = around.curvature() if around is not None else (0.0, math.inf)
    # Share of a step's gain that curvature takes back; a rate of 2P / z^T H z takes all of it.
    taken = change.rate * curvature / (2 * directions) if change.rate and curvature > 2 * error else None
    # What curvature can be at most.
    highest = max(curvature + 2 * error, 0.0) if around is not None else 0.0
    reason = (
        _rate_too_large(change, curvature, taken)
        or _rate_too_small(change, taken)
        or _hardly_moved(change, evaluated)
        or _below_noise(change, highest)
    )
    if reason:
        yield reason


def _rate_too_large(change: Change, curvature: float, taken: float | None) -> str:
    """Return that the rate is too large; empty if it is not known to be.

    Args:
        change: The losses of batches.
        curvature: Curvature along a direction.
        taken: Share of a step's gain that curvature takes back; None if that is not certain.
    """
    if not (change.rose or (taken is not None and taken > OVERSHOT)):
        return ""
    # The curvature at weights that have gone astray says little about those at the start.
    lower = min(max(3.0, 4 * taken), 10.0 if change.rose else 1e3) if taken is not None else 10.0
    why = f"rose from {change.first:.3g} to {change.last:.3g}" if change.rose else "did not fall"
    if taken is not None:
        why += f", and curvature ({curvature:.3g} along a direction) takes back {100 * taken:.0f} % of a step's gain"
    return f"The learning_rate is too large: the loss {why}; lower learning_rate about {_round(lower)} times."


def _rate_too_small(change: Change, taken: float | None) -> str:
    """Return that the steps together could not lower the loss; empty if they could."""
    loss = abs(change.first)
    if change.total is None or not change.total < max(SMALL * loss, change.error):
        return ""
    higher = 0.5 * loss / change.total if change.total > 0 else 10.0
    if taken:
        higher = min(higher, 0.25 / taken)
    return (
        f"The learning_rate is too small: even if every slope were pure signal, the {change.steps:,} steps together "
        f"would have lowered the loss by {change.total:.2g} of {loss:.3g}; raise learning_rate about "
        f"{_round(max(higher, 3.0))} times, or take more steps."
    )


def _hardly_moved(change: Change, evaluated: HeldOut | None) -> str:
    """Return that the held-out loss hardly changed, where slopes do not tell what steps could do; empty if it did."""
    if change.total is not None or evaluated is None or not evaluated.moved < UNMOVED or evaluated.scores_moved:
        return ""
    return (
        f"The learning_rate is too small: in {change.steps:,} steps the held-out loss changed by at most "
        f"{100 * evaluated.moved:.2g} % and no answer changed; raise learning_rate 10 times."
    )


def _below_noise(change: Change, curvature: float) -> str:
    """Return that the slopes are mostly noise of their batches; empty if not, or if that is not known.

    Args:
        change: The losses of batches.
        curvature: What the curvature along a direction can be at most; 0 where it is not known.
    """
    if change.promised is None or not change.promised > 2 * change.error:
        return ""
    back = change.squared * curvature if change.squared else 0.0
    share = max(-change.change + 2 * change.error + back, 0.0) / change.promised
    if not share < NOISE:
        return ""
    return (
        f"The slopes are below their noise: if they were all signal, the loss would have fallen by "
        f"{change.promised:.2g}, and it changed by {change.change:+.2g} ± {change.error:.2g}, so at most "
        f"{max(100 * share, 1):.0f} % of their mean square is common to the batches; the examples teach little "
        "this way, so raise the batch, check the labels and the prompt, or take many more steps."
    )


def _of_words(options: Options) -> Iterator[str]:
    """Yield what is wrong with prompt and label words."""
    words, count = options.words, len(options.words)
    if options.shared_start > 1:
        which = "All" if options.shared_start == count else f"{options.shared_start} of {count}"
        yield (
            f"{which} label words begin with the same token, so the prompt's end does not tell them apart: choose "
            "label_words that differ in their first token."
        )
    if options.scored and options.spread < UNUSED and options.prompts > 1:
        chance = 1 / count
        noise = 2 * math.sqrt(chance * (1 - chance) / options.scored)
        share = options.right / options.scored
        if share <= chance + noise or max(options.answers) >= NEARLY_ALL * options.scored:
            yield (
                f"The model hardly uses the prompt: its scores differ by only {options.spread:.2g} nats between "
                f"examples, and {100 * share:.0f} % of {options.scored} answers are right (chance: {100 * chance:.0f} "
                "%); try another template and label words, or num_demonstrations."
            )
    lengths = [len(word) for word in words]
    if options.scored and min(lengths) < max(lengths):
        longest = sum(given for given, length in zip(options.answers, lengths) if length == max(lengths))
        if longest >= NEARLY_ALL * options.scored:
            yield (
                f"The label words have {min(lengths)} to {max(lengths)} tokens, and {longest} of {options.scored} "
                "answers are the longest: choose label_words of one token each."
            )


def worse_than_start(
    before: Mapping[str, float], after: Mapping[str, float], *, kept: bool, streamed: bool = False
) -> str:
    """Return that the last weights are worse than those before training; empty if not.

    Args:
        before: Loss before training.
        after: Loss after it.
        kept: Whether the best weights were to be kept, so that these are the best by the validation examples.
        streamed: Whether weights were trained in their files, where a run keeps its last ones.

    Example:
        >>> worse_than_start({"loss": 0.7}, {"loss": 0.9}, kept=False)
        'The held-out loss is higher than before training (0.7 -> 0.9), and the last weights were kept:
        load_best_model_at_end keeps the best ones.'
        >>> worse_than_start({"loss": 0.7}, {"loss": 0.6}, kept=False)
        ''
    """
    first, last = before["loss"], after["loss"]
    if kept or not last - first > FELL * abs(first):
        return ""
    advice = "'zokernel replay' makes those of any step" if streamed else "load_best_model_at_end keeps the best ones"
    return (
        f"The held-out loss is higher than before training ({first:.4g} -> {last:.4g}), and the last weights were "
        f"kept: {advice}."
    )


def diagnosed(
    found: Diagnosis | None,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    kept: bool,
    streamed: bool = False,
) -> dict[str, Any]:
    """Return a diagnosis for ``metrics.json``, and log if the last weights are worse than those before training.

    Args:
        found: The diagnosis; None if nothing was trained.
        before: Loss on the reported examples before training.
        after: Loss after it.
        kept: Whether the best weights were to be kept.
        streamed: Whether weights were trained in their files.
    """
    if found is None:
        return {}
    worse = worse_than_start(before, after, kept=kept, streamed=streamed)
    if worse:
        logger.warning("%s", worse)
    return {**vars(found), "reasons": list(found.reasons), "worse": worse}


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def _round(factor: float) -> str:
    """Return a factor with one digit."""
    return f"{float(f'{min(factor, 1e6):.1g}'):,.0f}"
