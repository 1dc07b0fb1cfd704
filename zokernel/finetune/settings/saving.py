"""When a run evaluates and saves, and whether it ends with its best step: one follows from the other."""

from __future__ import annotations

import logging
from typing import Any

from zokernel.errors import UsageError
from zokernel.finetune.settings.zo_arguments import is_first_order

logger = logging.getLogger(__name__)

TRANSFORMERS_SAVE_STEPS = 500


def default_eval_steps(max_steps: int) -> int:
    """Return the steps between evaluations if nobody says: a fifth of the run.

    Example:
        >>> default_eval_steps(40), default_eval_steps(-1)
        (8, 500)
    """
    return max(1, max_steps // 5) if max_steps > 0 else 500


def derive(config: Any, **values: Any) -> None:
    """Set settings to what follows from others, and note their names in ``derived``: ``auto`` decided them.

    Args:
        config: A ``ZOConfig``, or arguments of another trainer; changed in place.
        **values: The values by name.
    """
    for name, value in values.items():
        setattr(config, name, value)
    config.derived = frozenset({*getattr(config, "derived", ()), *values})


def choose_strategies(config: Any) -> None:
    """Settle when a run evaluates and saves, as far as nobody says.

    It evaluates every so many steps or, where epochs are saved, after each of them.  It saves its best step, and where
    no step is evaluated, what it can continue from.

    Args:
        config: A ``ZOConfig``; changed in place.
    """
    if config.eval_strategy is None:
        config.eval_strategy = "steps"
        if (
            _name(config.save_strategy) == "epoch"
            and config.eval_steps is None
            and config.load_best_model_at_end is not False
        ):
            derive(config, eval_strategy="epoch")
            logger.info("save_strategy='epoch' lets each epoch be evaluated, too, so that the best can be kept.")
    if config.save_strategy is None:
        config.save_strategy = "best"
        if _name(config.eval_strategy) == "no":
            derive(config, save_strategy="steps" if is_first_order(config.method) else "journal")
            logger.info("Without evaluations no step is known as the best: save_strategy=%r.", config.save_strategy)


def fill_in_saving(config: Any) -> None:
    """Settle what is open of ``save_steps`` and ``load_best_model_at_end``, and log what follows.

    The best step can be kept where steps are evaluated, and something of them is saved: a checkpoint at that time, or
    the journal.  A strategy that is given alone works; what contradicts it is refused.

    Args:
        config: A ``ZOConfig`` whose values exist and that has its ``max_steps``; changed in place.

    Raises:
        UsageError: If the best step is asked for, and no step is evaluated, or evaluations and checkpoints are not at
            one time.
    """
    refuse_unknown_best(config)
    if _name(config.save_strategy) == _name(config.eval_strategy) == "steps":
        _match_steps(config)
    if config.save_steps is None:
        config.save_steps = TRANSFORMERS_SAVE_STEPS
    if config.load_best_model_at_end is not None:
        refuse_lost_best(config)
        return
    problem, _ = _problem(config)
    config.load_best_model_at_end = True
    if problem:
        derive(config, load_best_model_at_end=False)
        logger.info("%s, so the run ends with its last weights, not with the best.", problem)


def _match_steps(config: Any) -> None:
    """Let evaluations and checkpoints be at one time, as far as one of them is open."""
    if config.load_best_model_at_end is False:
        return
    evaluations = default_eval_steps(config.max_steps) if config.eval_steps is None else config.eval_steps
    if config.save_steps is None:
        derive(config, save_steps=evaluations)
        logger.info("save_strategy='steps' saves a checkpoint at each evaluation: save_steps=%g.", evaluations)
    elif config.eval_steps is None and not _is_multiple(config.save_steps, evaluations):
        derive(config, eval_steps=config.save_steps)
        logger.info("The validation split is evaluated where a checkpoint is saved: eval_steps=%g.", config.save_steps)


def refuse_unknown_best(arguments: Any) -> None:
    """Refuse to save the best step of a run that evaluates none.

    Args:
        arguments: A ``ZOConfig``, or arguments of another trainer.

    Raises:
        UsageError: If that is asked for.
    """
    if _name(arguments.eval_strategy) == "no" and _name(arguments.save_strategy) == "best":
        other = "steps" if is_first_order(arguments.method) else "journal"
        raise UsageError(
            "eval_strategy='no' evaluates no step, so save_strategy='best' would never save one: set "
            f"eval_strategy='steps', or save_strategy={other!r}."
        )


def refuse_lost_best(arguments: Any) -> None:
    """Refuse to end with the best step where nothing would be kept of it.

    Args:
        arguments: A ``ZOConfig``, or arguments of another trainer.

    Raises:
        UsageError: If the best step is asked for, and evaluations and checkpoints are not at one time.
    """
    problem, cure = _problem(arguments) if arguments.load_best_model_at_end else ("", "")
    if problem:
        raise UsageError(
            f"{problem}, so the run cannot end with its best step: {cure}, or load_best_model_at_end=False."
        )


def _problem(config: Any) -> tuple[str, str]:
    """Return why a run cannot end with its best step, and what would help, as clauses; empty if it can."""
    save, evaluate = _name(config.save_strategy), _name(config.eval_strategy)
    if evaluate == "no":
        return "eval_strategy='no' evaluates no step", "set eval_strategy='steps'"
    if save == "no":
        return "save_strategy='no' keeps no step to go back to", "set save_strategy='journal'"
    if save in ("steps", "epoch") and save != evaluate:
        problem = f"save_strategy={save!r} does not save the steps that eval_strategy={evaluate!r} evaluates"
        return problem, f"set eval_strategy={save!r}"
    evaluations = default_eval_steps(config.max_steps) if config.eval_steps is None else config.eval_steps
    if save != "steps" or _is_multiple(config.save_steps, evaluations):
        return "", ""
    problem = f"save_steps={config.save_steps:g} is no multiple of eval_steps={evaluations:g}"
    return problem, f"set save_steps={evaluations:g}"


def _is_multiple(long: float, short: float) -> bool:
    """Return whether one number of steps, or share of the run, is a multiple of another of the same kind.

    Example:
        >>> _is_multiple(500, 250), _is_multiple(500, 200), _is_multiple(0.3, 0.1), _is_multiple(500, 0.1)
        (True, False, True, False)
    """
    if (long < 1) != (short < 1):
        return False
    scale = 1_000_000 if short < 1 else 1  # as transformers
    return (long * scale) % (short * scale) == 0


def _name(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))
