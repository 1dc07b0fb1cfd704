"""Parts of an optimizer from text, as the command line and journals spell them: ``low_rank(2, refresh=5)``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from zokernel.directions import FAMILIES, Dense, Directions
from zokernel.directions.registry import OLD_NAMES
from zokernel.distributions import DIRECTION_DISTRIBUTIONS
from zokernel.errors import UsageError
from zokernel.estimators import ESTIMATORS, Estimator
from zokernel.optim.adam_rule import Adam
from zokernel.optim.averaging.averages import iterate_average
from zokernel.optim.curvature_weights import CurvatureWeights
from zokernel.optim.updates import (
    SGD,
    Clip,
    ClipSlopes,
    Normalized,
    PolyakBound,
    Rule,
    Sign,
    SignOfProjections,
    Update,
)
from zokernel.perturb import Perturb

UPDATES: dict[str, Callable[..., Update]] = {
    "sgd": SGD,
    "sign": Sign,
    "sign_of_projections": SignOfProjections,
    "adam": Adam,
    "curvature_weights": CurvatureWeights,
    "normalized": Normalized,
    "polyak_bound": PolyakBound,
    "clip": Clip,
    "clip_slopes": ClipSlopes,
    "average": iterate_average,
}


def parse_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Read ``name``, ``name(1, 2)`` or ``name(1, key=2)``; arguments are literals.

    Returns:
        The name, positional and keyword arguments.

    Raises:
        UsageError: If the text is none of these.

    Example:
        >>> parse_call("low_rank(2, refresh=5)")
        ('low_rank', [2], {'refresh': 5})
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, [], {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and all(k.arg for k in tree.keywords):
            arguments = [ast.literal_eval(argument) for argument in tree.args]
            return tree.func.id, arguments, {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError):
        pass
    raise UsageError(f"{text!r} is not of the form name or name(value, key=value).")


def build(text: str, constructors: Mapping[str, Callable[..., Any]], kind: str) -> Any:
    """Make the part that ``text`` describes.

    Args:
        text: As for :func:`parse_call`.
        constructors: Constructors by name.
        kind: What the parts are, for messages.

    Raises:
        UsageError: If there is no such part, or it does not take these arguments.
    """
    name, arguments, keywords = parse_call(text)
    if name not in constructors:
        raise UsageError(f"There is no {kind} {name!r}: choose one of {', '.join(constructors)}.")
    try:
        return constructors[name](*arguments, **keywords)
    except TypeError as error:
        raise UsageError(f"The {kind} {text!r} cannot be made: {error}.") from error


def make_directions(directions: Directions | str) -> Directions:
    """Return a family of directions, given an object or its text.

    Example:
        >>> make_directions("low_rank(3)").rank, make_directions("gaussian").distribution.name
        (3, 'gaussian')
    """
    if not isinstance(directions, str):
        return directions
    if directions in DIRECTION_DISTRIBUTIONS:
        return Dense(directions)
    return build(directions, FAMILIES | {old: FAMILIES[new] for old, new in OLD_NAMES.items()}, "family of directions")


def make_estimator(estimator: Estimator | str) -> Estimator:
    """Return an estimator, given an object or its text.

    Example:
        >>> make_estimator("one_sided(1e-3, 8)").num_perturbations
        8
    """
    if isinstance(estimator, str):
        return build(estimator, ESTIMATORS, "estimator")
    if not isinstance(estimator, Estimator):
        raise UsageError(f"{estimator!r} is not an estimator: pass one such as TwoPoint(), or its text.")
    return estimator


def check_together(estimator: Estimator, perturb: Perturb) -> None:
    """Refuse a way of perturbing that does not give the numbers that an estimator takes.

    Raises:
        UsageError: If it does not.
    """
    if (estimator.numbers_per_point == 2) != (perturb.name == "tangents"):
        raise UsageError(
            "ForwardDerivative and Tangents belong together: one takes the derivatives that the other makes."
        )
    if (estimator.numbers_per_point is None) != (perturb.name == "per_example"):
        raise UsageError(
            "PerExample and perturb='per_example' belong together: the losses of all examples are taken at weights "
            "perturbed for each."
        )


def make_updates(update: Update | Sequence[Update] | str | None) -> list[Update]:
    """Return the parts of an update, with a plain step if no part is a rule.

    Args:
        update: A part, several, or their text such as ``normalized(0.9) + adam``.

    Raises:
        UsageError: If there is more than one rule.

    Example:
        >>> make_updates("normalized(0.5) + adam")
        [Normalized(beta=0.5), Adam(beta1=0.9, beta2=0.999, delta=1e-08, amsgrad=False, of_momentum=False)]
    """
    if isinstance(update, str):
        parts = [build(text, UPDATES, "update") for text in split_sum(update)]
    else:
        parts = list(update) if isinstance(update, Sequence) else [update] if update is not None else []
    for part in parts:
        if not isinstance(part, Update):
            raise UsageError(f"{part!r} is not part of an update: pass objects such as Adam(), or one text.")
    _check_order(parts)
    rules = [part for part in parts if isinstance(part, Rule)]
    if len(rules) > 1:
        raise UsageError(f"An update has one rule, not {len(rules)}: {', '.join(map(repr, rules))}.")
    return parts if rules else [*parts, SGD()]


def split_sum(text: str) -> list[str]:
    """Split ``normalized(0.9) + adam`` into its parts.

    Raises:
        UsageError: If the text is no such sum.

    Example:
        >>> split_sum("clip(1e+2) + adam")
        ['clip(100.0)', 'adam']
    """
    try:
        tree, parts = ast.parse(text.strip(), mode="eval").body, []
    except SyntaxError as error:
        raise UsageError(f"{text!r} is not of the form name or name(value, key=value), joined by +.") from error
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        parts.append(tree.right)
        tree = tree.left
    return [ast.unparse(part) for part in [tree, *reversed(parts)]]


def _check_order(parts: Sequence[Update]) -> None:
    """Refuse parts that would undo what an earlier part has done.

    Raises:
        UsageError: If one would.
    """
    kinds = (Normalized, PolyakBound, Clip, ClipSlopes, CurvatureWeights, SignOfProjections)
    for earlier, later in pairwise(part for part in parts if isinstance(part, kinds)):
        is_unaffected = isinstance(earlier, CurvatureWeights)  # whose weights a common factor leaves as they are
        if isinstance(later, SignOfProjections) or (isinstance(later, Normalized) and not is_unaffected):
            raise UsageError(f"{later!r} would undo {earlier!r}: put it first, or leave one of them out.")
