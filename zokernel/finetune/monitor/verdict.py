"""Whether a run learned, by the losses of its batches and by its evaluations."""

from __future__ import annotations

from zokernel.finetune.monitor.course import FEW_STEPS, NOTICED, Change, HeldOut
from zokernel.finetune.monitor.divergence import RISE

LEARNED, NOT_LEARNED, TOO_SHORT = "learned", "did not learn", "too short to tell"
ONLY_TRAINING = "learned its training rows only"
FAILED = (NOT_LEARNED, ONLY_TRAINING)
SMALL = 0.02  # share of the loss that the steps could lower it by at most
UNSEEN = 0.03  # share of the loss that it may have fallen by, unnoticed
FLAT = 0.5  # share of steps whose losses are all equal


def judge_run(change: Change | None, held_out: HeldOut | None, divergence: str | None = None) -> tuple[str, str]:
    """Return whether a run learned, and one sentence if it did not.

    Args:
        change: The losses of its batches; None if it had too few steps.
        held_out: The evaluations; None if there were not two.
        divergence: That the run diverged, in a sentence, if it ended with the weights after that or those of the start.
            Its last losses and its scores do not count then: a model that gives every answer one score has the loss of
            guessing, far below that on the way, and its one answer can be right more often than before.

    Example:
        >>> judge_run(None, None)
        ('too short to tell', 'Fewer than 20 steps are too few to tell whether the loss falls.')
    """
    verdict, outcome = _judge(change, held_out)
    is_dead = change is not None and change.flat_share >= FLAT and change.highest > RISE * abs(change.last)
    if divergence and (verdict != NOT_LEARNED or is_dead):
        return NOT_LEARNED, divergence
    return verdict, outcome


def _judge(change: Change | None, held_out: HeldOut | None) -> tuple[str, str]:
    """Return the verdict by the losses alone, and one sentence if the run did not learn."""
    if held_out is not None and (held_out.improved or (held_out.change is not None and held_out.fell)):
        return LEARNED, ""
    if change is None:
        return TOO_SHORT, f"Fewer than {FEW_STEPS} steps are too few to tell whether the loss falls."
    if held_out is None:
        return _judge_batches(change)
    saw_no_fall = held_out.from_start and not held_out.fell
    # Few held-out examples may hide a fall that is worth having.
    may_hide_fall = not held_out.rose and held_out.possible_fall > UNSEEN * abs(held_out.start)
    if change.fell and (may_hide_fall or not saw_no_fall):
        return LEARNED, ""
    if change.fell:
        return ONLY_TRAINING, (
            f"The loss of training batches fell from {change.first:.4g} to {change.last:.4g}, but the held-out loss "
            f"was {held_out.start:.4g} at the start and {held_out.best:.4g} at best afterwards"
            f"{_paired_difference(held_out)}."
        )
    if may_hide_fall and _is_undecided(change):
        return TOO_SHORT, (
            f"The losses vary too much to tell whether they fell: {_describe_thirds(change)}; held out "
            f"{held_out.start:.4g} at the start and {held_out.last:.4g} at the end{_paired_difference(held_out)}."
        )
    if not saw_no_fall and _is_undecided(change):
        return TOO_SHORT, f"The losses of batches vary too much to tell whether they fell: {_describe_thirds(change)}."
    when = "at the start" if held_out.from_start else "at the first evaluation"
    return NOT_LEARNED, (
        f"{_describe_no_fall(held_out)}: {_describe_thirds(change)}; held out {held_out.start:.4g} {when} and "
        f"{held_out.best:.4g} at best afterwards{_paired_difference(held_out)}."
    )


def _judge_batches(change: Change) -> tuple[str, str]:
    """Return the verdict of a run without evaluations."""
    if change.fell:
        return LEARNED, ""
    if _is_undecided(change):
        return TOO_SHORT, f"The losses of batches vary too much to tell whether they fell: {_describe_thirds(change)}."
    return NOT_LEARNED, f"The loss did not fall: {_describe_thirds(change)}."


def _is_undecided(change: Change) -> bool:
    """Return whether the loss of batches may have fallen unnoticed, in a run whose steps could lower it."""
    may_have_fallen = 2 * change.error - change.change > UNSEEN * abs(change.first)
    steps_too_small = change.total is not None and change.total < SMALL * abs(change.first)
    return may_have_fallen and not (change.rose or change.flat_share >= FLAT or steps_too_small)


def _describe_thirds(change: Change) -> str:
    """Return the losses of the first and the last third of the steps in words."""
    return (
        f"{change.first:.4g} in the first third of {change.steps:,} steps and {change.last:.4g} in the last "
        f"(± {change.error:.2g})"
    )


def _describe_no_fall(held_out: HeldOut) -> str:
    """Return that the loss did not fall, or by how little, where the held-out examples leave room for a little."""
    if held_out.rose or held_out.possible_fall <= NOTICED * abs(held_out.start):
        return "The loss did not fall"
    return f"The held-out loss fell by {100 * held_out.possible_fall / abs(held_out.start):.2g} % at most"


def _paired_difference(held_out: HeldOut) -> str:
    """Return the paired difference of the held-out examples' losses in words; empty where it is not known."""
    if held_out.change is None:
        return ""
    return f" (the same examples, at the end: {held_out.change:+.2g} ± {held_out.error:.2g})"
