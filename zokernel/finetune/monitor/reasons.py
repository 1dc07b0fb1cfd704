"""Reasons why the loss of a run did not fall, each with the numbers it rests on and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator

from zokernel.finetune.monitor.course import Change, HeldOut
from zokernel.finetune.monitor.findings import Options, Surroundings
from zokernel.finetune.monitor.verdict import FLAT, SMALL

NEARLY_ALL = 0.95  # of the examples
UNUSED = 0.05  # nats by which scores differ between examples if the model hardly reads them
ROUNDED = 0.5  # relative difference of slopes at eps and 4 eps
COSTLY = 0.25  # share of the loss that a perturbation may add
NOISE = 0.2  # share of the mean squared slope that is common to batches, at most
OVERSHOT = 0.5  # share of its gain that a step loses to curvature
UNMOVED = 1e-3  # relative change of the held-out loss


def example_reasons(options: Options) -> Iterator[str]:
    """Yield why the training examples cannot teach anything."""
    most, count = max(options.labels), options.examples
    if most >= NEARLY_ALL * count:
        yield (
            f"{most:,} of {count:,} training examples have the same label, so there is almost nothing to learn: "
            "train on rows of all classes."
        )
    if options.num_prompts < 2 <= count:
        cut = f" ({options.num_cut:,} were cut to the longest input)" if options.num_cut else ""
        yield (
            f"All {count:,} training prompts are the same{cut}, so the answer cannot depend on them: let the template "
            "name the text's column, or raise max_length."
        )


def eps_reasons(change: Change, surroundings: Surroundings | None) -> Iterator[str]:
    """Yield why the slopes are none: eps is below the loss's rounding, or so large that it leaves the neighbourhood."""
    if change.flat_share >= FLAT and not change.rose:
        yield (
            f"In {100 * change.flat_share:.0f} % of the steps all losses were equal, so eps is below the rounding of "
            "the loss: raise eps 10 times or more (and the batch, if the loss counts answers)."
        )
        return
    if surroundings is None or not surroundings.centre:
        return
    eps, centre, rise = surroundings.eps, surroundings.centre, surroundings.rise()
    if rise > COSTLY * abs(centre):
        yield (
            f"eps {eps:.2g} is too large: the perturbed weights have a loss of {centre + rise:.3g} where the weights "
            f"themselves have {centre:.3g}, so the slopes are not those at the weights; lower eps 10 times."
        )
        return
    near, far = _rms(surroundings.slopes()), _rms(surroundings.slopes(far=True))
    difference = surroundings.slope_difference()
    if difference >= ROUNDED * near > 0 and far < near and surroundings.may_be_rounding():
        yield (
            f"eps {eps:.2g} is within the rounding of the loss: slopes of one batch at eps and at 4 eps differ by "
            f"{difference:.2g}, and they are {near:.2g} and {far:.2g}; raise eps 10 times, or train in fp32."
        )


def rate_reasons(
    change: Change, held_out: HeldOut | None, directions: int, surroundings: Surroundings | None
) -> Iterator[str]:
    """Yield what the rate, or the noise of the slopes, does to a run whose slopes are sound."""
    curvature, error = surroundings.curvature() if surroundings is not None else (0.0, math.inf)
    # Share of a step's gain that curvature takes back; a rate of 2P / z^T H z takes all of it.
    overshoot = change.rate * curvature / (2 * directions) if change.rate and curvature > 2 * error else None
    # What curvature can be at most.
    highest = max(curvature + 2 * error, 0.0) if surroundings is not None else 0.0
    reason = (
        _rate_too_large(change, curvature, overshoot)
        or _rate_too_small(change, overshoot)
        or _hardly_moved(change, held_out)
        or _below_noise(change, highest)
    )
    if reason:
        yield reason


def _rate_too_large(change: Change, curvature: float, overshoot: float | None) -> str:
    """Return that the rate is too large; empty if it is not known to be.

    Args:
        change: The losses of batches.
        curvature: Curvature along a direction.
        overshoot: Share of a step's gain that curvature takes back; None if that is not certain.
    """
    if not (change.rose or (overshoot is not None and overshoot > OVERSHOT)):
        return ""
    # The curvature at weights that have gone astray says little about those at the start.
    factor = min(max(3.0, 4 * overshoot), 10.0 if change.rose else 1e3) if overshoot is not None else 10.0
    why = f"rose from {change.first:.3g} to {change.last:.3g}" if change.rose else "did not fall"
    if overshoot is not None:
        share = f"{100 * overshoot:.0f} %"
        why += f", and curvature ({curvature:.3g} along a direction) takes back {share} of a step's gain"
    return f"The learning_rate is too large: the loss {why}; lower learning_rate about {_round(factor)} times."


def _rate_too_small(change: Change, overshoot: float | None) -> str:
    """Return that the steps together could not lower the loss; empty if they could."""
    loss = abs(change.first)
    if change.total is None or not change.total < max(SMALL * loss, change.error):
        return ""
    factor = 0.5 * loss / change.total if change.total > 0 else 10.0
    if overshoot:
        factor = min(factor, 0.25 / overshoot)
    return (
        f"The learning_rate is too small: even if every slope were pure signal, the {change.steps:,} steps together "
        f"would have lowered the loss by {change.total:.2g} of {loss:.3g}; raise learning_rate about "
        f"{_round(max(factor, 3.0))} times, or take more steps."
    )


def _hardly_moved(change: Change, held_out: HeldOut | None) -> str:
    """Return that the held-out loss hardly changed, where slopes do not tell what steps could do; empty if it did."""
    if change.total is not None or held_out is None or not held_out.largest_change < UNMOVED or held_out.scores_changed:
        return ""
    return (
        f"The learning_rate is too small: in {change.steps:,} steps the held-out loss changed by at most "
        f"{100 * held_out.largest_change:.2g} % and no answer changed; raise learning_rate 10 times."
    )


def _below_noise(change: Change, curvature: float) -> str:
    """Return that the slopes are mostly noise of their batches; empty if not, or if that is not known.

    Args:
        change: The losses of batches.
        curvature: What the curvature along a direction can be at most; 0 where it is not known.
    """
    if change.promised_fall is None or not change.promised_fall > 2 * change.error:
        return ""
    curvature_cost = change.curvature_term * curvature if change.curvature_term else 0.0
    share = max(-change.change + 2 * change.error + curvature_cost, 0.0) / change.promised_fall
    if not share < NOISE:
        return ""
    return (
        f"The slopes are below their noise: if they were all signal, the loss would have fallen by "
        f"{change.promised_fall:.2g}, and it changed by {change.change:+.2g} ± {change.error:.2g}, so at most "
        f"{max(100 * share, 1):.0f} % of their mean square is common to the batches; the examples teach little "
        "this way, so raise the batch, check the labels and the prompt, or take many more steps."
    )


def label_word_reasons(options: Options) -> Iterator[str]:
    """Yield what is wrong with prompt and label words."""
    words, count = options.words, len(options.words)
    if options.shared_start > 1:
        subject = "All" if options.shared_start == count else f"{options.shared_start} of {count}"
        yield (
            f"{subject} label words begin with the same token, so the prompt's end does not tell them apart: choose "
            "label_words that differ in their first token."
        )
    if options.num_scored and options.spread < UNUSED and options.num_prompts > 1:
        chance = 1 / count
        noise = 2 * math.sqrt(chance * (1 - chance) / options.num_scored)
        share = options.num_right / options.num_scored
        if share <= chance + noise or max(options.answers) >= NEARLY_ALL * options.num_scored:
            yield (
                f"The model hardly uses the prompt: its scores differ by only {options.spread:.2g} nats between "
                f"examples, and {100 * share:.0f} % of {options.num_scored} answers are right (chance: "
                f"{100 * chance:.0f} %); try another template and label words, or num_demonstrations."
            )
    lengths = [len(word) for word in words]
    if options.num_scored and min(lengths) < max(lengths):
        longest = sum(answers for answers, length in zip(options.answers, lengths) if length == max(lengths))
        if longest >= NEARLY_ALL * options.num_scored:
            yield (
                f"The label words have {min(lengths)} to {max(lengths)} tokens, and {longest} of {options.num_scored} "
                "answers are the longest: choose label_words of one token each."
            )


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def _round(factor: float) -> str:
    """Return a factor with one digit."""
    return f"{float(f'{min(factor, 1e6):.1g}'):,.0f}"
